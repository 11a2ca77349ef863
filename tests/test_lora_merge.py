"""LoRAs merged into weights while these stream from their file, and models saved with their LoRAs in them."""

import errno
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.checkpoint_writer import write_tensors
from common.weights import Checkpoint, open_checkpoint
from frame_pack.loading import load_transformer, open_transformer
from networks.lora_merge import merge_into_file, plan_merge
from options.errors import UserError
from options.flags_lora import LoraSourceFlags
from options.lora import LoraChoice, lora_choices, parse_prompt_lora

MODULES = ("transformer_blocks.0.attn.to_q", "single_transformer_blocks.1.proj_mlp")
ROWS, COLUMNS, RANK = 12, 8, 2
CPU = torch.device("cpu")


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def write_lora(path: Path, seed: int, modules=MODULES, alpha: float | None = 3.0, dtype=torch.float32) -> str:
    """A native file; returns its path."""
    tensors = {}
    for number, module in enumerate(modules):
        name = f"lora_unet_{module.replace('.', '_')}"
        tensors[f"{name}.lora_down.weight"] = random(RANK, COLUMNS, seed=seed + number).to(dtype)
        tensors[f"{name}.lora_up.weight"] = random(ROWS, RANK, seed=seed + number + 50).to(dtype)
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=dtype)
    save_file(tensors, path)
    return str(path)


def delta(path: str, module: str) -> Tensor:
    """alpha / rank · up @ down in float64, from the file."""
    tensors, name = load_file(path), f"lora_unet_{module.replace('.', '_')}"
    down, up = (tensors[f"{name}.lora_{part}.weight"].double() for part in ("down", "up"))
    return tensors.get(f"{name}.alpha", torch.tensor(RANK)).double() / RANK * up @ down


def base_tensors(dtype: torch.dtype, prefix: str = "") -> dict[str, Tensor]:
    weights = {f"{prefix}{name}.weight": random(ROWS, COLUMNS, seed=9).to(dtype) for name in MODULES}
    return weights | {f"{prefix}norm_out.linear.weight": random(4, 4, seed=8).to(dtype)}


def base(folder: Path, dtype: torch.dtype = torch.float32, prefix: str = "") -> Checkpoint:
    save_file(base_tensors(dtype, prefix), folder / "土台.safetensors")
    return open_checkpoint(folder / "土台.safetensors", flag="--dit")


def merged(checkpoint: Checkpoint, *choices: LoraChoice) -> Mapping[str, Tensor]:
    with plan_merge(choices, checkpoint).reading(CPU) as change:
        return {name: change(name, tensor) for name, tensor in checkpoint.read()}


@pytest.fixture
def loras(tmp_path: Path) -> tuple[str, str]:
    return write_lora(tmp_path / "一.safetensors", 1), write_lora(tmp_path / "二.safetensors", 2, alpha=None)


# ---- the sum ----


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "diffusion_model.", "transformer."])
def test_sums_are_the_formulas_whatever_the_files_layout(prefix: str, loras, tmp_path: Path) -> None:
    first, second = loras
    weights = merged(
        base(tmp_path, prefix=prefix), LoraChoice(path=first, multiplier=0.7), LoraChoice(path=second, multiplier=-2)
    )
    for name, stored in base_tensors(torch.float32).items():
        module = name.removesuffix(".weight")
        wanted = stored.double()
        if module in MODULES:
            wanted = wanted + 0.7 * delta(first, module) - 2 * delta(second, module)
        torch.testing.assert_close(weights[prefix + name].double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_of_any_type_are_summed_in_float32(dtype, lora_dtype, tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "一.safetensors", 1, dtype=lora_dtype)
    weights = merged(base(tmp_path, dtype), LoraChoice(path=lora))
    for name, stored in base_tensors(dtype).items():
        module = name.removesuffix(".weight")
        if module not in MODULES:
            assert weights[name].dtype == dtype, "a weight without a LoRA is left as it is"
            continue
        assert weights[name].dtype == torch.float32
        torch.testing.assert_close(weights[name].double(), stored.double() + delta(lora, module), rtol=1e-6, atol=1e-6)


def test_float8_weights_stay_numbers(tmp_path: Path) -> None:
    """Casting what is beyond the largest float8 gives NaN."""
    lora = write_lora(tmp_path / "一.safetensors", 1, alpha=3e4)
    merge_into_file(
        base(tmp_path, torch.float8_e4m3fn), [LoraChoice(path=lora)], tmp_path / "o.safetensors", device=CPU, flag="--o"
    )
    weight = load_file(tmp_path / "o.safetensors")[f"{MODULES[0]}.weight"]
    assert weight.dtype == torch.float8_e4m3fn and weight.float().isfinite().all()
    assert weight.float().abs().max() == torch.finfo(torch.float8_e4m3fn).max


def test_patterns_and_multipliers_belong_to_their_lora(loras, tmp_path: Path) -> None:
    first, second = loras
    flags = LoraSourceFlags(
        lora_weight=loras,
        lora_multiplier=(0.5,),
        include_patterns=("", "single"),
        exclude_patterns=(r"transformer_blocks\.0\.attn",),
    )
    weights = merged(base(tmp_path), *lora_choices(flags))
    stored = base_tensors(torch.float32)
    wanted = {MODULES[0]: 0.0, MODULES[1]: 0.5 * delta(first, MODULES[1]) + delta(second, MODULES[1])}
    for module, change in wanted.items():
        torch.testing.assert_close(weights[f"{module}.weight"].double(), stored[f"{module}.weight"].double() + change)


def test_fused_layers_of_another_layout_are_merged_in_parts(demo_models, tmp_path: Path) -> None:
    """HunyuanVideo's one matrix for query, key and value is three of FramePack's."""
    checkpoint = open_transformer(str(demo_models.dit))
    width = checkpoint.shapes["transformer_blocks.0.attn.to_q.weight"][0]
    down, up = random(RANK, width, seed=3), random(3 * width, RANK, seed=4)
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    tensors = {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up, f"{name}.alpha": torch.tensor(1.0)}
    save_file(tensors, tmp_path / "hv.safetensors")
    stored = {key: tensor for key, tensor in checkpoint.read() if "transformer_blocks.0.attn" in key}
    weights = merged(checkpoint, LoraChoice(path=str(tmp_path / "hv.safetensors")))
    for number, part in enumerate(("to_q", "to_k", "to_v")):
        key = f"transformer_blocks.0.attn.{part}.weight"
        wanted = stored[key].float() + up[number * width : (number + 1) * width] @ down / RANK
        torch.testing.assert_close(weights[key], wanted, rtol=1e-6, atol=1e-6)


# ---- what is asked for ----


def test_multipliers_are_one_unless_given() -> None:
    flags = LoraSourceFlags(lora_weight=("a", "b", "c"), lora_multiplier=(0.5, 0.0))
    assert [(c.path, c.multiplier) for c in lora_choices(flags)] == [("a", 0.5), ("b", 0.0), ("c", 1.0)]


@pytest.mark.parametrize("name", ["lora_multiplier", "include_patterns", "exclude_patterns"])
def test_more_values_than_loras_are_an_error(name: str) -> None:
    values = (1.0, 1.0) if name == "lora_multiplier" else ("a", "b")
    with pytest.raises(UserError, match=f"--{name}: got 2 values for 1 LoRA files"):
        lora_choices(LoraSourceFlags(lora_weight=("a",), **{name: values}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_multipliers_are_numbers(value: float) -> None:
    with pytest.raises(UserError, match="--lora_multiplier"):
        lora_choices(LoraSourceFlags(lora_weight=("a",), lora_multiplier=(value,)))


@pytest.mark.parametrize(
    ("text", "path", "multiplier"),
    [
        ("絵.safetensors", "絵.safetensors", 1.0),
        ("絵.safetensors:0.8", "絵.safetensors", 0.8),
        (r"C:\絵\a.safetensors", r"C:\絵\a.safetensors", 1.0),
        (r"C:\絵\a.safetensors:-1", r"C:\絵\a.safetensors", -1.0),
        ("a b.safetensors : 2", "a b.safetensors", 2.0),
    ],
)
def test_a_prompts_lora_may_have_a_multiplier(text: str, path: str, multiplier: float) -> None:
    found = parse_prompt_lora(text)
    assert (found.path, found.multiplier) == (path, multiplier)


@pytest.mark.parametrize("multiplier", ["0,5", "", "much"])
def test_a_multiplier_that_is_no_number_is_named(multiplier: str, tmp_path: Path) -> None:
    (tmp_path / "絵.safetensors").touch()
    with pytest.raises(UserError, match="no multiplier"):
        parse_prompt_lora(f"{tmp_path / '絵.safetensors'}:{multiplier}")


def test_a_file_of_exactly_that_name_wins(tmp_path: Path) -> None:
    path = tmp_path / "a:0.8"
    path.touch()
    assert parse_prompt_lora(str(path)).path == str(path)


# ---- the report ----


def test_a_whole_match_is_said_and_a_partial_one_warned_about(tmp_path: Path, caplog) -> None:
    caplog.set_level(logging.INFO)
    whole = write_lora(tmp_path / "全部.safetensors", 1)
    part = write_lora(tmp_path / "一部.safetensors", 1, modules=(MODULES[0], "transformer_blocks.7.attn.to_k"))
    plan_merge([LoraChoice(path=whole, multiplier=0.5), LoraChoice(path=part)], base(tmp_path))
    (first, second) = caplog.records
    assert first.levelno == logging.INFO and "2 of 2" in first.message and "multiplier 0.5" in first.message
    assert second.levelno == logging.WARNING
    assert "1 of 2" in second.message and "transformer_blocks.7.attn.to_k" in second.message


def test_no_match_at_all_is_an_error(tmp_path: Path) -> None:
    lora = write_lora(tmp_path / "他.safetensors", 1, modules=("transformer_blocks.7.attn.to_k",))
    with pytest.raises(UserError, match="lora_unet_transformer_blocks_7_attn_to_k"):
        plan_merge([LoraChoice(path=lora)], base(tmp_path))


def test_codes_are_not_added_to(loras, tmp_path: Path) -> None:
    """Adding to a quantised number without its scale would lose the LoRA."""
    tensors = base_tensors(torch.float8_e4m3fn) | {f"{MODULES[0]}.scale_weight": torch.ones(1)}
    save_file(tensors, tmp_path / "q.safetensors")
    checkpoint, choices = open_checkpoint(tmp_path / "q.safetensors", flag="--dit"), [LoraChoice(path=loras[0])]
    with pytest.raises(UserError, match=r"--dit.*scale_weight"):
        merge_into_file(checkpoint, choices, tmp_path / "o.safetensors", device=CPU, flag="--o")
    with pytest.raises(RuntimeError, match="codes"):
        merged(checkpoint, *choices)
    save_file(base_tensors(torch.int8), tmp_path / "q.safetensors")
    with pytest.raises(UserError, match=r"--dit.*type I8"):
        plan_merge(choices, open_checkpoint(tmp_path / "q.safetensors", flag="--dit"))


def test_no_weight_is_loaded_without_its_lora(loras, tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="without its LoRA"),
        plan_merge([LoraChoice(path=loras[0])], base(tmp_path)).reading(CPU) as change,
    ):
        change(f"{MODULES[0]}.weight", torch.zeros(ROWS, COLUMNS))


# ---- into a file ----


def test_a_merged_model_loads_as_the_model_that_was_merged_while_loading(demo_models, tmp_path: Path) -> None:
    checkpoint = open_transformer(str(demo_models.dit))
    names = ("transformer_blocks.0.ff.net.2", "single_transformer_blocks.0.proj_out")
    tensors = {}
    for name in names:
        rows, columns = checkpoint.shapes[f"{name}.weight"]
        tensors[f"transformer.{name}.lora_A.weight"] = random(RANK, columns, seed=1)
        tensors[f"transformer.{name}.lora_B.weight"] = random(rows, RANK, seed=2)
    save_file(tensors, tmp_path / "名.safetensors")
    choices = [LoraChoice(path=str(tmp_path / "名.safetensors"), multiplier=0.25)]
    output = tmp_path / "新しい" / "merged.safetensors"
    merge_into_file(checkpoint, choices, output, device=CPU, flag="--save_merged_model")

    stored, written = dict(checkpoint.read()), load_file(output)
    assert {k: (t.dtype, t.shape) for k, t in written.items()} == {k: (t.dtype, t.shape) for k, t in stored.items()}
    for key, tensor in stored.items():
        if key.removesuffix(".weight") in names:
            down, up = (tensors[f"transformer.{key.removesuffix('.weight')}.lora_{x}.weight"] for x in "AB")
            tensor = (tensor.float() + 0.25 * up @ down).to(tensor.dtype)
        assert torch.equal(written[key], tensor), key
    with safe_open(output, framework="pt") as file:
        assert json.loads(file.metadata()["merged_loras"]) == [{"name": "名.safetensors", "multiplier": 0.25}]

    while_loading = load_transformer(
        checkpoint, dtype=torch.bfloat16, device="cpu", merge=plan_merge(choices, checkpoint)
    )
    from_file = load_transformer(open_transformer(str(output)), dtype=torch.bfloat16, device="cpu")
    for name, tensor in from_file.state_dict().items():
        assert torch.equal(tensor, while_loading.state_dict()[name]), name


def test_the_same_command_writes_the_same_bytes(loras, tmp_path: Path) -> None:
    outputs = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    for output in outputs:
        merge_into_file(base(tmp_path), [LoraChoice(path=loras[0])], output, device=CPU, flag="--o")
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


def test_a_merged_model_is_never_in_memory_as_a_whole(loras, tmp_path: Path, monkeypatch) -> None:
    """When a tensor is read, those before it are gone."""
    import weakref

    alive, most = weakref.WeakSet(), 0
    read = Checkpoint.read

    def watched(self):
        nonlocal most
        for name, tensor in read(self):
            alive.add(tensor)
            most = max(most, len(alive))
            yield name, tensor
            del tensor

    monkeypatch.setattr(Checkpoint, "read", watched)
    checkpoint = base(tmp_path)
    merge_into_file(checkpoint, [LoraChoice(path=loras[0])], tmp_path / "o.safetensors", device=CPU, flag="--o")
    loras_own = 6  # the factors of one LoRA, which are read as a checkpoint too
    assert most <= loras_own + 2


def test_types_of_every_width_are_read_back_by_the_library(tmp_path: Path) -> None:
    """The format demands that data lie without gaps; readers, that each tensor is aligned to its own size."""
    tensors = {
        "一": torch.tensor([1, 2, 3], dtype=torch.uint8),
        "b": random(3, seed=1).to(torch.bfloat16),
        "c": torch.tensor(5.5),
        "d": torch.tensor([[1.5]], dtype=torch.float64),
        "e": torch.zeros(0, 4),
        "f": torch.tensor([True, False]),
        "g": random(3, 3, seed=2).to(torch.float8_e5m2),
        "h": random(4, 2, seed=2).T,
    }
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_tensors(tmp_path / "x.safetensors", layout, tensors.items(), {"b": "2", "a": "値"})
    for name, tensor in load_file(tmp_path / "x.safetensors").items():
        assert tensor.dtype == tensors[name].dtype and torch.equal(
            tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor,
            tensors[name].contiguous().view(torch.uint8) if tensor.ndim else tensors[name],
        ), name
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"a": "値", "b": "2"} and len(file.keys()) == len(tensors)


@pytest.mark.parametrize("given", [["a"], ["a", "b", "b"], ["a", "c", "b"]])
def test_a_file_is_not_written_with_other_tensors_than_announced(given: list[str], tmp_path: Path) -> None:
    layout = {"a": (torch.float32, (2,)), "b": (torch.float32, (2,))}
    with pytest.raises(ValueError, match="b|c"):
        write_tensors(tmp_path / "x.safetensors", layout, [(name, torch.ones(2)) for name in given], {})
    assert list(tmp_path.iterdir()) == []


def test_the_models_own_file_is_not_overwritten(loras, tmp_path: Path) -> None:
    checkpoint = base(tmp_path)
    before = checkpoint.files[0].read_bytes()
    with pytest.raises(UserError, match="--o.*another file"):
        merge_into_file(checkpoint, [LoraChoice(path=loras[0])], checkpoint.files[0], device=CPU, flag="--o")
    assert checkpoint.files[0].read_bytes() == before


def test_the_loras_own_file_is_not_overwritten(loras, tmp_path: Path) -> None:
    before = Path(loras[0]).read_bytes()
    with pytest.raises(UserError, match="--o.*another file than --lora_weight"):
        merge_into_file(base(tmp_path), [LoraChoice(path=loras[0])], loras[0], device=CPU, flag="--o")
    assert Path(loras[0]).read_bytes() == before


@pytest.mark.parametrize("multiplier", [1e38, -1e38])
def test_sums_that_are_no_numbers_are_refused_by_name(multiplier: float, loras, tmp_path: Path) -> None:
    output = tmp_path / "o.safetensors"
    with pytest.raises(UserError, match="--lora_weight: got .*weight with infinite numbers"):
        choice = LoraChoice(path=write_lora(tmp_path / "大.safetensors", 1, alpha=1e5), multiplier=multiplier)
        merge_into_file(base(tmp_path), [choice], output, device=CPU, flag="--o")
    assert not output.exists()


def test_merging_into_8_bits_is_warned_about(loras, tmp_path: Path, caplog) -> None:
    for dtype, is_warned in ((torch.float8_e4m3fn, True), (torch.bfloat16, False)):
        caplog.clear()
        merge_into_file(
            base(tmp_path, dtype), [LoraChoice(path=loras[0])], tmp_path / "o.safetensors", device=CPU, flag="--o"
        )
        assert any("8-bit" in record.message for record in caplog.records) == is_warned


def test_a_type_that_torch_does_not_know_is_named(loras, tmp_path: Path) -> None:
    checkpoint = base(tmp_path)
    name = "norm_out.linear.weight"
    strange = {**checkpoint.tensors, name: replace(checkpoint.tensors[name], dtype="F8_E3M4")}
    with pytest.raises(UserError, match="norm_out.linear.weight of type F8_E3M4"):
        merge_into_file(
            replace(checkpoint, tensors=strange),
            [LoraChoice(path=loras[0])],
            tmp_path / "o.safetensors",
            device=CPU,
            flag="--o",
        )


def test_a_name_that_is_too_long_is_refused_before_the_work(loras, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="255 bytes"):
        output = tmp_path / f"{'絵' * 90}.safetensors"
        merge_into_file(base(tmp_path), [LoraChoice(path=loras[0])], output, device=CPU, flag="--o")


def test_a_disk_without_room_is_noticed_before_anything_is_read(loras, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    with pytest.raises(UserError, match="free"):
        merge_into_file(base(tmp_path), [LoraChoice(path=loras[0])], tmp_path / "o.safetensors", device=CPU, flag="--o")


def test_a_disk_that_fills_up_leaves_nothing_behind(loras, tmp_path: Path, monkeypatch) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoint = base(tmp_path)
    monkeypatch.setattr("common.checkpoint_writer._bytes", full)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="--o: got No space left on device at"):
        merge_into_file(checkpoint, [LoraChoice(path=loras[0])], tmp_path / "o.safetensors", device=CPU, flag="--o")
    assert sorted(tmp_path.iterdir()) == before


def test_a_merged_model_needs_a_lora_and_a_name(loras, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--lora_weight"):
        merge_into_file(base(tmp_path), [], tmp_path / "o.safetensors", device=CPU, flag="--o")
    with pytest.raises(UserError, match=r"\.safetensors"):
        merge_into_file(base(tmp_path), [LoraChoice(path=loras[0])], tmp_path / "o.pt", device=CPU, flag="--o")
