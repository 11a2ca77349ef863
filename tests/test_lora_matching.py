"""Which modules of a LoRA find their weight, and what is said about those that do not."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common.weights import open_checkpoint
from networks.lora_formats import LoraFile, read_lora
from networks.lora_matching import match, select
from options.errors import UserError

MODULES = (
    "single_transformer_blocks.0.attn.to_q",
    "single_transformer_blocks.1.proj_mlp",
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.1.ff.net.0.proj",
)
"""In the order in which safetensors stores them."""
SHAPES = dict.fromkeys(MODULES, (12, 8))


def tensors_of(*modules: str) -> dict[str, torch.Tensor]:
    names = [f"lora_unet_{module.replace('.', '_')}" for module in modules]
    downs = {f"{name}.lora_down.weight": torch.ones(2, 8) for name in names}
    return downs | {f"{name}.lora_up.weight": torch.ones(12, 2) for name in names}


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> LoraFile:
    save_file(tensors, folder / "絵.safetensors")
    return read_lora(folder / "絵.safetensors", flag="--lora_weight", shapes_only=True)


@pytest.fixture
def lora(tmp_path: Path) -> LoraFile:
    return write(tmp_path, tensors_of(*MODULES))


def weights(prefix: str = "") -> dict[str, tuple[int, ...]]:
    named = {f"{prefix}{name}.weight": shape for name, shape in SHAPES.items()}
    return named | {f"{prefix}{MODULES[0]}.bias": (12,), f"{prefix}norm_out.linear.weight": (16, 8)}


@pytest.mark.parametrize(
    "prefix", ["", "model.", "diffusion_model.", "model.diffusion_model.", "transformer.", "module."]
)
def test_prefixes_of_the_checkpoint_do_not_matter(prefix: str, lora: LoraFile) -> None:
    matched = match(lora, weights(prefix))
    assert list(matched.factors) == [f"{prefix}{name}.weight" for name in MODULES]
    assert matched.unmatched == ()
    assert matched.summary() == "絵.safetensors: 4 of 4 lora modules, native (lora_down)"


def test_the_demo_transformer_is_matched_from_its_header(demo_models, tmp_path: Path) -> None:
    shapes = open_checkpoint(demo_models.dit, flag="--dit").shapes
    rows, columns = shapes["transformer_blocks.1.attn.to_q.weight"]
    tensors = {
        "transformer.transformer_blocks.1.attn.to_q.lora_A.weight": torch.ones(2, columns),
        "transformer.transformer_blocks.1.attn.to_q.lora_B.weight": torch.ones(rows, 2),
    }
    assert list(match(write(tmp_path, tensors), shapes).factors) == ["transformer_blocks.1.attn.to_q.weight"]


def test_what_finds_no_weight_is_listed(tmp_path: Path) -> None:
    beyond = "transformer_blocks.7.attn.to_q"
    lora = write(tmp_path, tensors_of(*MODULES, beyond) | {"lora_te1_text_model.lora_down.weight": torch.ones(2, 8)})
    matched = match(lora, weights())
    assert len(matched.factors) == 4
    assert matched.unmatched == (beyond,)
    summary = matched.summary()
    assert "4 of 5 lora modules" in summary
    assert f"1 modules that the model does not have ({beyond})" in summary
    assert "1 unused tensors (lora_te1_text_model.lora_down.weight)" in summary


def test_no_match_at_all_is_an_error(lora: LoraFile) -> None:
    with pytest.raises(UserError, match=r"4 FramePack modules, lora_unet_single_transformer_blocks_0_attn_to_q\."):
        match(lora, {"blocks.0.self_attn.q.weight": (12, 8)})


def test_another_shape_names_the_key_and_both_shapes(lora: LoraFile) -> None:
    wrong = weights() | {f"{MODULES[3]}.weight": (24, 8)}
    with pytest.raises(UserError) as error:
        match(lora, wrong)
    for part in ("lora_unet_transformer_blocks_1_ff_net_0_proj.lora_up", "(12, 8)", "(24, 8)", f"{MODULES[3]}.weight"):
        assert part in str(error.value)
    with pytest.raises(UserError, match=r"got lora_unet_transformer_blocks_1_ff_net_0_proj\.lora_down\.weight for"):
        match(lora, weights() | {f"{MODULES[3]}.weight": (12, 16)})


@pytest.mark.parametrize(
    ("include", "exclude", "kept"),
    [
        (None, None, MODULES),
        ("single_transformer_blocks", None, MODULES[:2]),
        (r"^transformer_blocks\.", None, MODULES[2:]),
        ("attn_to_q", None, (MODULES[0], MODULES[2])),
        (r"lora_unet_transformer_blocks_\d", None, MODULES[2:]),
        (None, "to_q$", (MODULES[1], MODULES[3])),
        ("single", r"\.1\.", (MODULES[0],)),
    ],
)
def test_patterns_are_searched_in_names(include, exclude, kept, lora: LoraFile) -> None:
    selected = select(lora, include=include, exclude=exclude)
    assert tuple(selected.dotted[name] for name in selected.modules) == kept
    assert len(match(selected, weights()).factors) == len(kept)


def test_patterns_may_use_the_names_of_the_file(tmp_path: Path) -> None:
    lora = write(tmp_path, {"double_blocks.0.img_mlp.fc1.lora_A": torch.ones(2, 8)} | {
        "double_blocks.0.img_mlp.fc1.lora_B": torch.ones(32, 2),
        "single_blocks.0.linear2.lora_A": torch.ones(2, 40),
        "single_blocks.0.linear2.lora_B": torch.ones(8, 2),
    })  # fmt: skip
    assert [*select(lora, include="double_blocks").dotted] == [*lora.dotted]
    assert [*select(lora, include="double_blocks").modules] == ["lora_unet_transformer_blocks_0_ff_net_0_proj"]


def test_an_invalid_pattern_is_named(lora: LoraFile) -> None:
    with pytest.raises(UserError, match=r"^--exclude_patterns: got to_\(q .*regular expression"):
        select(lora, exclude="to_(q")
    with pytest.raises(UserError, match=r"^--include_patterns: got \*"):
        select(lora, include="*")


def test_what_patterns_leave_out_is_counted(lora: LoraFile) -> None:
    matched = match(select(lora, include="attn"), weights())
    assert matched.summary() == "絵.safetensors: 2 of 2 lora modules, native (lora_down); 2 left out by patterns"


@pytest.mark.parametrize(
    ("include", "exclude", "flag"), [("no", None, "include"), ("no", "mlp", "include"), ("attn", ".", "exclude")]
)
def test_patterns_that_leave_nothing_are_an_error(include, exclude, flag: str, lora: LoraFile) -> None:
    with pytest.raises(UserError, match=rf"^--{flag}_patterns: .*names such as single_transformer_blocks\.0\."):
        select(lora, include=include, exclude=exclude)
