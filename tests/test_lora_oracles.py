"""What LoRAs do to whole models: ours on our transformer, against PEFT, diffusers' loader and ComfyUI's rules.

Our transformer and diffusers' have the same weights and get the same inputs, in float32.
"""

import copy
from pathlib import Path

import peft
import pytest
import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.func import functional_call

import convert_lora
from frame_pack.config import FramePackConfig
from frame_pack.context import section_context
from frame_pack.model import Conditioning, FramePackTransformer
from networks import loha, lokr, lora_framepack
from networks.lora_formats import read_lora
from networks.network import Network
from networks.rebuild import network_for, network_from_tensors

WIDTH, MLP = 256, 1024
SIZES = {"text_embed_dim": 48, "pooled_projection_dim": 24, "image_proj_dim": 36}
TOLERANCE = 1e-5
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def oracle() -> HunyuanVideoFramepackTransformer3DModel:
    """Not to be changed."""
    torch.manual_seed(0)
    layers = {"num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 1}
    parts = {"has_image_proj": True, "has_clean_x_embedder": True}
    return HunyuanVideoFramepackTransformer3DModel(num_attention_heads=2, **layers, **parts, **SIZES).eval()


@pytest.fixture
def theirs(oracle) -> HunyuanVideoFramepackTransformer3DModel:
    return copy.deepcopy(oracle)


@pytest.fixture
def ours(oracle) -> FramePackTransformer:
    config = FramePackConfig(
        width=WIDTH,
        mlp_width=MLP,
        num_double_blocks=2,
        num_single_blocks=2,
        num_refiner_blocks=1,
        text_width=SIZES["text_embed_dim"],
        pooled_width=SIZES["pooled_projection_dim"],
        image_width=SIZES["image_proj_dim"],
    )
    model = FramePackTransformer(config).eval().requires_grad_(False)
    model.load_state_dict(oracle.state_dict())
    return model


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def inputs() -> Conditioning:
    history = random(1, 16, 19, 4, 6, seed=2)
    return Conditioning(
        context=section_context(random(1, 16, 1, 4, 6, seed=1), history, padding=1, window=3),
        text=random(1, 5, SIZES["text_embed_dim"], seed=3),
        text_mask=torch.ones(1, 5, dtype=torch.bool),
        pooled=random(1, SIZES["pooled_projection_dim"], seed=4),
        image=random(1, 7, SIZES["image_proj_dim"], seed=5),
        guidance=torch.tensor([9984.0]),
    )


LATENTS, TIMESTEPS = random(1, 16, 3, 4, 6, seed=6), torch.tensor([613.5])


@torch.no_grad()
def run_ours(transformer: FramePackTransformer, weights: Tensors | None = None) -> Tensor:
    return functional_call(transformer, weights or {}, (LATENTS, TIMESTEPS, inputs()))


@torch.no_grad()
def run_theirs(transformer: HunyuanVideoFramepackTransformer3DModel) -> Tensor:
    given = inputs()
    context = given.context
    return transformer(
        hidden_states=LATENTS,
        timestep=TIMESTEPS,
        encoder_hidden_states=given.text,
        encoder_attention_mask=given.text_mask,
        pooled_projections=given.pooled,
        image_embeds=given.image,
        guidance=given.guidance,
        indices_latents=context.indices[0],
        latents_clean=context.clean.latents,
        indices_latents_clean=context.clean.indices[0],
        latents_history_2x=context.clean_2x.latents,
        indices_latents_history_2x=context.clean_2x.indices[0],
        latents_history_4x=context.clean_4x.latents,
        indices_latents_history_4x=context.clean_4x.indices[0],
        return_dict=False,
    )[0]


def difference(got: Tensor, wanted: Tensor) -> float:
    return float((got.float() - wanted.float()).abs().max() / wanted.abs().max())


def applied(transformer: FramePackTransformer, network: Network) -> Tensor:
    """The output with the network."""
    network.apply_to(transformer)
    output = run_ours(transformer)
    network.remove()
    return output


# ---- PEFT ----

IN_BLOCKS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "proj_mlp"]
IN_BLOCKS += ["proj_out", "net.0.proj", "net.2", "linear"]
EVERYTHING = [*IN_BLOCKS, "proj", "proj_2x", "proj_4x", "proj_in", "linear_1", "linear_2", "up", "down"]
CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=3, target_modules=EVERYTHING),
    "lora with patterns": lambda: peft.LoraConfig(
        r=4,
        lora_alpha=3,
        target_modules=IN_BLOCKS,
        use_rslora=True,
        rank_pattern={"proj_mlp": 7},
        alpha_pattern={r"transformer_blocks\.1\.attn\.to_q": 1},
    ),
    "loha": lambda: peft.LoHaConfig(r=3, alpha=2, target_modules=IN_BLOCKS),
    "lokr": lambda: peft.LoKrConfig(r=3, alpha=2, target_modules=IN_BLOCKS),
    "lokr with both factors decomposed": lambda: peft.LoKrConfig(
        r=2, alpha=3, target_modules=IN_BLOCKS, decompose_both=True
    ),
    "lokr of whole factors": lambda: peft.LoKrConfig(r=64, alpha=64, target_modules=IN_BLOCKS),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_of_peft_does_in_our_transformer_what_it_does_in_diffusers(
    name: str, theirs, ours, tmp_path: Path
) -> None:
    config = CONFIGS[name]()
    theirs.add_adapter(config)
    adapted = [module for module in theirs.modules() if isinstance(module, BaseTunerLayer)]
    for parameter_name, parameter in theirs.named_parameters():
        if "default" in parameter_name:
            nn.init.normal_(parameter, std=0.1 if name.startswith("lora") else 0.3)
    state = peft.get_peft_model_state_dict(theirs, adapter_name="default")
    path = tmp_path / "adapter_model.safetensors"
    save_file({f"base_model.model.{key}": tensor.contiguous() for key, tensor in state.items()}, path)
    config.save_pretrained(tmp_path)
    network = network_for(ours, read_lora(path, flag="--lora"))
    wanted = run_theirs(theirs)
    assert len(network.adapters) == len(adapted) > 30
    assert difference(run_ours(ours), wanted) > 0.05
    assert difference(applied(ours, network), wanted) <= TOLERANCE


# ---- diffusers ----


def convert(source: Path, target: str, *more: str) -> Path:
    output = source.with_name("converted.safetensors")
    assert convert_lora.main(["--input", str(source), "--output", str(output), "--target", target, *more]) == 0
    return output


def trained(transformer: nn.Module, kind: str, alpha: float = 1.0) -> Network:
    module = {"lora": lora_framepack, "loha": loha, "lokr": lokr}[kind]
    network = module.create_network(transformer, dim=4, alpha=alpha, args={"include_patterns": "['.*']"})
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.15 if kind == "lora" else 0.4)
    return network


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_a_trained_network_does_the_same_in_diffusers(kind: str, theirs, ours, tmp_path: Path) -> None:
    network = trained(ours, kind)
    network.save(tmp_path / "着せ替え.safetensors", metadata={})
    theirs.load_lora_adapter(
        str(convert(tmp_path / "着せ替え.safetensors", "other", "--diffusers_prefix", "transformer"))
    )
    wanted = run_theirs(theirs)
    assert difference(run_ours(ours), wanted) > 0.05
    assert difference(applied(ours, network), wanted) <= TOLERANCE


def test_what_diffusers_saved_can_be_trained_on(theirs, ours, tmp_path: Path) -> None:
    """Converted, it is a native file, as `--network_weights` wants it."""
    theirs.add_adapter(peft.LoraConfig(r=4, lora_alpha=3, target_modules=["to_q", "to_add_out", "proj_mlp"]))
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    theirs.save_lora_adapter(tmp_path)
    native = convert(tmp_path / "pytorch_lora_weights.safetensors", "default")
    network, wanted = network_from_tensors(ours, load_file(native), where=str(native)), run_theirs(theirs)
    assert difference(run_ours(ours), wanted) > 0.05
    assert difference(applied(ours, network), wanted) <= TOLERANCE


# ---- float32 on bfloat16 ----


def native_file(network: Network, folder: Path) -> Path:
    network.save(folder / "native.safetensors", metadata={})
    return folder / "native.safetensors"


@torch.no_grad()
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_a_float32_lora_on_a_bfloat16_layer_is_rounded_once(kind: str, ours, tmp_path: Path) -> None:
    lora = read_lora(native_file(trained(ours, kind), tmp_path), flag="--lora")
    layer = ours.bfloat16().get_submodule("transformer_blocks.0.ff.net.0.proj")
    x = random(1, 9, WIDTH, seed=7).bfloat16()
    delta = lora.modules["lora_unet_transformer_blocks_0_ff_net_0_proj"].delta()
    exact = layer(x).float() + x.float() @ delta.T
    network = network_for(ours, lora)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    network.apply_to(ours)
    output = layer(x)
    assert output.dtype == torch.bfloat16
    assert ((output.float() - exact).abs() <= exact.abs() * 2**-8 + 1e-5).all()


def test_a_float32_lora_on_a_bfloat16_transformer_gives_what_float32_gives(ours, tmp_path: Path) -> None:
    lora = read_lora(native_file(trained(ours, "lora", alpha=4.0), tmp_path), flag="--lora")
    exact_base = ours.bfloat16().float()
    exact, base = applied(exact_base, network_for(exact_base, lora)), run_ours(exact_base)
    ours = exact_base.bfloat16()
    rounding = difference(run_ours(ours), base)
    assert difference(base, exact) > 0.3 and 0 < rounding < 0.02
    assert difference(applied(ours, network_for(ours, lora)), exact) < 3 * rounding


# ---- HunyuanVideo ----


def half(stream: str, norm: str, qkv: tuple[str, ...], out: str, mlp: str) -> dict[tuple[str, str], tuple[str, ...]]:
    """The image's or the text's half of the second double block: (original name, ComfyUI's) -> FramePack's modules."""
    block, names = "transformer_blocks.1", f"double_blocks.1.{stream}"
    return {
        (f"{names}_mod.linear", f"{names}_mod.lin"): (f"{block}.{norm}.linear",),
        (f"{names}_attn_qkv", f"{names}_attn.qkv"): tuple(f"{block}.attn.{part}" for part in qkv),
        (f"{names}_attn_proj", f"{names}_attn.proj"): (f"{block}.attn.{out}",),
        (f"{names}_mlp.fc1", f"{names}_mlp.0"): (f"{block}.{mlp}.net.0.proj",),
        (f"{names}_mlp.fc2", f"{names}_mlp.2"): (f"{block}.{mlp}.net.2",),
    }


SINGLE = "single_transformer_blocks.0"
HUNYUAN = {
    **half("img", "norm1", ("to_q", "to_k", "to_v"), "to_out.0", "ff"),
    **half("txt", "norm1_context", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", "ff_context"),
    ("single_blocks.0.linear1", "single_blocks.0.linear1"): (
        *(f"{SINGLE}.attn.to_{letter}" for letter in "qkv"),
        f"{SINGLE}.proj_mlp",
    ),
    ("single_blocks.0.linear2", "single_blocks.0.linear2"): (f"{SINGLE}.proj_out",),
    ("single_blocks.0.modulation.linear", "single_blocks.0.modulation.lin"): (f"{SINGLE}.norm.linear",),
}
SPELLINGS = {
    "original": (0, "{}.lora_A.weight", "{}.lora_B.weight"),
    "original, kohya": (0, "lora_unet_{}.lora_down.weight", "lora_unet_{}.lora_up.weight"),
    "comfyui": (1, "diffusion_model.{}.lora_down.weight", "diffusion_model.{}.lora_up.weight"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_lora_of_hunyuan_video_does_what_its_rows_do(spelling: str, ours, tmp_path: Path) -> None:
    index, down_name, up_name = SPELLINGS[spelling]
    tensors, weights = {}, {}
    for seed, (names, paths) in enumerate(HUNYUAN.items()):
        layers = [ours.get_submodule(path) for path in paths]
        rows = [layer.out_features for layer in layers]
        down, up = random(4, layers[0].in_features, seed=seed) * 0.1, random(sum(rows), 4, seed=100 + seed) * 0.1
        name = names[index].replace(".", "_") if down_name.startswith("lora_unet_") else names[index]
        tensors |= {down_name.format(name): down, up_name.format(name): up}
        for path, layer, part in zip(paths, layers, up.split(rows), strict=True):
            weights[f"{path}.weight"] = layer.weight + part @ down
    save_file(tensors, tmp_path / "hunyuan.safetensors")
    network, wanted = (
        network_for(ours, read_lora(tmp_path / "hunyuan.safetensors", flag="--lora")),
        run_ours(ours, weights),
    )
    assert len(network.adapters) == len(weights) == 20
    assert difference(run_ours(ours), wanted) > 0.05
    assert difference(applied(ours, network), wanted) <= TOLERANCE


# ---- ComfyUI ----


def look_up_as_comfyui_does(state: Tensors, weights: list[str], prefix: str) -> tuple[Tensors, set[str]]:
    """(weight -> difference, keys of `state` that were used).

    A module is known by its weight's name, which begins with `diffusion_model.` there, or behind `lora_unet_` with
    underscores. Its factors have fixed endings; an alpha is divided by the rank, none means a scale of 1.
    """
    deltas, used = {}, set()
    for weight in weights:
        module = weight.removesuffix(".weight")
        known = f"{prefix}{module.replace('.', '_') if prefix == 'lora_unet_' else module}"
        parts = {key.removeprefix(f"{known}."): key for key in state if key.startswith(f"{known}.")}
        pairs = (("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight"))
        for down, up in pairs:
            if {down, up} <= set(parts) <= {down, up, "alpha"}:
                factors = state[parts[up]].flatten(1), state[parts[down]].flatten(1)
                scale = float(state[parts["alpha"]]) / len(factors[1]) if "alpha" in parts else 1.0
                deltas[weight] = factors[0] @ factors[1] * scale
                used |= set(parts.values())
    return deltas, used


@pytest.mark.parametrize("prefix", ["diffusion_model.", "lora_unet_"])
@pytest.mark.parametrize("alpha", [1.0, 3.0])
def test_comfyui_finds_every_key_and_the_same_differences(
    prefix: str, alpha: float, oracle, ours, tmp_path: Path
) -> None:
    network = trained(ours, "lora", alpha)
    file = native_file(network, tmp_path)
    if prefix == "diffusion_model.":
        file = convert(file, "other")
    state = load_file(file)
    deltas, used = look_up_as_comfyui_does(
        state, [name for name in oracle.state_dict() if name.endswith("weight")], prefix
    )
    assert used == set(state) and len(deltas) == len(network.adapters)
    for path, adapter in network.adapters.items():
        wanted = adapter.lora_up.weight @ adapter.lora_down.weight * alpha / 4
        torch.testing.assert_close(deltas[f"{path}.weight"], wanted)
