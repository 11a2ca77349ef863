"""One LoRA in every spelling: the same modules, the same weight differences; and files that are refused."""

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import peft
import pytest
import torch
from diffusers import HunyuanVideoFramepackPipeline, HunyuanVideoFramepackTransformer3DModel
from diffusers.loaders.lora_conversion_utils import _convert_hunyuan_video_lora_to_diffusers
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from networks import lora_formats
from networks.framepack_names import FRAMEPACK_NAMES
from networks.lora_formats import LoraFile, read_lora
from networks.module_names import NameTable
from options.errors import UserError
from tests.diffusers_builders import build_small, small_shapes

FLAG = "--lora_weight"
WIDTH, MLP, RANK = 32, 128, 4
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def shapes() -> dict[str, tuple[int, ...]]:
    return small_shapes()


def lora_factors(shape: tuple[int, ...]) -> Tensors:
    kernel = shape[2:]
    down, up = torch.randn(RANK, *shape[1:]), torch.randn(shape[0], RANK, *[1] * len(kernel))
    return {"lora_down.weight": down, "lora_up.weight": up}


def loha_factors(shape: tuple[int, ...]) -> Tensors:
    left = {f"hada_w{i}_a": torch.randn(shape[0], RANK) for i in (1, 2)}
    return left | {f"hada_w{i}_b": torch.randn(RANK, shape[1]) for i in (1, 2)}


def lokr_factors(shape: tuple[int, ...]) -> Tensors:
    second = {"lokr_w2_a": torch.randn(shape[0] // 4, 2), "lokr_w2_b": torch.randn(2, shape[1] // 4)}
    return {"lokr_w1": torch.randn(4, 4)} | second


def by_hand(factors: Mapping[str, Tensor], alpha: float | None = None) -> Tensor:
    """The formulas of LoRA, LoHa and LoKr."""
    if "lora_down.weight" in factors:
        down, up = factors["lora_down.weight"], factors["lora_up.weight"]
        product = (up.flatten(1) @ down.flatten(1)).reshape(len(up), *down.shape[1:])
        return product * (alpha or len(down)) / len(down)
    if "hada_w1_a" in factors:
        first, second = (factors[f"hada_w{i}_a"] @ factors[f"hada_w{i}_b"] for i in (1, 2))
        return first * second * (alpha or RANK) / RANK
    second = factors["lokr_w2_a"] @ factors["lokr_w2_b"]
    return torch.kron(factors["lokr_w1"], second) * (alpha or 2) / 2


def write(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path, metadata)
    return path


def flat(name: str) -> str:
    return name.replace(".", "_")


def assert_deltas(lora: LoraFile, expected: Mapping[str, Tensor]) -> None:
    assert {lora.dotted[name] for name in lora.modules} == set(expected)
    for name, factors in lora.modules.items():
        assert name == "lora_unet_" + flat(lora.dotted[name])
        torch.testing.assert_close(factors.delta(), expected[lora.dotted[name]], rtol=1e-5, atol=1e-5)


# ---- one LoRA in all spellings ----

LORA_SPELLINGS: dict[str, tuple[Callable[[str], str], str, str, bool]] = {
    "native": (lambda m: f"lora_unet_{flat(m)}", "lora_down.weight", "lora_up.weight", True),
    "native without alpha": (lambda m: f"lora_unet_{flat(m)}", "lora_down.weight", "lora_up.weight", False),
    "lycoris": (lambda m: f"lycoris_{flat(m)}", "lora_down.weight", "lora_up.weight", True),
    "flat transformer": (lambda m: f"lora_transformer_{flat(m)}", "lora_down.weight", "lora_up.weight", True),
    "diffusers": (lambda m: f"transformer.{m}", "lora_A.weight", "lora_B.weight", False),
    "diffusers with alpha": (lambda m: f"transformer.{m}", "lora_A.weight", "lora_B.weight", True),
    "older diffusers": (lambda m: f"transformer.{m}", "lora.down.weight", "lora.up.weight", True),
    "adapter's name": (lambda m: f"transformer.{m}", "lora_A.default.weight", "lora_B.default.weight", False),
    "another adapter's name": (lambda m: f"transformer.{m}", "lora_A.my_style.weight", "lora_B.my_style.weight", True),
    "comfyui": (lambda m: f"diffusion_model.{m}", "lora_down.weight", "lora_up.weight", True),
    "diffusion-pipe": (lambda m: f"diffusion_model.{m}", "lora_A.weight", "lora_B.weight", False),
    "comfyui checkpoint": (lambda m: f"model.diffusion_model.{m}", "lora_A.weight", "lora_B.weight", True),
    "peft": (lambda m: f"base_model.model.{m}", "lora_A.weight", "lora_B.weight", False),
    "peft around a pipeline": (lambda m: f"base_model.model.transformer.{m}", "lora_A.weight", "lora_B.weight", False),
    "unet": (lambda m: f"unet.{m}", "lora_A.weight", "lora_B.weight", False),
    "no prefix": (lambda m: m, "lora_A.weight", "lora_B.weight", False),
    "no weight": (lambda m: f"diffusion_model.{m}", "lora_A", "lora_B", True),
    "underscore": (lambda m: f"transformer.{m}", "_lora.down.weight", "_lora.up.weight", False),
    "every underscore a dot": (
        lambda m: f"diffusion_model.{m.replace('_', '.')}",
        "lora_A.weight",
        "lora_B.weight",
        False,
    ),
}


@pytest.mark.parametrize("spelling", LORA_SPELLINGS)
def test_a_lora_is_the_same_in_every_spelling(spelling: str, shapes: dict, tmp_path: Path) -> None:
    name_of, down, up, has_alpha = LORA_SPELLINGS[spelling]
    tensors, expected = {}, {}
    for module, shape in shapes.items():
        factors = lora_factors(shape)
        dot = "" if down.startswith("_") else "."
        tensors[f"{name_of(module)}{dot}{down}"] = factors["lora_down.weight"]
        tensors[f"{name_of(module)}{dot}{up}"] = factors["lora_up.weight"]
        if has_alpha:
            tensors[f"{name_of(module)}.alpha"] = torch.tensor(3.0)
        expected[module] = by_hand(factors, 3 if has_alpha else None)
    lora = read_lora(write(tmp_path / "和風.safetensors", tensors), flag=FLAG)
    assert_deltas(lora, expected)
    assert lora.kind == "lora" and lora.leftover == ()


@pytest.mark.parametrize("prefix", ["lora_unet_", "lycoris_", "transformer.", "diffusion_model.", "base_model.model."])
@pytest.mark.parametrize("make", [loha_factors, lokr_factors])
@pytest.mark.parametrize("alpha", [None, 1.5])
def test_loha_and_lokr_are_the_same_in_every_spelling(prefix, make, alpha, shapes: dict, tmp_path: Path) -> None:
    tensors, expected = {}, {}
    for module in ("transformer_blocks.1.ff.net.0.proj", "single_transformer_blocks.0.proj_mlp"):
        factors = make(shapes[module])
        name = prefix + (module if prefix.endswith(".") else flat(module))
        tensors |= {f"{name}.{part}": tensor for part, tensor in factors.items()}
        if alpha:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
        expected[module] = by_hand(factors, alpha)
    lora = read_lora(write(tmp_path / "lora.safetensors", tensors), flag=FLAG)
    assert_deltas(lora, expected)
    assert lora.kind == make.__name__.removesuffix("_factors")


def test_the_format_is_told_from_all_keys(tmp_path: Path) -> None:
    """A text encoder, an unknown module and a stray alpha stand first in the file, and the kinds are mixed."""
    lora, lokr = lora_factors((32, 32)), lokr_factors((32, 32))
    tensors = {
        "a_stray.alpha": torch.tensor(1.0),
        "diffusion_model.an_unknown_module.lora_A.weight": torch.ones(4, 4),
        "diffusion_model.an_unknown_module.lora_B.weight": torch.ones(4, 4),
        "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": torch.ones(4, 4),
        **{f"lora_unet_single_transformer_blocks_0_attn_to_q.{part}": tensor for part, tensor in lora.items()},
        **{f"transformer.transformer_blocks.0.attn.to_out.0.{part}": tensor for part, tensor in lokr.items()},
    }
    file = read_lora(write(tmp_path / "lora.safetensors", tensors), flag=FLAG)
    expected = {"single_transformer_blocks.0.attn.to_q": lora, "transformer_blocks.0.attn.to_out.0": lokr}
    assert_deltas(file, {name: by_hand(factors) for name, factors in expected.items()})
    assert file.kind == "lokr+lora"
    assert set(file.leftover) == {key for key in tensors if key.startswith(("a_stray", "diffusion_model", "lora_te1"))}
    assert "native" in file.format and "diffusers" in file.format


def test_a_pickle_reads_like_a_safetensors_file(tmp_path: Path) -> None:
    factors = lora_factors((32, 32))
    path = tmp_path / "lora.pt"
    torch.save({f"lora_unet_proj_out.{part}": tensor for part, tensor in factors.items()}, path)
    assert_deltas(read_lora(path, flag=FLAG), {"proj_out": by_hand(factors)})


def test_a_lora_does_not_hold_on_to_its_file(tmp_path: Path) -> None:
    """On Windows a mapped file can be neither replaced nor removed."""
    factors = lora_factors((32, 32))
    path = write(tmp_path / "lora.safetensors", {f"lora_unet_proj_out.{part}": t for part, t in factors.items()})
    lora = read_lora(path, flag=FLAG)
    with path.open("r+b") as stream:
        stream.write(bytes(path.stat().st_size))
    assert_deltas(lora, {"proj_out": by_hand(factors)})


def test_another_architecture_is_another_table(tmp_path: Path, monkeypatch) -> None:
    """The one that knows most of the names is taken, whichever stands first."""
    other = NameTable(
        architecture="Other",
        takes=("Other",),
        modules=("proj_out", "layers.{}.q_k.o"),
        aliases={"stack.{}": ("proj_out",)},
        aliases_of="Another's",
    )
    monkeypatch.setattr(lora_formats, "TABLES", (other, FRAMEPACK_NAMES))
    theirs = pair("diffusion_model.layers.3.q_k.o") | pair("diffusion_model.layers.4.q_k.o")
    both = pair("diffusion_model.proj_out")
    for tensors, name in ((theirs | both, "Other"), (GOOD | pair("lora_unet_norm_out_linear") | both, "FramePack")):
        lora = read_lora(write(tmp_path / f"{name}.safetensors", tensors), flag=FLAG)
        assert lora.table.architecture == name
        assert len(lora.modules) == 3 and lora.leftover == ()
    assert "lora_unet_layers_3_q_k_o" in read_lora(tmp_path / "Other.safetensors", flag=FLAG).modules


def test_shapes_are_read_without_content_and_are_the_same(tmp_path: Path) -> None:
    tensors = {f"double_blocks.0.img_attn_qkv.{part}": t for part, t in lora_factors((96, 32)).items()}
    path = write(tmp_path / "lora.safetensors", tensors)
    headers, whole = (read_lora(path, flag=FLAG, shapes_only=only) for only in (True, False))
    assert all(f.tensors["lora_up.weight"].is_meta for f in headers.modules.values())
    assert [f.delta_shape for f in headers.modules.values()] == [f.delta_shape for f in whole.modules.values()]


# ---- what PEFT and diffusers write themselves ----


def adapted(config: peft.PeftConfig) -> HunyuanVideoFramepackTransformer3DModel:
    transformer = build_small()
    transformer.add_adapter(config)
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            parameter.data.normal_()
    return transformer


def deltas_of(transformer: nn.Module) -> Tensors:
    modules = {name: m for name, m in transformer.named_modules() if isinstance(m, BaseTunerLayer)}
    return {name: module.get_delta_weight("default").detach() for name, module in modules.items()}


ALPHAS = {
    "one alpha": {"lora_alpha": 7},
    "rank-stabilised": {"lora_alpha": 2, "use_rslora": True},
    "patterns": {
        "lora_alpha": 7,
        "rank_pattern": {"transformer_blocks.1.attn.to_q": 3},
        "alpha_pattern": {"single_transformer_blocks.0.attn.to_k": 5, "^transformer_blocks.0.attn.to_v": 2},
    },
}


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("writer", ["pipeline", "transformer", "peft"])
def test_files_of_diffusers_and_peft_keep_their_strength(alpha: str, writer: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(r=RANK, target_modules=["to_q", "to_k", "to_v", "proj_mlp"], **ALPHAS[alpha])
    transformer = adapted(config)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    if writer == "pipeline":
        settings = {k: list(v) if isinstance(v, set) else v for k, v in config.to_dict().items() if k != "peft_type"}
        HunyuanVideoFramepackPipeline.save_lora_weights(
            tmp_path,
            transformer_lora_layers=peft.get_peft_model_state_dict(transformer, adapter_name="default"),
            transformer_lora_adapter_metadata=settings,
        )
    elif writer == "transformer":
        transformer.save_lora_adapter(tmp_path)
    else:
        path = tmp_path / "adapter_model.safetensors"
        state = peft.get_peft_model_state_dict(transformer, adapter_name="default")
        write(path, {f"base_model.model.{key}": tensor for key, tensor in state.items()})
        config.save_pretrained(tmp_path)
    expected = deltas_of(transformer)
    assert len(expected) == 17
    assert_deltas(read_lora(path, flag=FLAG), expected)


def test_a_configuration_belongs_to_pefts_own_file_only(tmp_path: Path) -> None:
    peft.LoraConfig(r=RANK, lora_alpha=40).save_pretrained(tmp_path)
    factors = lora_factors((32, 32))
    tensors = {f"transformer.proj_out.{part}": tensor for part, tensor in factors.items()}
    assert_deltas(read_lora(write(tmp_path / "other.safetensors", tensors), flag=FLAG), {"proj_out": by_hand(factors)})


def test_an_alpha_in_the_file_comes_before_the_configuration(tmp_path: Path) -> None:
    factors = lora_factors((32, 32))
    tensors = {f"transformer.proj_out.{part}": tensor for part, tensor in factors.items()}
    tensors["transformer.proj_out.alpha"] = torch.tensor(2.0)
    metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 100})}
    lora = read_lora(write(tmp_path / "lora.safetensors", tensors, metadata), flag=FLAG)
    assert_deltas(lora, {"proj_out": by_hand(factors, 2)})


# ---- HunyuanVideo ----

QKV = tuple((name, WIDTH * i, WIDTH * (i + 1)) for i, name in enumerate("qkv"))
IMAGE_QKV = {f"transformer_blocks.0.attn.to_{name}": rows for name, *rows in QKV}
TEXT_QKV = {f"transformer_blocks.0.attn.add_{name}_proj": rows for name, *rows in QKV}
SINGLE_QKV = {f"single_transformer_blocks.1.attn.to_{name}": rows for name, *rows in QKV}
DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.1"
HUNYUAN = {
    ("double_blocks.0.img_mod.linear", "double_blocks.0.img_mod.lin"): {f"{DOUBLE}.norm1.linear": (0, 6 * WIDTH)},
    ("double_blocks.0.img_attn_qkv", "double_blocks.0.img_attn.qkv"): IMAGE_QKV,
    ("double_blocks.0.img_attn_proj", "double_blocks.0.img_attn.proj"): {f"{DOUBLE}.attn.to_out.0": (0, WIDTH)},
    ("double_blocks.0.img_mlp.fc1", "double_blocks.0.img_mlp.0"): {f"{DOUBLE}.ff.net.0.proj": (0, MLP)},
    ("double_blocks.0.img_mlp.fc2", "double_blocks.0.img_mlp.2"): {f"{DOUBLE}.ff.net.2": (0, WIDTH)},
    ("double_blocks.0.txt_mod.linear", "double_blocks.0.txt_mod.lin"): {f"{DOUBLE}.norm1_context.linear": (0, 192)},
    ("double_blocks.0.txt_attn_qkv", "double_blocks.0.txt_attn.qkv"): TEXT_QKV,
    ("double_blocks.0.txt_attn_proj", "double_blocks.0.txt_attn.proj"): {f"{DOUBLE}.attn.to_add_out": (0, WIDTH)},
    ("double_blocks.0.txt_mlp.fc1", "double_blocks.0.txt_mlp.0"): {f"{DOUBLE}.ff_context.net.0.proj": (0, MLP)},
    ("double_blocks.0.txt_mlp.fc2", "double_blocks.0.txt_mlp.2"): {f"{DOUBLE}.ff_context.net.2": (0, WIDTH)},
    ("single_blocks.1.linear1", "single_blocks.1.linear1"): SINGLE_QKV
    | {f"{SINGLE}.proj_mlp": (3 * WIDTH, 3 * WIDTH + MLP)},
    ("single_blocks.1.linear2", "single_blocks.1.linear2"): {f"{SINGLE}.proj_out": (0, WIDTH)},
    ("single_blocks.1.modulation.linear", "single_blocks.1.modulation.lin"): {f"{SINGLE}.norm.linear": (0, 3 * WIDTH)},
}
"""(original spelling, ComfyUI's) -> FramePack's modules with their rows."""
WIDE_INPUT = {"fc2": MLP, "mlp.2": MLP, "linear2": WIDTH + MLP}


@pytest.mark.parametrize("make", [lora_factors, loha_factors, lokr_factors])
@pytest.mark.parametrize("style", ["original", "comfyui"])
@pytest.mark.parametrize("prefix", ["", "transformer.", "diffusion_model.", "lora_unet_"])
def test_hunyuan_video_is_split_as_by_hand(make, style: str, prefix: str, shapes: dict, tmp_path: Path) -> None:
    tensors, expected = {}, {}
    for names, rows in HUNYUAN.items():
        name = names[style == "comfyui"]
        width = next((size for ending, size in WIDE_INPUT.items() if name.endswith(ending)), WIDTH)
        factors = make((max(stop for _, stop in rows.values()), width))
        written = prefix + (name if prefix.endswith(".") or not prefix else flat(name))
        tensors |= {f"{written}.{part}": tensor for part, tensor in factors.items()}
        tensors[f"{written}.alpha"] = torch.tensor(1.5)
        delta = by_hand(factors, 1.5)
        expected |= {module: delta[start:stop] for module, (start, stop) in rows.items()}
    lora = read_lora(write(tmp_path / "hunyuan.safetensors", tensors), flag=FLAG)
    assert {name: tuple(delta.shape) for name, delta in expected.items()} == {n: shapes[n] for n in expected}
    assert_deltas(lora, expected)
    assert "HunyuanVideo" in lora.format


EMBEDDERS = ("time_in.mlp", "guidance_in.mlp", "txt_in.t_embedder.mlp")
REFINER = "txt_in.individual_token_refiner.blocks.1"
ORIGINAL = (
    *(name.replace("blocks.0", "blocks.1") for name, _ in HUNYUAN),
    *(f"{embedder}.{number}" for embedder in EMBEDDERS for number in (0, 2)),
    *("vector_in.in_layer", "vector_in.out_layer", "txt_in.c_embedder.linear_1", "txt_in.c_embedder.linear_2"),
    *(f"{REFINER}.{name}" for name in ("self_attn_proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1")),
    *("txt_in.input_embedder", "img_in.proj", "final_layer.linear"),
)
"""All modules in HunyuanVideo's own names, but the refiner's query, key and value, which diffusers cuts wrongly."""


def test_hunyuan_videos_names_mean_what_diffusers_takes_them_for(tmp_path: Path) -> None:
    """All modules of the original layout; diffusers' converter has the published width built in."""
    width, mlp = 3072, 12288
    rows = {"qkv": 3 * width, "linear1": 3 * width + mlp, "fc1": mlp}
    tensors = {}
    for name in ORIGINAL:
        size = next((size for part, size in rows.items() if name.endswith(part)), width)
        tensors[f"{name}.lora_A.weight"] = torch.randn(1, width)
        tensors[f"{name}.lora_B.weight"] = torch.randn(size, 1)
    theirs = _convert_hunyuan_video_lora_to_diffusers(dict(tensors))
    names = {key.removeprefix("transformer.").rpartition(".lora_")[0] for key in theirs}
    lora = read_lora(write(tmp_path / "hunyuan.safetensors", tensors), flag=FLAG)
    assert len(names) == 28 + 9 and set(lora.dotted.values()) == names
    for native, factors in lora.modules.items():
        for ours, letter in (("lora_down.weight", "A"), ("lora_up.weight", "B")):
            assert torch.equal(factors.tensors[ours], theirs[f"transformer.{lora.dotted[native]}.lora_{letter}.weight"])


def test_rows_of_a_lokr_that_are_no_kronecker_product_are_cut_from_the_delta(tmp_path: Path) -> None:
    factors = {"lokr_w1": torch.randn(7, 4), "lokr_w2": torch.randn(32, 8)}
    tensors = {f"lora_unet_single_blocks_0_linear1.{part}": tensor for part, tensor in factors.items()}
    lora = read_lora(write(tmp_path / "lora.safetensors", tensors), flag=FLAG)
    delta = torch.kron(factors["lokr_w1"], factors["lokr_w2"])
    sizes = {"attn_to_q": (0, 32), "attn_to_k": (32, 64), "attn_to_v": (64, 96), "proj_mlp": (96, 224)}
    for part, (start, stop) in sizes.items():
        torch.testing.assert_close(
            lora.modules[f"lora_unet_single_transformer_blocks_0_{part}"].delta(), delta[start:stop]
        )
    odd = {"lokr_w1": torch.randn(4, 4), "lokr_w2": torch.randn(56, 8)}
    tensors = {f"lora_unet_single_blocks_0_linear1.{part}": tensor for part, tensor in odd.items()}
    lora = read_lora(write(tmp_path / "odd.safetensors", tensors), flag=FLAG)
    delta = torch.kron(odd["lokr_w1"], odd["lokr_w2"])
    torch.testing.assert_close(lora.modules["lora_unet_single_transformer_blocks_0_proj_mlp"].delta(), delta[96:])
    assert lora.modules["lora_unet_single_transformer_blocks_0_proj_mlp"].rows == (96, 224)


# ---- names ----


def test_the_table_knows_every_module_of_the_model() -> None:
    with torch.device("meta"):
        state = HunyuanVideoFramepackTransformer3DModel(
            num_layers=1, num_single_layers=1, num_refiner_layers=1, has_image_proj=True, has_clean_x_embedder=True
        ).state_dict()
    published = {
        re.sub(r"blocks\.0\.", "blocks.{}.", name.removesuffix(".weight"))
        for name, tensor in state.items()
        if name.endswith(".weight") and tensor.ndim > 1
    }
    assert set(FRAMEPACK_NAMES.modules) == published


def test_every_flat_name_means_one_module() -> None:
    names = [*FRAMEPACK_NAMES.modules, *FRAMEPACK_NAMES.aliases]
    assert len({flat(name) for name in names}) == len(names)
    for name in FRAMEPACK_NAMES.modules:
        assert FRAMEPACK_NAMES.find(flat(name).replace("{}", "17")) == (name.replace("{}", "17"),)
    assert all(module in FRAMEPACK_NAMES.modules for parts in FRAMEPACK_NAMES.aliases.values() for module in parts)


# ---- refused ----


def pair(module: str, rank: int = 4) -> Tensors:
    return {f"{module}.lora_down.weight": torch.ones(4, 8), f"{module}.lora_up.weight": torch.ones(8, rank)}


GOOD = pair("lora_unet_transformer_blocks_0_attn_to_q")
OTHERS = {
    "sdxl": (pair("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"), "Stable Diffusion"),
    "sdxl in diffusers": (pair("unet.up_blocks.1.attentions.0.proj_in"), "Stable Diffusion"),
    "ltx": (pair("transformer.transformer_blocks.0.attn1.to_q"), "LTX"),
    "qwen": (pair("transformer.transformer_blocks.0.img_mlp.net.0.proj"), "Qwen"),
    "nothing known": (pair("lora_unet_something_else"), "no module known here"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_architecture_is_named_with_its_first_key(name: str, tmp_path: Path) -> None:
    tensors, family = OTHERS[name]
    path = write(tmp_path / "lora.safetensors", tensors)
    with pytest.raises(UserError, match=f"{family}.*; expected a LoRA of FramePack or HunyuanVideo or Wan") as error:
        read_lora(path, flag=FLAG)
    assert next(iter(tensors)).rpartition(".lora_")[0] in str(error.value)


def blocks(double: int, single: int) -> Tensors:
    doubles = [pair(f"transformer.transformer_blocks.{i}.attn.to_q") for i in range(double)]
    singles = [pair(f"transformer.single_transformer_blocks.{i}.attn.to_q") for i in range(single)]
    return {key: tensor for tensors in doubles + singles for key, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("tensors", "metadata", "family"),
    [
        (blocks(19, 38), {}, "Flux"),
        (blocks(60, 0), {}, "Qwen"),
        (blocks(2, 2), {"modelspec.architecture": "flux-1-dev/lora"}, "Flux"),
        (pair("lora_unet_double_blocks_0_img_attn_proj"), {"ss_base_model_version": "flux1"}, "Flux"),
        (blocks(20, 0), {"ss_base_model_version": "qwen_image"}, "Qwen"),
    ],
)
def test_twins_with_the_same_names_are_told_apart(tensors, metadata, family: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"a LoRA of {family}.*, .*; expected a LoRA of FramePack"):
        read_lora(write(tmp_path / "lora.safetensors", tensors, metadata), flag=FLAG)


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        (blocks(20, 40), {}),
        (blocks(19, 0), {}),
        (blocks(19, 38), {"modelspec.architecture": "framepack/lora"}),
        (blocks(19, 38), {"ss_base_model_version": "hunyuan_video"}),
    ],
)
def test_our_own_are_no_twins(tensors, metadata, tmp_path: Path) -> None:
    lora = read_lora(write(tmp_path / "lora.safetensors", tensors, metadata), flag=FLAG)
    assert len(lora.modules) == len(tensors) / 2


BROKEN = {
    "no up": ({**GOOD, "transformer.proj_out.lora_A.weight": torch.ones(4, 8)}, "proj_out.lora_A.weight without"),
    "ranks": (GOOD | pair("lora_unet_proj_out", rank=3), "lora_unet_proj_out.lora_up.weight of rank 3"),
    "dora": ({**GOOD, "lora_unet_transformer_blocks_0_attn_to_q.dora_scale": torch.ones(8, 1)}, "dora_scale: DoRA"),
    "dora of peft": ({**GOOD, "transformer.proj_out.lora_magnitude_vector": torch.ones(8)}, "magnitude_vector: DoRA"),
    "tucker": ({**GOOD, "lora_unet_proj_out.lora_mid.weight": torch.ones(4, 4, 3, 3)}, "lora_mid.weight: a Tucker"),
    "bias": ({**GOOD, "transformer.proj_out.lora_B.bias": torch.ones(8)}, "lora_B.bias: a bias"),
    "weight": ({**GOOD, "diffusion_model.proj_out.set_weight": torch.ones(8)}, "proj_out.set_weight: a whole weight"),
    "norm": ({**GOOD, "lora_unet_norm_out.w_norm": torch.ones(8)}, "norm_out.w_norm: a whole weight"),
    "shape": (
        {**GOOD, "diffusion_model.proj_out.reshape_weight": torch.tensor([8, 9])},
        "reshape_weight: a weight of another shape",
    ),
    "rank 0": (
        {**GOOD, "lora_unet_proj_out.lora_down.weight": torch.ones(0, 8)}
        | {"lora_unet_proj_out.lora_up.weight": torch.ones(8, 0)},
        "lora_unet_proj_out.lora_down.weight of shape (0, 8)",
    ),
    "whole numbers": (
        {**GOOD, "lora_unet_transformer_blocks_0_attn_to_q.lora_up.weight": torch.ones(8, 4, dtype=torch.int8)},
        "attn_to_q.lora_up.weight of type int8; expected floating-point numbers",
    ),
    "alpha of yes": (
        {**GOOD, "lora_unet_transformer_blocks_0_attn_to_q.alpha": torch.tensor(True)},
        "attn_to_q.alpha of type bool",
    ),
    "alpha": ({**GOOD, "lora_unet_transformer_blocks_0_attn_to_q.alpha": torch.ones(4)}, "attn_to_q.alpha of shape"),
    "twice": (GOOD | pair("transformer.transformer_blocks.0.attn.to_q"), "and lora_unet_transformer_blocks_0_attn"),
    "two spellings": (
        {**GOOD, "lora_unet_transformer_blocks_0_attn_to_q.lora_A.weight": torch.ones(4, 8)},
        "lora_A.weight and lora_unet_transformer_blocks_0_attn_to_q.lora_down.weight",
    ),
    "fused rows": (pair("double_blocks.0.img_attn_qkv"), "img_attn_qkv.lora_up.weight for 8 rows; expected 3 times"),
    "no mlp": (
        {"single_blocks.0.linear1.lora_A": torch.ones(4, 8), "single_blocks.0.linear1.lora_B": torch.ones(24, 4)},
        "for 24 rows; expected 3 times its input width 8 and the MLP's",
    ),
    "text encoder only": (pair("lora_te1_text_model_encoder_layers_0_mlp_fc1"), "lora_te1_text_model"),
    "a model": (
        dict.fromkeys(("clean_x_embedder.proj.weight", "transformer_blocks.0.attn.to_q.weight"), torch.ones(2)),
        "belongs to --dit",
    ),
    "anything": ({"weight": torch.ones(2)}, "no model known here, weight first"),
}


@pytest.mark.parametrize("shapes_only", [True, False])
@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_used_names_the_first_offending_key(name: str, shapes_only: bool, tmp_path: Path) -> None:
    tensors, complaint = BROKEN[name]
    path = write(tmp_path / "壊れた.safetensors", tensors)
    with pytest.raises(UserError) as error:
        read_lora(path, flag=FLAG, shapes_only=shapes_only)
    assert complaint in str(error.value)
    assert str(error.value).startswith(f"{FLAG}") and "\n" not in str(error.value)


@pytest.mark.parametrize("part", ["diff", "diff_b", "set_weight", "w_norm", "reshape_weight"])
def test_what_only_text_encoders_have_changes_no_transformer(part: str, tmp_path: Path) -> None:
    """Their tensors are left over, whatever they are."""
    tensors = {**GOOD, f"lora_te1_text_model_encoder_layers_0_mlp_fc1.{part}": torch.ones(2)}
    assert len(read_lora(write(tmp_path / "lora.safetensors", tensors), flag=FLAG).leftover) == 1


MAKERS = {"lora": lora_factors, "loha": loha_factors, "lokr": lokr_factors}
PARTS = [(kind, part) for kind, make in MAKERS.items() for part in (*make((32, 32)), "alpha")]


@pytest.mark.parametrize(("kind", "part"), PARTS)
@pytest.mark.parametrize("value", ["nan", "-inf"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e5m2], ids=str)
def test_nan_and_infinity_are_named_by_their_own_key(kind, part, value, dtype, tmp_path: Path) -> None:
    """They would turn the model black in silence. At the door only headers are read."""
    tensors = {**GOOD, "diffusion_model.proj_out.alpha": torch.tensor(1.0)}
    tensors |= {f"diffusion_model.proj_out.{name}": tensor for name, tensor in MAKERS[kind]((32, 32)).items()}
    key = f"diffusion_model.proj_out.{part}"
    tensors[key].view(-1)[-1] = float(value)
    path = write(tmp_path / "壊れた.safetensors", tensors | {key: tensors[key].to(dtype)})
    assert len(read_lora(path, flag=FLAG, shapes_only=True).modules) == 2
    with pytest.raises(UserError) as error:
        read_lora(path, flag=FLAG)
    assert f"{path}: got {key} with infinite numbers or NaN" in str(error.value)


def test_nan_that_is_not_used_does_no_harm(tmp_path: Path) -> None:
    stray = {"lora_te1_text_model_encoder.lora_down.weight": torch.tensor(float("nan"))}
    assert read_lora(write(tmp_path / "lora.safetensors", GOOD | stray), flag=FLAG).modules


@pytest.mark.parametrize("make", MAKERS.values())
def test_an_alpha_of_zero_counts_as_the_rank_and_is_reported(make, tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO")
    factors = make((32, 32))
    tensors = {f"lora_unet_proj_out.{part}": tensor for part, tensor in factors.items()}
    path = write(tmp_path / "零.safetensors", tensors | {"lora_unet_proj_out.alpha": torch.tensor(0.0)})
    assert_deltas(read_lora(path, flag=FLAG), {"proj_out": by_hand(factors)})
    expected = "零.safetensors: an alpha of 0 counts as the rank in 1 modules, lora_unet_proj_out.alpha first"
    assert caplog.messages == [expected]
    caplog.clear()
    read_lora(write(path, tensors | {"lora_unet_proj_out.alpha": torch.tensor(1.0)}), flag=FLAG)
    assert caplog.messages == []


def test_an_alpha_of_one_factor_is_no_second_factor(tmp_path: Path) -> None:
    """It is left over: what it means is not known. An adapter may still be called alpha."""
    factors = lora_factors((32, 32))
    tensors = {f"diffusion_model.proj_out.lora_{a}.weight": t for a, t in zip("AB", factors.values(), strict=True)}
    path = write(tmp_path / "lora.safetensors", tensors | {"diffusion_model.proj_out.lora_A.alpha": torch.tensor(1.0)})
    lora = read_lora(path, flag=FLAG)
    assert_deltas(lora, {"proj_out": by_hand(factors)})
    assert lora.leftover == ("diffusion_model.proj_out.lora_A.alpha",)
    tensors = {key.replace(".weight", ".alpha.weight"): tensor for key, tensor in tensors.items()}
    assert_deltas(read_lora(write(path, tensors), flag=FLAG), {"proj_out": by_hand(factors)})


# ---- folders ----


def test_a_folder_of_peft_means_its_file(tmp_path: Path) -> None:
    """With its alpha; others in the folder do not matter."""
    folder = tmp_path / "和風"
    folder.mkdir()
    peft.LoraConfig(r=RANK, lora_alpha=1).save_pretrained(folder)
    factors = lora_factors((32, 32))
    tensors = {f"base_model.model.proj_out.{part}": tensor for part, tensor in factors.items()}
    write(folder / "adapter_model.safetensors", tensors)
    write(folder / "a.safetensors", GOOD)
    for path in (folder, str(folder), f"{folder}/"):
        lora = read_lora(path, flag=FLAG)
        assert_deltas(lora, {"proj_out": by_hand(factors, 1)})
        assert lora.path == folder / "adapter_model.safetensors"
        assert lora.where == f"{FLAG} {folder / 'adapter_model.safetensors'}"


def test_any_other_folder_is_refused(tmp_path: Path, monkeypatch) -> None:
    """It may hold a LoRA of every epoch."""
    write(tmp_path / "mine-000001.safetensors", GOOD)
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path, ".", Path()):
        with pytest.raises(UserError, match=f"^{FLAG}: got .*expected a LoRA file.*it is a folder: give the file$"):
            read_lora(path, flag=FLAG)


def test_no_name_is_not_the_working_folder(tmp_path: Path, monkeypatch) -> None:
    write(tmp_path / "adapter_model.safetensors", GOOD)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"^{FLAG}: got an empty name"):
        read_lora("", flag=FLAG)


def test_a_damaged_header_is_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "lora.safetensors", GOOD)
    path.write_bytes(path.read_bytes().replace(b'"shape":[4,8]', b'"shape":[4,7]'))
    for shapes_only in (True, False):
        with pytest.raises(UserError, match=r"lora_down\.weight: .*damaged"):
            read_lora(path, flag=FLAG, shapes_only=shapes_only)


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "lora.safetensors", GOOD)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="truncated"):
        read_lora(path, flag=FLAG)


def test_whole_lokr_factors_that_peft_would_scale_are_refused(tmp_path: Path) -> None:
    tensors = {"transformer.proj_out.lokr_w1": torch.ones(2, 2), "transformer.proj_out.lokr_w2": torch.ones(4, 4)}
    for alpha, is_right in ((8, True), (4, False)):
        metadata = {"lora_adapter_metadata": json.dumps({"transformer.r": 8, "transformer.alpha": alpha})}
        path = write(tmp_path / f"{alpha}.safetensors", tensors, metadata)
        if is_right:
            assert_deltas(read_lora(path, flag=FLAG), {"proj_out": torch.ones(8, 8)})
        else:
            with pytest.raises(UserError, match=r"proj_out\.lokr_w1 with alpha 4 and rank 8"):
                read_lora(path, flag=FLAG)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_a_configuration_of_pefts_is_read_however_an_editor_saved_it(encoding: str, tmp_path: Path) -> None:
    text = json.dumps({"r": RANK, "lora_alpha": 1, "base_model_name_or_path": "模型"}, ensure_ascii=False)
    (tmp_path / "adapter_config.json").write_bytes(text.encode(encoding))
    factors = lora_factors((32, 32))
    tensors = {f"base_model.model.proj_out.{part}": tensor for part, tensor in factors.items()}
    path = write(tmp_path / "adapter_model.safetensors", tensors)
    assert_deltas(read_lora(path, flag=FLAG), {"proj_out": by_hand(factors, 1)})


def test_a_configuration_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(UserError, match=r"adapter_config\.json: got no JSON"):
        read_lora(write(tmp_path / "adapter_model.safetensors", GOOD), flag=FLAG)


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_damaged_configuration_is_refused(text: str, tmp_path: Path) -> None:
    path = write(tmp_path / "lora.safetensors", GOOD, {"lora_adapter_metadata": text})
    with pytest.raises(UserError, match="lora_adapter_metadata"):
        read_lora(path, flag=FLAG)


@pytest.mark.parametrize(
    "entries",
    [
        {"lora_alpha": "much"},
        {"lora_alpha": [4]},
        {"lora_alpha": 4, "alpha_pattern": ["to_q"]},
        {"lora_alpha": 4, "alpha_pattern": {"to_(q": 3}},
        {"lora_alpha": 4, "alpha_pattern": {".*": {}}},
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"lora_alpha": 0},
    ],
)
def test_a_configuration_that_makes_no_sense_names_the_first_key(entries: dict, tmp_path: Path) -> None:
    metadata = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in entries.items()})}
    path = write(tmp_path / "lora.safetensors", GOOD, metadata)
    for shapes_only in (True, False):
        with pytest.raises(UserError, match=r"got lora_unet_transformer_blocks_0_attn_to_q\.lora_down\.weight with"):
            read_lora(path, flag=FLAG, shapes_only=shapes_only)


def test_modules_are_named_by_a_factor_and_not_by_the_alpha_that_stands_first(tmp_path: Path) -> None:
    """safetensors sorts names; patterns and messages mean the factors."""
    name = "lora_unet_transformer_blocks_0_attn_to_q"
    lora = read_lora(write(tmp_path / "lora.safetensors", GOOD | {f"{name}.alpha": torch.tensor(1.0)}), flag=FLAG)
    assert lora.key_of(name) == lora.key_of(name, "hada_w1_a") == f"{name}.lora_down.weight"
    assert lora.key_of(name, "alpha") == f"{name}.alpha"
