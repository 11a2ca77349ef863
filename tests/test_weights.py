"""Checkpoints: every form that weights come in, every way in which they can be broken."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from common.weights import check_names_and_shapes, empty_module, load_weights, open_checkpoint
from options.errors import UserError


class Model(nn.Module):
    """One of everything that a state dict can hold, and a buffer that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("steps", torch.arange(3))
        self.register_buffer("table", torch.arange(5.0), persistent=False)


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn_like(t) if t.is_floating_point() else t for name, t in Model().state_dict().items()}


def load(path: Path, **options) -> dict[str, torch.Tensor]:
    return dict(open_checkpoint(path, flag="--dit", **options).read())


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(found[name].float(), tensor.float()), name


def save_shards(folder: Path, tensors: dict[str, torch.Tensor], count: int = 3) -> Path:
    names = list(tensors)
    for i in range(count):
        part = {name: tensors[name] for name in names[i::count]}
        save_file(part, folder / f"model-{i + 1:05d}-of-{count:05d}.safetensors")
    return folder / f"model-00001-of-{count:05d}.safetensors"


@pytest.mark.parametrize("memmap", [True, False])
def test_one_file_in_a_folder_with_a_japanese_name(tmp_path: Path, tensors, memmap: bool) -> None:
    file = tmp_path / "\u91cd\u307f model.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    assert_equal(load(file, memmap=memmap), tensors)
    checkpoint = open_checkpoint(str(file), flag="--dit")
    assert checkpoint.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert checkpoint.config == {}


def test_every_type_reads_the_same_with_and_without_a_memory_map(tmp_path: Path) -> None:
    types = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
    types += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
    values = {str(dtype): torch.tensor([[0, 1], [3, 2]]).to(dtype) for dtype in types}
    save_file(values | {"empty": torch.empty(0, 4), "scalar": torch.tensor(1.5)}, tmp_path / "types.safetensors")
    assert_equal(load(tmp_path / "types.safetensors", memmap=False), load(tmp_path / "types.safetensors"))


def test_any_shard_of_a_set_means_the_set(tmp_path: Path, tensors) -> None:
    save_shards(tmp_path, tensors)
    for i in (1, 3):
        checkpoint = open_checkpoint(tmp_path / f"model-0000{i}-of-00003.safetensors", flag="--dit")
        assert len(checkpoint.files) == 3
        assert_equal(dict(checkpoint.read()), tensors)


def test_missing_shard(tmp_path: Path, tensors) -> None:
    first = save_shards(tmp_path, tensors)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(UserError, match=r"--dit: .*all 3 shards.*add model-00002-of-00003\.safetensors"):
        open_checkpoint(first, flag="--dit")


def test_a_folder_means_its_subfolder_else_itself(tmp_path: Path, tensors) -> None:
    (tmp_path / "vae").mkdir()
    save_file({"other": torch.zeros(1)}, tmp_path / "a.safetensors")
    assert list(load(tmp_path, subfolder="vae")) == ["other"]
    save_shards(tmp_path / "vae", tensors)
    (tmp_path / "vae" / "config.json").write_text('{"model_type": "x"}', encoding="utf-8")
    assert_equal(load(tmp_path, subfolder="vae"), tensors)
    assert open_checkpoint(tmp_path, flag="--vae", subfolder="vae").config == {"model_type": "x"}
    assert list(load(tmp_path)) == ["other"]


def test_a_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--vae: got the folder .*expected \*\.safetensors in .*vae or "):
        open_checkpoint(tmp_path, flag="--vae", subfolder="vae")
    with pytest.raises(UserError, match="--vae: got .*nothing.*an existing file or folder"):
        open_checkpoint(tmp_path / "nothing", flag="--vae")


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("memmap", [True, False])
@pytest.mark.parametrize("legacy", [True, False])
def test_torch_files(tmp_path: Path, tensors, wrapped: bool, memmap: bool, legacy: bool) -> None:
    file = tmp_path / "\u91cd\u307f.pt"
    content = {"state_dict": tensors, "epoch": 3} if wrapped else tensors
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    assert_equal(load(file, memmap=memmap), tensors)


class Hostile:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, tensors) -> None:
    torch.save({"state_dict": tensors, "x": Hostile(tmp_path / "made")}, tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"--vae: .*model\.pt; expected a torch file with tensors only"):
        open_checkpoint(tmp_path / "model.pt", flag="--vae")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("content", [b"", b"PK", b"\x80\x02}q\x00.", b"no pickle at all", b"\x00" * 100])
def test_a_damaged_pickle(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.pth").write_bytes(content)
    with pytest.raises(UserError, match=r"--vae: got .*model\.pth"):
        open_checkpoint(tmp_path / "model.pth", flag="--vae")


def test_a_truncated_pickle(tmp_path: Path, tensors) -> None:
    torch.save(tensors, tmp_path / "model.pt")
    data = (tmp_path / "model.pt").read_bytes()
    (tmp_path / "model.pt").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="damaged"):
        open_checkpoint(tmp_path / "model.pt", flag="--vae")


def test_a_pickle_without_tensors(tmp_path: Path) -> None:
    torch.save({"epoch": 1}, tmp_path / "model.pt")
    with pytest.raises(UserError, match="holds a state dict"):
        open_checkpoint(tmp_path / "model.pt", flag="--vae")


def test_a_truncated_file_at_any_length(tmp_path: Path, tensors) -> None:
    save_file(tensors, tmp_path / "whole.safetensors")
    data = (tmp_path / "whole.safetensors").read_bytes()
    header_end = 8 + struct.unpack("<Q", data[:8])[0]
    for size in (0, 4, 8, 40, header_end, len(data) - 1):
        (tmp_path / "cut.safetensors").write_bytes(data[:size])
        with pytest.raises(UserError, match=rf"--dit: got .*cut\.safetensors, {size} bytes"):
            open_checkpoint(tmp_path / "cut.safetensors", flag="--dit")


@pytest.mark.parametrize(
    "header", ["[1, 2]", '"text"', "{}", '{"__metadata__": {}}', '{"w": 3}', '{"w": {"dtype": "F32"}}', "{no json"]
)
def test_a_header_that_is_none(tmp_path: Path, header: str) -> None:
    data = header.encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(data)) + data + b"\x00" * 16)
    with pytest.raises(UserError, match=r"--dit: got .*x\.safetensors"):
        open_checkpoint(tmp_path / "x.safetensors", flag="--dit")


ENTRIES = {
    "a digit of the shape": {"shape": [4, 4]},
    "another number of bits": {"dtype": "F16"},
    "a negative size": {"shape": [-4, -3]},
    "no type": {"dtype": "X32"},
    "a number for a type": {"dtype": 32},
    "no shape": {"shape": 12},
    "half a size": {"shape": [4.0, 3.0]},
    "a place before the data": {"data_offsets": [-48, 0]},
    "a place that runs backwards": {"data_offsets": [48, 0]},
    "half a place": {"data_offsets": [48]},
}


@pytest.mark.parametrize("change", ENTRIES)
def test_an_entry_that_does_not_fill_its_place_is_named(tmp_path: Path, change: str) -> None:
    good = {"dtype": "F32", "shape": [4, 3], "data_offsets": [0, 48]}
    for entry in (good, good | ENTRIES[change]):
        data = json.dumps({"重み": entry}, ensure_ascii=False).encode()
        (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(data)) + data + b"\x00" * 48)
        if entry is good:
            assert load(tmp_path / "x.safetensors", memmap=False)["重み"].shape == (4, 3)
            continue
        with pytest.raises(UserError, match=r"^--dit: got .*x\.safetensors, 重み: .*download it again$"):
            open_checkpoint(tmp_path / "x.safetensors", flag="--dit")


def test_types_that_only_newer_programs_know_are_no_damage(tmp_path: Path) -> None:
    """Half bytes, and one byte of exponents: their places are checked too."""
    entries = {"a": ("F4", [3, 2], 3), "b": ("F8_E8M0", [3], 3), "c": ("U16", [1], 2), "d": ("C64", [1], 8)}
    header, end = {}, 0
    for name, (dtype, shape, num_bytes) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + num_bytes]}
        end += num_bytes
    data = json.dumps(header).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(data)) + data + b"\x00" * end)
    assert list(open_checkpoint(tmp_path / "x.safetensors", flag="--dit").tensors) == list(entries)


@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff\xfe"])
def test_a_damaged_config(tmp_path: Path, tensors, content: bytes) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=r"config\.json.*repair it, or remove it"):
        open_checkpoint(tmp_path / "x.safetensors", flag="--dit")


def checkpoint_of(tmp_path: Path, tensors: dict[str, torch.Tensor]):
    save_file(tensors, tmp_path / "x.safetensors")
    return open_checkpoint(tmp_path / "x.safetensors", flag="--dit")


def test_dimensions_are_read_from_shapes(tmp_path: Path, tensors) -> None:
    checkpoint = checkpoint_of(tmp_path, tensors)
    assert checkpoint.count("blocks.{}.weight") == 2
    assert checkpoint.count("other.{}.weight") == 0
    assert checkpoint.shape("first.weight", 2) == (4, 3)
    with pytest.raises(UserError, match=r"8 tensors without first\.weigt; .*incomplete"):
        checkpoint.shape("first.weigt", 2)
    with pytest.raises(UserError, match=r"first\.bias of shape \(4,\); expected 2 dimensions"):
        checkpoint.shape("first.bias", 2)


def test_renamed_and_dropped_tensors_read_from_the_old_names(tmp_path: Path, tensors) -> None:
    checkpoint = checkpoint_of(tmp_path, {f"model.{name}": t for name, t in tensors.items()} | {"extra": torch.ones(1)})
    renamed = checkpoint.rename(lambda name: name.removeprefix("model.") if name.startswith("model.") else None)
    assert_equal(dict(renamed.read()), tensors)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_load(tmp_path: Path, tensors, dtype: torch.dtype | None) -> None:
    model = empty_module(Model)
    assert model.first.weight.is_meta and not model.table.is_meta and not model.training
    load_weights(model, checkpoint_of(tmp_path, tensors), dtype=dtype, device="cpu")
    wanted = {name: t.to(dtype) if dtype and t.is_floating_point() else t for name, t in tensors.items()}
    assert_equal(model.state_dict(), wanted)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model.table, torch.arange(5.0))


def test_buffers_that_no_file_holds_move_too(tmp_path: Path, tensors) -> None:
    model = empty_module(Model)
    load_weights(model, checkpoint_of(tmp_path, tensors), dtype=None, device="meta")
    assert model.table.device.type == "meta"


def test_the_report_is_one_line(tmp_path: Path, tensors, caplog) -> None:
    with caplog.at_level("INFO"):
        load_weights(empty_module(Model), checkpoint_of(tmp_path, tensors), dtype=torch.float16, device="cpu")
    assert [record.getMessage() for record in caplog.records] == ["--dit: 8 tensors, 0.00 MB, from 1 file"]


def test_an_unexpected_tensor_is_named_with_the_nearest_missing_one(tmp_path: Path, tensors) -> None:
    tensors["first.wieght"] = tensors.pop("first.weight")
    with pytest.raises(UserError, match=r"got 1 unexpected tensors, first\.wieght first.*mean first\.weight"):
        check_names_and_shapes(Model(), checkpoint_of(tmp_path, tensors))


def test_an_unexpected_tensor_without_a_missing_one(tmp_path: Path, tensors) -> None:
    with pytest.raises(UserError, match=r"blocks\.2\.weight first; expected only the tensors of Model; the file is"):
        check_names_and_shapes(Model(), checkpoint_of(tmp_path, tensors | {"blocks.2.weight": torch.zeros(4, 4)}))


def test_a_missing_tensor_is_named(tmp_path: Path, tensors) -> None:
    del tensors["blocks.1.bias"]
    with pytest.raises(UserError, match=r"got no blocks\.1\.bias \(1 missing of 8\); expected all tensors of Model"):
        check_names_and_shapes(Model(), checkpoint_of(tmp_path, tensors))


def test_a_wrong_shape_is_named(tmp_path: Path, tensors) -> None:
    tensors["first.weight"] = torch.zeros(4, 5)
    with pytest.raises(UserError, match=r"got first\.weight of shape \(4, 5\); expected \(4, 3\)"):
        check_names_and_shapes(Model(), checkpoint_of(tmp_path, tensors))


def test_nothing_is_read_before_the_names_fit(tmp_path: Path, tensors) -> None:
    del tensors["scale"]
    model = empty_module(Model)
    with pytest.raises(UserError):
        load_weights(model, checkpoint_of(tmp_path, tensors), dtype=None, device="cpu")
    assert all(parameter.is_meta for parameter in model.parameters())


def test_messages_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(json.dumps({"a": 1}).encode())
    with pytest.raises(UserError) as error:
        open_checkpoint(tmp_path / "x.safetensors", flag="--dit")
    assert "\n" not in str(error.value)
