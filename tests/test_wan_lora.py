"""LoRAs of Wan: ours on our transformer, against PEFT and diffusers on a twin with the same weights, in float32."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import cycle
from pathlib import Path

import peft
import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import convert_lora
import merge_lora
from common.weights import empty_module
from frame_pack.loading import open_transformer as open_framepack
from networks import loha, lokr, lora_framepack, lora_wan
from networks.lora_formats import read_lora
from networks.lora_matching import match
from networks.lora_merge import plan_merge
from networks.network import Network
from networks.prompt_loras import PromptLoras
from networks.rebuild import network_for, network_from_tensors
from networks.targets import adaptable_layers
from networks.wan_names import WAN_NAMES
from options.errors import UserError
from options.lora import LoraChoice, PromptLora
from tests.published import described, published_wan
from tests.training_builders import build_network as framepack_network
from tests.training_builders import build_transformer as build_framepack
from tests.wan_transformers import (
    NUM_BLOCKS,
    build_oracle,
    build_transformer,
    conditioning,
    diffusers_forward,
    diffusers_names,
    noisy,
)
from wan.config import Kind, WanConfig
from wan.loading import load_transformer, open_transformer
from wan.model import WanTransformer

TOLERANCE = 1e-5
TIMESTEPS = torch.tensor([613.5])
IN_BLOCKS = 12
FLAG = "--lora_weight"
MODULES = {"LoRA": lora_wan, "LoHa": loha, "LoKr": lokr}
Tensors = dict[str, Tensor]


@torch.no_grad()
def run_ours(model: WanTransformer) -> Tensor:
    return model(noisy(), TIMESTEPS, conditioning(model.config))


def run_theirs(oracle: WanTransformer3DModel, model: WanTransformer) -> Tensor:
    return diffusers_forward(oracle, noisy(), TIMESTEPS, conditioning(model.config))


def applied(model: WanTransformer, network: Network) -> Tensor:
    network.apply_to(model)
    output = run_ours(model)
    network.remove()
    return output


def difference(got: Tensor, wanted: Tensor) -> float:
    return float((got - wanted).abs().max() / wanted.abs().max())


def trained(model: WanTransformer, kind: str = "LoRA", *, everywhere: bool = False, alpha: float = 1.0) -> Network:
    """As after training. `everywhere`: beyond the blocks."""
    network = MODULES[kind].create_network(model, dim=4, alpha=alpha, args={})
    if everywhere:
        outside = {path: layer for path, layer in adaptable_layers(model).items() if "blocks" not in path}
        shapes = {path: (len(layer.weight), *layer.weight.shape[1:]) for path, layer in outside.items()}
        tensors = network.state_dict()
        for path, (rows, columns, *kernel) in shapes.items():
            name = f"lora_unet_{path.replace('.', '_')}"
            tensors[f"{name}.lora_down.weight"] = torch.zeros(4, columns, *kernel)
            tensors[f"{name}.lora_up.weight"] = torch.zeros(rows, 4, *[1] * len(kernel))
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
        network = network_from_tensors(model, tensors, where="test")
    generator = torch.Generator().manual_seed(7)
    for parameter in network.parameters():
        size = 0.2 if kind == "LoRA" else 0.4
        parameter.data.copy_(size * torch.randn(parameter.shape, generator=generator))
    return network


# ---- which layers ----

COUNTS = {"t2v_14B": 400, "t2v_1.3B": 300, "i2v_14B": 480, "flf2v_14B": 480, "fun_control_1.3B": 360}


@pytest.mark.parametrize("name", COUNTS)
def test_as_many_layers_as_the_facts_say(name: str) -> None:
    config = WanConfig.from_checkpoint(described("--dit", published_wan(name), "BF16"))
    network = lora_wan.create_network(empty_module(lambda: WanTransformer(config)), dim=1, args={})
    assert len(network.paths) == COUNTS[name]
    leaves = {path.split(".", 2)[2] for path in network.paths.values()}
    wanted = {f"{attn}.{x}" for attn in ("self_attn", "cross_attn") for x in "qkvo"} | {"ffn.0", "ffn.2"}
    assert leaves == wanted | (set() if "t2v" in name else {"cross_attn.k_img", "cross_attn.v_img"})


def test_the_table_has_every_module_and_diffusers_name_for_it() -> None:
    """Told from the published shapes and by diffusers' converter."""
    shapes = published_wan("flf2v_14B")
    modules = [name.removesuffix(".weight") for name, shape in shapes.items() if len(shape) > 1 and "weight" in name]
    assert {re.sub(r"(?<=^blocks)\.\d+", ".{}", module) for module in modules} == set(WAN_NAMES.modules)
    theirs = diffusers_names({f"{module}.weight": torch.zeros(1) for module in modules})
    for module in modules:
        their_name = WAN_NAMES.to_diffusers(module)
        assert f"{their_name}.weight" in theirs and WAN_NAMES.from_diffusers(their_name) == module
        assert WAN_NAMES.find(module.replace(".", "_")) == WAN_NAMES.find(their_name.replace(".", "_")) == (module,)
        assert in_diffusers(module) == their_name


def test_networks_are_for_their_own_family() -> None:
    with pytest.raises(UserError, match="got a Wan transformer; expected a FramePack transformer; use networks.lora_w"):
        lora_framepack.create_network(build_transformer(), args={})
    with pytest.raises(UserError, match="got a FramePack transformer; expected a Wan transformer; use networks.lora_f"):
        lora_wan.create_network(build_framepack(), args={})


# ---- applied and merged ----


@pytest.mark.parametrize("kind", MODULES)
def test_a_new_network_changes_nothing_and_a_trained_one_does_what_it_does_merged(kind: str, tmp_path: Path) -> None:
    model = build_transformer()
    base, new = run_ours(model), MODULES[kind].create_network(model, dim=4, args={})
    assert len(new.paths) == NUM_BLOCKS * IN_BLOCKS and torch.equal(applied(model, new), base)
    network = trained(model, kind)
    network.save(tmp_path / "絵柄.safetensors", metadata={"ss_base_model_version": "wan"})
    save_file(model.state_dict(), tmp_path / "dit.safetensors")
    checkpoint = open_transformer(str(tmp_path / "dit.safetensors"))
    merge = plan_merge([LoraChoice(path=str(tmp_path / "絵柄.safetensors"), multiplier=1.0)], checkpoint)
    merged = load_transformer(checkpoint, dtype=torch.float32, device="cpu", merge=merge)
    wanted = applied(model, network)
    assert difference(wanted, base) > 0.05
    assert difference(run_ours(merged), wanted) <= TOLERANCE


def test_a_prompts_lora_comes_and_goes(tmp_path: Path) -> None:
    model = build_transformer()
    save_file(model.state_dict(), tmp_path / "dit.safetensors")
    network, base = trained(model), run_ours(model)
    wanted = applied(model, network)
    network.save(tmp_path / "着物.safetensors", metadata={})
    loras = PromptLoras(open_transformer(str(tmp_path / "dit.safetensors")))
    chosen = [PromptLora(path=str(tmp_path / "着物.safetensors"), multiplier=1.0)]
    loras.check(chosen)
    with loras.on(model, chosen):
        found = run_ours(model)
    assert difference(wanted, base) > 0.05 and difference(found, wanted) <= TOLERANCE
    assert torch.equal(run_ours(model), base)


# ---- formats ----


def respelled(network: Network, spell: Callable[[str], str], *, factors: str, alphas: bool = True) -> Tensors:
    """The network's tensors under other names, by dotted path of their layer."""
    down, up = {"A and B": ("lora_A", "lora_B"), "down and up": ("lora_down", "lora_up")}[factors]
    parts = {"lora_down.weight": f"{down}.weight", "lora_up.weight": f"{up}.weight", "alpha": "alpha"}
    return {
        f"{spell(path)}.{parts[part]}": tensor
        for path, adapter in network.adapters.items()
        for part, tensor in adapter.state_dict().items()
        if alphas or part != "alpha"
    }


def in_diffusers(path: str) -> str:
    """By diffusers' converter."""
    return next(iter(diffusers_names({f"{path}.weight": torch.zeros(1)}))).removesuffix(".weight")


SPELLINGS: dict[str, Callable[[Network], Tensors]] = {
    "native": lambda n: respelled(n, lambda path: f"lora_unet_{path.replace('.', '_')}", factors="down and up"),
    "LyCORIS": lambda n: respelled(n, lambda path: f"lycoris_{path.replace('.', '_')}", factors="down and up"),
    "ComfyUI": lambda n: respelled(n, lambda path: f"diffusion_model.{path}", factors="A and B"),
    "ComfyUI, down and up": lambda n: respelled(n, lambda path: f"diffusion_model.{path}", factors="down and up"),
    "official behind transformer": lambda n: respelled(n, lambda path: f"transformer.{path}", factors="A and B"),
    "no prefix": lambda n: respelled(n, lambda path: path, factors="A and B"),
    "diffusers": lambda n: respelled(
        n, lambda path: f"transformer.{in_diffusers(path)}", factors="A and B", alphas=False
    ),
    "PEFT": lambda n: respelled(
        n, lambda path: f"base_model.model.{in_diffusers(path)}", factors="A and B", alphas=False
    ),
    "diffusers, flat": lambda n: respelled(
        n, lambda path: f"lora_unet_{in_diffusers(path).replace('.', '_')}", factors="down and up"
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_lora_does_the_same_in_every_spelling(name: str, tmp_path: Path) -> None:
    model = build_transformer("flf2v")
    network = trained(model, everywhere=True, alpha=4.0)
    save_file(SPELLINGS[name](network), tmp_path / "綴り.safetensors")
    lora = read_lora(tmp_path / "綴り.safetensors", flag=FLAG)
    found = network_for(model, lora)
    assert lora.table is WAN_NAMES and lora.leftover == ()
    assert len(found.adapters) == len(adaptable_layers(model)) == NUM_BLOCKS * IN_BLOCKS + 9
    assert ("diffusers' names" in lora.format) == (name in ("diffusers", "PEFT", "diffusers, flat"))
    wanted = applied(model, network)
    assert difference(wanted, run_ours(model)) > 0.05
    assert difference(applied(model, found), wanted) <= TOLERANCE


CONFIGS = {
    "lora": lambda: peft.LoraConfig(r=4, lora_alpha=3, target_modules="all-linear"),
    "lora with patterns": lambda: peft.LoraConfig(
        r=4, lora_alpha=3, target_modules=["to_q", "net.2"], rank_pattern={"net.2": 7}, alpha_pattern={"attn2.to_q": 1}
    ),
    "lokr": lambda: peft.LoKrConfig(r=3, alpha=2, target_modules=["to_q", "to_k", "add_k_proj", "proj_out"]),
    "loha": lambda: peft.LoHaConfig(r=3, alpha=2, target_modules=["to_v", "add_v_proj", "time_proj"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_file_of_peft_does_in_our_transformer_what_it_does_in_diffusers(name: str, tmp_path: Path) -> None:
    model, config = build_transformer("i2v"), CONFIGS[name]()
    oracle = build_oracle(model)
    oracle.add_adapter(config)
    for number, (parameter_name, parameter) in enumerate(oracle.named_parameters()):
        if "default" in parameter_name:
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.data = noise * (0.1 if name.startswith("lora") else 0.3)
    state = peft.get_peft_model_state_dict(oracle, adapter_name="default")
    path = tmp_path / "adapter_model.safetensors"
    save_file({f"base_model.model.{key}": tensor.contiguous() for key, tensor in state.items()}, path)
    config.save_pretrained(tmp_path)
    found, wanted = network_for(model, read_lora(path, flag=FLAG)), run_theirs(oracle, model)
    assert len(found.adapters) == sum(isinstance(module, BaseTunerLayer) for module in oracle.modules()) > 3
    assert difference(run_ours(model), wanted) > 0.05
    assert difference(applied(model, found), wanted) <= TOLERANCE


# ---- converted ----


def convert(source: Path, name: str, target: str, *more: str) -> Path:
    output = source.with_name(name)
    assert convert_lora.main(["--input", str(source), "--output", str(output), "--target", target, *more]) == 0
    return output


def load_by_pipelines(oracle: WanTransformer3DModel, file: Path) -> None:
    """As `load_lora_weights` of diffusers' Wan pipelines does."""
    state, metadata = WanLoraLoaderMixin.lora_state_dict(str(file), return_lora_metadata=True)
    oracle.load_lora_adapter(state, metadata=metadata)


def load_by_transformer(oracle: WanTransformer3DModel, file: Path) -> None:
    oracle.load_lora_adapter(str(file), use_safetensors=True)


FOR_DIFFUSERS = {
    "ComfyUI's names": ((), load_by_pipelines),
    "diffusers' names": (("--diffusers_prefix", "transformer"), load_by_pipelines),
    "diffusers' names, without a pipeline": (("--diffusers_prefix", "transformer"), load_by_transformer),
    "native": (None, load_by_pipelines),
}


@pytest.mark.parametrize("alpha", [1.0, 3.0])
@pytest.mark.parametrize("name", FOR_DIFFUSERS)
@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_a_trained_lora_does_the_same_in_diffusers(kind: Kind, name: str, alpha: float, tmp_path: Path) -> None:
    more, load = FOR_DIFFUSERS[name]
    model = build_transformer(kind)
    network, oracle = trained(model, alpha=alpha), build_oracle(model)
    source = tmp_path / "着せ替え.safetensors"
    network.save(source, metadata={})
    load(oracle, source if more is None else convert(source, "other.safetensors", "other", *more))
    adapted = sum(isinstance(module, BaseTunerLayer) for module in oracle.modules())
    assert adapted == len(network.adapters) == NUM_BLOCKS * (IN_BLOCKS if kind == "i2v" else IN_BLOCKS - 2)
    wanted = run_theirs(oracle, model)
    assert difference(run_ours(model), wanted) > 0.05
    assert difference(applied(model, network), wanted) <= TOLERANCE


@pytest.mark.parametrize("load", [load_by_pipelines, load_by_transformer])
def test_scales_that_cannot_be_folded_reach_diffusers_in_the_metadata(load, tmp_path: Path) -> None:
    """Module by module, under diffusers' names."""
    model = build_transformer("i2v")
    tensors, numbers = {}, zip(cycle((4, 6, 3, 8)), cycle((0.3, 8.0, 5.0)), strict=False)
    for (path, layer), (rank, alpha) in zip(trained(model).paths.items(), numbers, strict=False):
        rows, columns = model.get_submodule(layer).weight.shape
        generator = torch.Generator().manual_seed(len(tensors))
        tensors[f"{path}.lora_down.weight"] = 0.1 * torch.randn(rank, columns, generator=generator)
        tensors[f"{path}.lora_up.weight"] = 0.1 * torch.randn(rows, rank, generator=generator)
        tensors[f"{path}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "混.safetensors")
    network, oracle = network_from_tensors(model, tensors, where="test"), build_oracle(model)
    load(oracle, convert(tmp_path / "混.safetensors", "b.safetensors", "other", "--diffusers_prefix", "transformer"))
    wanted = run_theirs(oracle, model)
    assert difference(run_ours(model), wanted) > 0.05
    assert difference(applied(model, network), wanted) <= TOLERANCE


@pytest.mark.parametrize("kind", ["LoRA", "LoKr"])
def test_layers_outside_the_blocks_and_lokr_reach_diffusers_too(kind: str, tmp_path: Path) -> None:
    model = build_transformer("flf2v")
    network, oracle = trained(model, kind, everywhere=kind == "LoRA", alpha=2.0), build_oracle(model)
    network.save(tmp_path / "a.safetensors", metadata={})
    other = convert(tmp_path / "a.safetensors", "b.safetensors", "other", "--diffusers_prefix", "transformer")
    load_by_transformer(oracle, other)
    wanted = run_theirs(oracle, model)
    assert difference(run_ours(model), wanted) > 0.05
    assert difference(applied(model, network), wanted) <= TOLERANCE


@pytest.mark.parametrize("prefix", ["diffusion_model", "transformer", ""])
@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_lora_comes_back_byte_for_byte(prefix: str, kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    network = trained(build_transformer(), kind, alpha=3.0 if kind == "LoRA" else 2.0)
    source = tmp_path / "元.safetensors"
    network.save(source, metadata={"ss_base_model_version": "wan"}, dtype=dtype)
    other = convert(source, "other.safetensors", "other", "--diffusers_prefix", prefix)
    assert not any(key.startswith("lora_unet_") for key in load_file(other))
    assert convert(other, "back.safetensors", "default").read_bytes() == source.read_bytes()


def test_what_diffusers_saved_can_be_trained_on(tmp_path: Path) -> None:
    model = build_transformer()
    oracle = build_oracle(model)
    oracle.add_adapter(peft.LoraConfig(r=4, lora_alpha=3, target_modules=["to_q", "add_v_proj", "net.0.proj"]))
    for number, (name, parameter) in enumerate(oracle.named_parameters()):
        if "lora_" in name:
            parameter.data = 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
    oracle.save_lora_adapter(tmp_path)
    native = convert(tmp_path / "pytorch_lora_weights.safetensors", "native.safetensors", "default")
    network, wanted = network_from_tensors(model, load_file(native), where=str(native)), run_theirs(oracle, model)
    assert difference(run_ours(model), wanted) > 0.05
    assert difference(applied(model, network), wanted) <= TOLERANCE


# ---- merge_lora.py ----

LAYOUTS: dict[str, Callable[[Tensors], Tensors]] = {
    "official": dict,
    "ComfyUI's": lambda tensors: {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()},
    "diffusers'": diffusers_names,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_merged_into_a_model_of_any_layout(layout: str, tmp_path: Path) -> None:
    model = build_transformer()
    network = trained(model, everywhere=True)
    stored = LAYOUTS[layout](model.state_dict())
    folder = tmp_path / "模型" / ("transformer" if layout == "diffusers'" else "")
    folder.mkdir(parents=True)
    save_file(stored, folder / "dit.safetensors")
    network.save(tmp_path / "絵.safetensors", metadata={})
    output = tmp_path / "合.safetensors"
    command = ["--dit", str(tmp_path / "模型"), "--lora_weight", str(tmp_path / "絵.safetensors")]
    assert merge_lora.main([*command, "--save_merged_model", str(output)]) == 0
    assert load_file(output).keys() == stored.keys()
    merged = load_transformer(open_transformer(str(output)), dtype=torch.float32, device="cpu")
    assert difference(run_ours(merged), applied(model, network)) <= TOLERANCE


def test_two_loras_in_two_spellings_become_one(tmp_path: Path) -> None:
    model = build_transformer()
    network, base = trained(model), run_ours(model)
    save_file(SPELLINGS["native"](network), tmp_path / "a.safetensors")
    save_file(SPELLINGS["diffusers"](trained(model, alpha=4.0)), tmp_path / "b.safetensors")
    files = [str(tmp_path / name) for name in ("a.safetensors", "b.safetensors")]
    output = tmp_path / "both.safetensors"
    assert merge_lora.main(["--lora_weight", *files, "--save_merged_lora", str(output)]) == 0
    network.multiplier = 1 + 4  # the second one is the same at four times the scale
    assert difference(applied(model, network_for(model, read_lora(output, flag=FLAG))), applied(model, network)) < 1e-4
    assert difference(applied(model, network), base) > 0.05


# ---- what does not belong together ----


def shapes_of(layers: Iterable[tuple[str, nn.Module]]) -> dict[str, tuple[int, ...]]:
    return {f"{path}.weight": tuple(layer.weight.shape) for path, layer in layers}


def test_loras_of_the_other_family_are_refused_by_name(tmp_path: Path) -> None:
    wan, framepack = build_transformer(), build_framepack()
    trained(wan).save(tmp_path / "wan.safetensors", metadata={})
    framepack_network(framepack).save(tmp_path / "fp.safetensors", metadata={})
    for name, model, reason in (
        ("wan", framepack, r"got 36 Wan modules, lora_unet_blocks_0_\S+ first; expected modules that the model"),
        ("fp", wan, r"got \d+ FramePack modules, lora_unet_\w*transformer_blocks_0_\S+ first; expected modules"),
    ):
        lora = read_lora(tmp_path / f"{name}.safetensors", flag=FLAG)
        with pytest.raises(UserError, match=reason) as caught:
            match(lora, shapes_of(adaptable_layers(model).items()))
        assert str(caught.value).endswith("LoRAs only work with the model that they were trained on")


def test_a_wan_lora_for_framepack_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    trained(build_transformer()).save(tmp_path / "wan.safetensors", metadata={})
    save_file(build_framepack().state_dict(), tmp_path / "dit.safetensors")
    checkpoint = open_framepack(str(tmp_path / "dit.safetensors"))
    with pytest.raises(UserError, match="36 Wan modules"):
        plan_merge([LoraChoice(path=str(tmp_path / "wan.safetensors"), multiplier=1.0)], checkpoint)


def test_a_lora_for_pictures_leaves_out_what_a_model_for_text_does_not_have(tmp_path: Path) -> None:
    """And says so; the other way round there is nothing to say."""
    trained(build_transformer("i2v")).save(tmp_path / "i2v.safetensors", metadata={})
    lora = read_lora(tmp_path / "i2v.safetensors", flag=FLAG)
    matched = match(lora, shapes_of(adaptable_layers(build_transformer("t2v")).items()))
    assert len(matched.factors) == NUM_BLOCKS * (IN_BLOCKS - 2) and len(matched.unmatched) == NUM_BLOCKS * 2
    assert "30 of 36 lora modules" in matched.summary() and "cross_attn.k_img" in matched.summary()
