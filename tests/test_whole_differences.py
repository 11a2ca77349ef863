"""Files with whole differences of weights, biases and norms, with and without factors: merged, or refused."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import convert_lora
import lora_post_hoc_ema
import merge_lora
from common.weights import Checkpoint, open_checkpoint
from networks.framepack_names import FRAMEPACK_NAMES
from networks.lora_formats import read_lora
from networks.lora_matching import match, select
from networks.lora_merge import plan_merge
from networks.module_names import NameTable
from networks.prompt_loras import PromptLoras
from networks.rebuild import network_for, network_from_tensors
from networks.wan_names import IGNORED, WAN_NAMES
from options.errors import UserError
from options.flags_train import NetworkFlags
from options.lora import LoraChoice, PromptLora
from tests.published import published_shapes, published_wan
from tests.test_wan_lora import TOLERANCE, difference, load_by_pipelines, run_ours, run_theirs
from tests.wan_transformers import build_oracle, build_transformer, diffusers_names
from training.networks import open_network
from wan.loading import load_transformer, open_transformer, save_fp8_transformer

FLAG = "--lora_weight"
RANK = 4
ENDINGS = {".weight": ".diff", ".bias": ".diff_b"}
LIGHTX2V = ENDINGS | {".modulation": ".diff_m"}
TO_Q, NORM = "blocks.0.self_attn.q", "blocks.1.norm3"
Tensors = dict[str, Tensor]


def noise(tensors: Mapping[str, Tensor], seed: int = 3, size: float = 0.1) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: size * torch.randn(tensor.shape, generator=generator) for name, tensor in tensors.items()}


def key_of(name: str, *, flat: bool = False, endings: Mapping[str, str] = ENDINGS) -> str:
    """A tensor's name → the key of its difference, without prefix."""
    leaf = next((leaf for leaf in endings if name.endswith(leaf)), "")
    module = name.removesuffix(leaf)
    return (module.replace(".", "_") if flat else module) + endings.get(leaf, ".diff")


def choice(path: Path, multiplier: float = 1.0, **patterns: str) -> LoraChoice:
    return LoraChoice(path=str(path), multiplier=multiplier, **patterns)


def write(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
    return path


def checkpoint_of(folder: Path, tensors: Mapping[str, Tensor]) -> Checkpoint:
    return open_transformer(str(write(folder / "模型.safetensors", tensors)))


def merged(checkpoint: Checkpoint, *choices: LoraChoice) -> Tensors:
    model = load_transformer(checkpoint, dtype=torch.float32, device="cpu", merge=plan_merge(choices, checkpoint))
    return model.state_dict()


def pair(module: str, shape: tuple[int, ...], seed: int = 5) -> Tensors:
    """LoRA's factors in ComfyUI's names, without alpha."""
    sizes = {"lora_down": (RANK, *shape[1:]), "lora_up": (shape[0], RANK, *[1] * len(shape[2:]))}
    tensors = {part: torch.empty(size) for part, size in sizes.items()}
    return {f"diffusion_model.{module}.{part}.weight": tensor for part, tensor in noise(tensors, seed).items()}


def distilled(state: Mapping[str, Tensor], *, norms: bool = True) -> tuple[Tensors, Tensors]:
    """A file as distillations of Wan are published (factors of matrices, differences of the rest), and what it adds."""
    tensors: Tensors = {}
    deltas = noise(state, seed=8)
    matrices = {name for name, weight in state.items() if weight.ndim > 1 and name.endswith(".weight")}
    for number, (name, weight) in enumerate(state.items()):
        module = name.removesuffix(".weight")
        if name in matrices and module != "head.head":
            factors = pair(module, weight.shape, seed=number)
            down, up = factors.values()
            deltas[name] = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
            tensors |= factors
        elif (
            norms
            or module == "head.head"
            or name.endswith(".bias")
            and f"{module.removesuffix('.bias')}.weight" in matrices
        ):
            tensors[f"diffusion_model.{key_of(name, endings=LIGHTX2V)}"] = deltas[name]
        else:
            deltas[name] = torch.zeros_like(weight)
    return tensors, deltas


@pytest.fixture(scope="module")
def state() -> Tensors:
    """The one kind of Wan's models that has every tensor."""
    return build_transformer("flf2v").state_dict()


@pytest.fixture
def file(state: Tensors, tmp_path: Path) -> Path:
    return write(tmp_path / "蒸留.safetensors", distilled(state)[0])


# ---- merged: plain sums ----


SPELLINGS: dict[str, Callable[[Tensors], Tensors]] = {
    "native": lambda t: {f"lora_unet_{key_of(name, flat=True)}": tensor for name, tensor in t.items()},
    "ComfyUI": lambda t: {f"diffusion_model.{key_of(name)}": tensor for name, tensor in t.items()},
    "ComfyUI's checkpoints": lambda t: {f"model.diffusion_model.{key_of(name)}": x for name, x in t.items()},
    "diff_m": lambda t: {f"diffusion_model.{key_of(name, endings=LIGHTX2V)}": x for name, x in t.items()},
    "official behind transformer": lambda t: {f"transformer.{key_of(name)}": tensor for name, tensor in t.items()},
    "no prefix": lambda t: {key_of(name): tensor for name, tensor in t.items()},
    "diffusers": lambda t: {f"transformer.{key_of(name)}": tensor for name, tensor in diffusers_names(t).items()},
    "diffusers, flat": lambda t: {f"lora_unet_{key_of(name, flat=True)}": x for name, x in diffusers_names(t).items()},
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_differences_of_every_tensor_of_wan_are_added_in_every_spelling(spelling, state, tmp_path: Path) -> None:
    deltas = noise(state)
    path = write(tmp_path / "差.safetensors", SPELLINGS[spelling](deltas))
    found = merged(checkpoint_of(tmp_path, state), choice(path, -0.7))
    assert found.keys() == state.keys()
    for name, weight in state.items():
        assert torch.equal(found[name], weight + -0.7 * deltas[name]), name


@pytest.mark.parametrize("spelling", ["native", "ComfyUI", "official behind transformer", "no prefix"])
def test_differences_of_every_tensor_of_framepack_are_added_too(spelling: str, demo_models, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(demo_models.dit, flag="--dit")
    stored = dict(checkpoint.read())
    deltas = noise(stored)
    path = write(tmp_path / "差.safetensors", SPELLINGS[spelling](deltas))
    with plan_merge([choice(path, 0.5)], checkpoint).reading("cpu") as change:
        for name, tensor in stored.items():
            assert torch.equal(change(name, tensor), tensor.float() + 0.5 * deltas[name]), name


def test_a_distillation_is_factors_and_differences_together(state, file, tmp_path: Path) -> None:
    found = merged(checkpoint_of(tmp_path, state), choice(file, 0.8))
    for name, delta in distilled(state)[1].items():
        torch.testing.assert_close(found[name], state[name] + 0.8 * delta, rtol=1e-6, atol=1e-6)
        assert not torch.equal(found[name], state[name])


def test_several_files_add_up_and_are_rounded_once(tmp_path: Path, state) -> None:
    """Each alone would be lost in bfloat16."""
    name = f"{NORM}.bias"
    stored = {key: tensor.bfloat16() for key, tensor in state.items()} | {name: torch.ones_like(state[name]).bfloat16()}
    small = torch.full_like(state[name], 2**-9)
    paths = [write(tmp_path / f"{n}.safetensors", {f"transformer.{NORM}.diff_b": small}) for n in range(2)]
    output = tmp_path / "合.safetensors"
    command = ["--dit", str(write(tmp_path / "模型.safetensors", stored)), "--lora_weight", *map(str, paths)]
    assert merge_lora.main([*command, "--lora_multiplier", "2", "1.5", "--save_merged_model", str(output)]) == 0
    found = load_file(output)
    assert torch.equal(found.pop(name), (1 + 3.5 * small).bfloat16()) and (1 + 3.5 * small).bfloat16()[0] > 1
    assert all(tensor.dtype == torch.bfloat16 and torch.equal(tensor, stored[key]) for key, tensor in found.items())


@pytest.mark.parametrize("layout", ["official", "ComfyUI's", "diffusers'"])
def test_the_layout_of_the_models_file_does_not_matter(layout: str, state, file, tmp_path: Path) -> None:
    """As they are in the file: `merge_lora.py` writes every tensor under its name."""
    prefixed = {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}
    stored = {"official": state, "ComfyUI's": prefixed, "diffusers'": diffusers_names(state)}[layout]
    model, output = write(tmp_path / "dit.safetensors", stored), tmp_path / "合.safetensors"
    assert merge_lora.main(["--dit", str(model), "--lora_weight", str(file), "--save_merged_model", str(output)]) == 0
    found = load_file(output)
    assert found.keys() == stored.keys() and all(found[name].ne(stored[name]).any() for name in stored)
    again = load_transformer(open_transformer(str(output)), dtype=torch.float32, device="cpu").state_dict()
    for name, tensor in merged(checkpoint_of(tmp_path, state), choice(file)).items():
        torch.testing.assert_close(again[name], tensor, rtol=1e-6, atol=1e-6)


def test_hunyuan_videos_fused_biases_and_norms_are_framepacks(demo_models, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(demo_models.dit, flag="--dit")
    stored = dict(checkpoint.read())
    block, single = "transformer_blocks.0.attn", "single_transformer_blocks.1"
    width, mlp = stored[f"{block}.to_q.weight"].shape[1], len(stored[f"{single}.proj_mlp.bias"])
    head = len(stored[f"{block}.norm_q.weight"])
    sizes = {
        "double_blocks.0.img_attn_qkv.diff": (3 * width, width),
        "double_blocks.0.img_attn_qkv.diff_b": (3 * width,),
        "double_blocks.0.txt_attn_k_norm.diff": (head,),
        "single_blocks.1.linear1.lora_down.weight": (2, width),
        "single_blocks.1.linear1.lora_up.weight": (3 * width + mlp, 2),
        "single_blocks.1.linear1.diff_b": (3 * width + mlp,),
        "single_blocks.1.q_norm.diff": (head,),
    }
    tensors = noise({key: torch.empty(size) for key, size in sizes.items()})
    qkv, qkv_bias, norm, down, up, bias, single_norm = tensors.values()
    delta, expected = up @ down, {f"{block}.norm_added_k.weight": norm, f"{single}.attn.norm_q.weight": single_norm}
    for number, part in enumerate(("to_q", "to_k", "to_v")):
        rows = slice(number * width, (number + 1) * width)
        expected |= {f"{block}.{part}.weight": qkv[rows], f"{block}.{part}.bias": qkv_bias[rows]}
        expected |= {f"{single}.attn.{part}.weight": delta[rows], f"{single}.attn.{part}.bias": bias[rows]}
    expected |= {f"{single}.proj_mlp.weight": delta[3 * width :], f"{single}.proj_mlp.bias": bias[3 * width :]}
    merge = plan_merge([choice(write(tmp_path / "混元.safetensors", tensors))], checkpoint)
    assert merge.weights == expected.keys()
    with merge.reading("cpu") as change:
        found = {name: change(name, tensor) for name, tensor in stored.items()}
    for name, difference_of_it in expected.items():
        torch.testing.assert_close(found[name], stored[name].float() + difference_of_it, rtol=1e-6, atol=1e-6)


# ---- diffusers ----


def test_what_diffusers_loads_of_such_a_file_does_the_same_there(tmp_path: Path) -> None:
    """It takes the biases of layers with factors, and the difference of the head's weight; norms it leaves out."""
    model = build_transformer("flf2v")
    tensors, _ = distilled(model.state_dict(), norms=False)
    tensors = {key: tensor for key, tensor in tensors.items() if "patch_embedding" not in key}
    path, oracle = write(tmp_path / "蒸留.safetensors", tensors), build_oracle(model)
    load_by_pipelines(oracle, path)
    wanted = run_theirs(oracle, model)
    checkpoint = checkpoint_of(tmp_path, model.state_dict())
    merge = plan_merge([choice(path)], checkpoint)
    assert {f"{TO_Q}.weight", f"{TO_Q}.bias", "head.head.weight", "head.head.bias"} <= merge.weights
    found = run_ours(load_transformer(checkpoint, dtype=torch.float32, device="cpu", merge=merge))
    assert difference(run_ours(model), wanted) > 0.05
    assert difference(found, wanted) <= TOLERANCE
    without = plan_merge([choice(path, exclude=r"\.diff")], checkpoint)
    found = run_ours(load_transformer(checkpoint, dtype=torch.float32, device="cpu", merge=without))
    assert difference(found, wanted) > 0.01, "the differences count"


# ---- fp8 ----


@pytest.mark.parametrize("mode", ["plain", "scaled"])
def test_fp8_models_have_them_in_their_16_bit_tensors_too(mode: str, state, file, tmp_path: Path) -> None:
    """Quantised from the sum; and merged into a file that is in fp8, whose codes stay where nothing is added to."""
    stored = {name: tensor.bfloat16() for name, tensor in state.items()}
    checkpoint = checkpoint_of(tmp_path, stored)
    how = {"mode": mode, "device": "cpu", "flag": "--save_fp8_model"}
    save_fp8_transformer(checkpoint, [], tmp_path / "8.safetensors", **how)
    save_fp8_transformer(checkpoint, [choice(file)], tmp_path / "蒸留8.safetensors", **how)
    added = distilled(state)[1]
    fp8, both = load_file(tmp_path / "8.safetensors"), load_file(tmp_path / "蒸留8.safetensors")
    whole = [name for name in state if both[name].dtype == torch.bfloat16]
    assert {f"{NORM}.weight", f"{TO_Q}.bias", "blocks.2.modulation", "head.head.weight"} < set(whole)
    assert f"{TO_Q}.weight" not in whole
    for name in whole:
        torch.testing.assert_close(both[name].float(), stored[name].float() + added[name], rtol=2**-7, atol=1e-3)
    biases = {f"diffusion_model.{TO_Q}.diff_b": added[f"{TO_Q}.bias"]}
    path = write(tmp_path / "偏.safetensors", biases)
    found = merged(open_transformer(str(tmp_path / "8.safetensors")), choice(path))
    assert torch.equal(found[f"{TO_Q}.bias"], fp8[f"{TO_Q}.bias"].float() + biases.popitem()[1])
    assert torch.equal(found[f"{TO_Q}.weight"].view(torch.uint8), fp8[f"{TO_Q}.weight"].view(torch.uint8))


# ---- which, and the report ----


@pytest.mark.parametrize(
    ("patterns", "kept"),
    [
        ({"include": r"blocks\.0\.self_attn\.q$"}, {f"{TO_Q}.weight", f"{TO_Q}.bias"}),
        ({"include": "^lora_unet_blocks_0_self_attn_q$"}, {f"{TO_Q}.weight", f"{TO_Q}.bias"}),
        ({"include": "blocks.0.self_attn.q", "exclude": "diff_b"}, {f"{TO_Q}.weight"}),
        ({"include": "norm3", "exclude": r"\.diff$"}, {f"blocks.{n}.norm3.bias" for n in range(3)}),
        ({"include": r"^blocks\.1\.modulation"}, {"blocks.1.modulation"}),
    ],
)
def test_a_bias_goes_by_its_modules_name(patterns, kept, state, file) -> None:
    lora = select(read_lora(file, flag=FLAG, shapes_only=True), **patterns)
    assert set(match(lora, {name: tuple(tensor.shape) for name, tensor in state.items()}).factors) == kept


def test_a_distillation_for_text_fits_the_model_for_pictures_without_its_first_layer(tmp_path: Path) -> None:
    """Which has more channels there."""
    state = build_transformer("i2v").state_dict()
    path = write(tmp_path / "文.safetensors", distilled(build_transformer("t2v").state_dict())[0])
    checkpoint = checkpoint_of(tmp_path, state)
    with pytest.raises(
        UserError, match=r"got diffusion_model\.patch_embedding\.lora_down\.weight for a weight of shape"
    ):
        plan_merge([choice(path)], checkpoint)
    merge = plan_merge([choice(path, exclude="patch_embedding")], checkpoint)
    kept_as_it_is = state.keys() - merge.weights
    assert {"patch_embedding.weight", "patch_embedding.bias"} <= kept_as_it_is
    assert {name for name in kept_as_it_is if not re.search("img|patch", name)} == set()


def test_the_report_counts_them(state, file, tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.INFO)
    num_matrices = sum(tensor.ndim > 1 and name.endswith(".weight") for name, tensor in state.items()) - 1
    num_others = len(state) - num_matrices
    plan_merge([choice(file)], checkpoint_of(tmp_path, state))
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    counts = f"{num_matrices} of {num_matrices} lora modules and {num_others} of {num_others} whole differences"
    assert record.message == f"蒸留.safetensors: {counts}, ComfyUI (lora_down, diff); multiplier 1"


def test_what_the_model_does_not_have_is_named(tmp_path: Path, caplog) -> None:
    """As of a distillation of the model for pictures, on the one for text; and what nobody knows."""
    tensors = {"diffusion_model.blocks.0.cross_attn.norm_k_img.diff": torch.ones(256)}
    tensors |= {f"diffusion_model.{TO_Q}.diff_b": torch.ones(256), "diffusion_model.vace.0.q.diff": torch.ones(2)}
    tensors |= {f"transformer.{IGNORED.format(0)}.diff": torch.ones(256)}
    path = write(tmp_path / "絵.safetensors", tensors)
    plan_merge([choice(path)], checkpoint_of(tmp_path, build_transformer("t2v").state_dict()))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "1 of 2 whole differences" in record.message
    assert "does not have (blocks.0.cross_attn.norm_k_img)" in record.message
    assert "2 unused tensors" in record.message and "diffusion_model.vace.0.q.diff" in record.message


@pytest.mark.parametrize("table", [WAN_NAMES, FRAMEPACK_NAMES], ids=lambda table: table.architecture)
def test_the_tables_know_every_tensor_of_the_published_models(table: NameTable) -> None:
    """Alone and as the others spell it; each means one."""
    published = published_wan("flf2v_14B") if table is WAN_NAMES else published_shapes("framepack_dit")
    for name in published:
        wanted = name.removesuffix(".weight")
        assert table.find_tensor(wanted.replace(".", "_")) == (wanted,)
    for theirs, ours in table.others.items():
        assert table.find_tensor(theirs.format(7).replace(".", "_")) == (ours.format(7),)
        assert table.find(theirs.format(7).replace(".", "_")) == (), "factors of it make no sense"


# ---- refused in one line, before any weight is read ----


def damaged(key: str, tensor: Tensor) -> Tensors:
    return pair(TO_Q, (256, 256)) | {f"diffusion_model.{TO_Q}.diff_b": torch.ones(256)} | {key: tensor}


BROKEN = {
    "norm": (f"diffusion_model.{NORM}.diff", torch.ones(255), f"(255,); expected (256,), as {NORM}.weight has"),
    "bias": (f"diffusion_model.{TO_Q}.diff_b", torch.ones(1), f"(1,); expected (256,), as {TO_Q}.bias has"),
    "a column": (f"diffusion_model.{NORM}.diff_b", torch.ones(256, 1), f"(256, 1); expected (256,), as {NORM}.bias"),
    "flattened": (
        "diffusion_model.patch_embedding.diff",
        torch.ones(256, 36 * 4),
        "(256, 144); expected (256, 36, 1, 2, 2), as patch_embedding.weight",
    ),
    "modulation": ("diffusion_model.blocks.0.diff_m", torch.ones(6, 256), "(6, 256); expected (1, 6, 256), as blocks"),
    "factors too": (
        f"diffusion_model.{TO_Q}.diff",
        torch.ones(256, 256),
        f"{TO_Q}.lora_up.weight of factors of diff and lora; expected one kind",
    ),
    "whole numbers": (f"diffusion_model.{NORM}.diff", torch.ones(256, dtype=torch.int8), "of type int8; expected"),
    "empty": (f"diffusion_model.{NORM}.diff", torch.ones(0), "of shape (0,); expected"),
    "set": (f"diffusion_model.{NORM}.set_weight", torch.ones(256), "a whole weight or bias is not supported"),
    "twice": (f"diffusion_model.{NORM}.diff", torch.ones(256), f"got transformer.{NORM}.diff and diffusion_model."),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_does_not_fit_names_its_key(name: str, state, tmp_path: Path) -> None:
    key, tensor, complaint = BROKEN[name]
    tensors = damaged(key, tensor) | ({f"transformer.{NORM}.diff": torch.ones(256)} if name == "twice" else {})
    path = write(tmp_path / "壊.safetensors", tensors)
    with pytest.raises(UserError) as error:
        plan_merge([choice(path)], checkpoint_of(tmp_path, state))
    assert str(error.value).startswith(f"{FLAG} {path}: got ") and complaint in str(error.value)
    assert key.rpartition(".")[0] in str(error.value)


@pytest.mark.parametrize("key", [f"diffusion_model.{TO_Q}.diff_b", f"diffusion_model.{NORM}.diff"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e5m2], ids=str)
def test_numbers_that_are_none_are_named(key: str, dtype: torch.dtype, state, tmp_path: Path) -> None:
    path = write(tmp_path / "壊.safetensors", damaged(key, torch.full((256,), float("inf")).to(dtype)))
    with pytest.raises(UserError, match=re.escape(f"got {key} with infinite numbers or NaN")):
        merged(checkpoint_of(tmp_path, state), choice(path))


def test_a_fused_bias_without_its_layers_factors_cannot_be_split(tmp_path: Path) -> None:
    path = write(tmp_path / "混元.safetensors", {"single_blocks.0.linear1.diff_b": torch.ones(56)})
    with pytest.raises(UserError, match=r"got single_blocks\.0\.linear1\.diff_b of a fused layer; expected factors of"):
        read_lora(path, flag=FLAG)


def test_factors_of_norms_and_biases_are_not_known(tmp_path: Path) -> None:
    """Only whole differences of them are."""
    tensors = pair(TO_Q, (256, 256)) | pair(NORM, (256, 1)) | pair(f"{TO_Q}.bias", (256, 1))
    lora = read_lora(write(tmp_path / "a.safetensors", tensors), flag=FLAG)
    assert list(lora.modules) == ["lora_unet_blocks_0_self_attn_q"] and len(lora.leftover) == 4


@pytest.mark.parametrize("alpha", [{}, {f"transformer.{NORM}.alpha": torch.tensor(0.5)}], ids=["metadata", "tensor"])
def test_no_alpha_scales_a_difference(alpha: Tensors, state, tmp_path: Path) -> None:
    """Nor does one in PEFT's configuration, or in our own record of scales of other modules."""
    record = {"alpha": 2.0, "alpha_dtype": "float32", "dtype": "float32", "folded": 0.5, "rank": None}
    config = {"transformer.r": 8, "transformer.lora_alpha": 4}
    tensors = {f"transformer.{NORM}.diff": torch.ones(256)} | alpha
    path = tmp_path / "a.safetensors"
    metadata = {"lora_adapter_metadata": json.dumps(config), "oneframe_folded_scales": json.dumps({"": record})}
    save_file(tensors, path, metadata)
    found = merged(checkpoint_of(tmp_path, state), choice(path))
    assert torch.equal(found[f"{NORM}.weight"], state[f"{NORM}.weight"] + 1)


KINDS = {
    "norm": {f"diffusion_model.{NORM}.diff": torch.ones(256)},
    "bias": {f"diffusion_model.{TO_Q}.diff_b": torch.ones(256)},
    "weight": {"diffusion_model.head.head.diff": torch.ones(64, 256)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompts_lora_cannot_have_them(kind: str, state, tmp_path: Path) -> None:
    tensors = pair(TO_Q, (256, 256)) | KINDS[kind]
    path, checkpoint = write(tmp_path / "差.safetensors", tensors), checkpoint_of(tmp_path, state)
    complaint = re.escape(f"got {next(iter(KINDS[kind]))}; expected LoRA, LoHa or LoKr factors only; merge the file")
    with pytest.raises(UserError, match=f"^--lora .*{complaint}.* with --lora_weight$"):
        PromptLoras(checkpoint).check([PromptLora(path=str(path), multiplier=1.0)])
    with pytest.raises(UserError, match=complaint):
        network_for(build_transformer("flf2v"), read_lora(path, flag="--lora"))


@pytest.mark.parametrize("target", [("default",), ("other",), ("other", "--diffusers_prefix", "transformer")])
def test_they_are_not_converted(target: tuple[str, ...], file, tmp_path: Path, capsys) -> None:
    output = tmp_path / "o.safetensors"
    assert convert_lora.main(["--input", str(file), "--output", str(output), "--target", *target]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if ": got " in line]
    assert "more whole differences; expected LoRA, LoHa or LoKr factors only; such a file can only be merged" in line
    assert not output.exists()


@pytest.mark.parametrize("dim_from_weights", [True, False])
def test_they_are_not_trained_on(dim_from_weights: bool, file) -> None:
    flags = NetworkFlags(
        network_module="networks.lora_wan", network_weights=str(file), dim_from_weights=dim_from_weights, network_dim=4
    )
    with pytest.raises(UserError, match="^--network_weights .*whole differences.* --base_weights$"):
        open_network(flags, build_transformer("flf2v"), seed=1)


def test_tensors_of_such_a_file_are_no_network() -> None:
    tensors = {"lora_unet_blocks_0_self_attn_q.diff": torch.ones(256, 256)}
    with pytest.raises(UserError, match="q.diff; expected LoRA, LoHa or LoKr tensors"):
        network_from_tensors(build_transformer(), tensors, where="test")


def test_one_lora_of_several_cannot_have_them_unless_they_are_left_out(file, tmp_path: Path, capsys) -> None:
    output = tmp_path / "o.safetensors"
    command = ["--lora_weight", str(file), "--save_merged_lora", str(output)]
    assert merge_lora.main(command) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if ": got " in line]
    assert "--save_merged_model" in line and r"--exclude_patterns '\.diff'" in line and not output.exists()
    assert merge_lora.main([*command, "--exclude_patterns", r"\.diff"]) == 0
    found, given = read_lora(output, flag=FLAG), read_lora(file, flag=FLAG)
    assert set(found.modules) == set(given.modules) - set(given.differences)


def test_files_of_one_training_are_averaged_with_them(tmp_path: Path) -> None:
    paths = [
        write(
            tmp_path / f"{n}.safetensors", pair(TO_Q, (8, 8)) | {f"diffusion_model.{TO_Q}.diff_b": torch.full((8,), n)}
        )
        for n in (1.0, 3.0)
    ]
    output = tmp_path / "平均.safetensors"
    assert lora_post_hoc_ema.main([*map(str, paths), "--no_sort", "--beta", "0.5", "--output_file", str(output)]) == 0
    assert torch.equal(load_file(output)[f"diffusion_model.{TO_Q}.diff_b"], torch.full((8,), 2.0))
