"""LoRA files: names, types, bytes, metadata, hashes."""

import hashlib
import json
import struct
from datetime import datetime

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import nn

from common.weights import TORCH_DTYPES, open_checkpoint
from networks import loha, lokr, lora_framepack
from networks.lora_metadata import model_hashes, modelspec, read_metadata, training_metadata, write_lora
from networks.network import Network
from options.errors import UserError

NAME = "lora_unet_transformer_blocks_0_attn_to_q"


def network(kind=lora_framepack, dim: int = 2, width: int = 24) -> Network:
    transformer, block = nn.Module(), nn.Module()
    block.attn = nn.Module()
    block.attn.to_q = nn.Linear(width, 30)
    transformer.transformer_blocks = nn.ModuleList([block])
    network = kind.create_network(transformer, dim=dim, alpha=0.3, args={})
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    return network


@pytest.mark.parametrize(
    ("kind", "shapes"),
    [
        (lora_framepack, {"lora_down.weight": [2, 24], "lora_up.weight": [30, 2]}),
        (loha, {"hada_w1_a": [30, 2], "hada_w1_b": [2, 24], "hada_w2_a": [30, 2], "hada_w2_b": [2, 24]}),
        (lokr, {"lokr_w1": [5, 4], "lokr_w2_a": [6, 2], "lokr_w2_b": [2, 6]}),
    ],
)
def test_files_have_the_native_names_and_shapes(tmp_path, kind, shapes: dict[str, list[int]]) -> None:
    path = tmp_path / "出力" / "名前 [x].safetensors"
    network(kind).save(path, metadata={})
    found = {key: list(tensor.shape) for key, tensor in load_file(path).items()}
    assert found == {f"{NAME}.{part}": shape for part, shape in (shapes | {"alpha": []}).items()}
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("kind", [lora_framepack, loha, lokr])
def test_round_trip_is_exact_to_the_byte(tmp_path, kind) -> None:
    first, second = network(kind), network(kind)
    for parameter in second.parameters():
        nn.init.zeros_(parameter)
    first.save(tmp_path / "a.safetensors", metadata={"ss_output_name": "名前", "b": "2", "a": "1"})
    second.load_tensors(load_file(tmp_path / "a.safetensors"), where="file")
    second.save(tmp_path / "b.safetensors", metadata={"a": "1", "b": "2", "ss_output_name": "名前"})
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_every_tensor_is_saved_in_the_asked_type(tmp_path) -> None:
    source = network()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        source.save(tmp_path / "x.safetensors", dtype=dtype, metadata={})
        saved = load_file(tmp_path / "x.safetensors")
        assert {tensor.dtype for tensor in saved.values()} == {dtype}
        assert all(torch.equal(saved[key], tensor.to(dtype)) for key, tensor in source.state_dict().items())
    assert {tensor.dtype for tensor in source.state_dict().values()} == {torch.float32}


def test_hashes_are_of_the_data_with_training_metadata_only(tmp_path) -> None:
    source = network(dim=64, width=6000)  # large enough for the place that the short hash looks at
    metadata = training_metadata({"network_dim": 64}) | {"modelspec.title": "題"}
    source.save(tmp_path / "x.safetensors", metadata=metadata)
    content = (tmp_path / "x.safetensors").read_bytes()
    (header,) = struct.unpack("<Q", content[:8])
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        saved = file.metadata()
    assert saved["sshs_model_hash"] == hashlib.sha256(content[8 + header :]).hexdigest()
    alone = save(load_file(tmp_path / "x.safetensors"), {"ss_network_dim": "64"})
    assert saved["sshs_legacy_hash"] == hashlib.sha256(alone[0x100000:0x110000]).hexdigest()[:8]
    assert {key: saved[key] for key in metadata} == metadata
    assert list(json.loads(content[8 : 8 + header])["__metadata__"]) == sorted(saved)


@pytest.mark.parametrize("num_rows", [1, 300, 4000])
def test_hashes_are_those_of_a_whole_file_of_any_types(num_rows: int) -> None:
    """The place of the short hash: behind the file's end, across several tensors, and within one."""
    dtypes = [getattr(torch, name) for name in reversed(TORCH_DTYPES.values())]
    tensors = {f"重み {i % 3}.{i}": torch.randn(num_rows, 97).to(dtype) for i, dtype in enumerate(dtypes)}
    tensors |= {"scalar": torch.tensor(1.5), "empty": torch.empty(0, 4), "turned": torch.randn(7, num_rows).T}
    # Characters that JSON writes in more than one way.
    metadata = {"ss_tags": '"犬" \\ / \x7f \n \x01 é'}
    content = save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata)
    (header,) = struct.unpack("<Q", content[:8])
    assert model_hashes(tensors, {"modelspec.title": "題", **metadata}) == {
        "sshs_model_hash": hashlib.sha256(content[8 + header :]).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8],
    }


def test_hashing_holds_no_second_copy_of_the_file(monkeypatch) -> None:
    import safetensors.torch

    sizes, original = [], safetensors.torch.save

    def counted(tensors: dict, metadata: dict) -> bytes:
        sizes.append(sum(tensor.numel() for tensor in tensors.values()))
        return original(tensors, metadata)

    monkeypatch.setattr(safetensors.torch, "save", counted)
    model_hashes(network(dim=64).state_dict(), {})
    assert sum(sizes) == 0


@pytest.mark.parametrize("metadata", [None, {"ss_comment": "着せ替え", "a": "1"}])
def test_metadata_is_read_as_the_library_reads_it(metadata: dict | None, tmp_path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors", metadata)
    assert read_metadata(open_checkpoint(tmp_path / "x.safetensors", flag="--input")) == (metadata or {})


@pytest.mark.parametrize("metadata", ["3", '["a"]', '{"a": 1}', '{"a": null}'])
def test_metadata_of_another_kind_is_damage(metadata: str, tmp_path) -> None:
    header = f'{{"__metadata__": {metadata}, "x": {{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}}}'.encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(UserError, match=r"^--input .*x\.safetensors: got metadata of another kind"):
        read_metadata(open_checkpoint(tmp_path / "x.safetensors", flag="--input"))


def test_a_title_leaves_the_hashes_and_a_weight_does_not() -> None:
    tensors = network(dim=64, width=6000).state_dict()
    before = model_hashes(tensors, {"ss_seed": "1"})
    assert model_hashes(tensors, {"ss_seed": "1", "modelspec.title": "other"}) == before
    changed = {key: tensor + 1 for key, tensor in tensors.items()}
    after = model_hashes(changed, {"ss_seed": "1"})
    assert all(after[key] != value for key, value in before.items())


def test_old_hashes_are_replaced(tmp_path) -> None:
    write_lora(
        tmp_path / "x.safetensors", network().state_dict(), {"sshs_model_hash": "old", "sshs_legacy_hash": "old"}
    )
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert "old" not in file.metadata().values()


def test_failed_write_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    import safetensors.torch

    def fail(*_: object) -> None:
        raise OSError("No space left on device")

    path = tmp_path / "x.safetensors"
    network().save(path, metadata={})
    before = path.read_bytes()
    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        network().save(path, metadata={"a": "b"})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_training_metadata_is_text_with_none_spelled_out() -> None:
    facts = {"network_dim": 4, "network_alpha": 1.0, "seed": None, "network_module": "networks.lora_framepack"}
    facts |= {"base_model_version": "framepack", "network_args": '{"factor": "4"}'}
    whole = training_metadata(facts)
    assert whole["ss_network_dim"] == "4" and whole["ss_network_alpha"] == "1.0" and whole["ss_seed"] == "None"
    assert set(whole) == {f"ss_{name}" for name in facts}
    assert set(training_metadata(facts, minimal=True)) == set(whole) - {"ss_seed"}


def test_modelspec_has_the_published_keys() -> None:
    given = {"architecture": "framepack", "implementation": "https://github.com/lllyasviel/FramePack", "title": "題"}
    date = datetime(2026, 1, 2, 3, 4, 5, 678)
    assert modelspec(**given, date=date) == {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "framepack/lora",
        "modelspec.implementation": "https://github.com/lllyasviel/FramePack",
        "modelspec.title": "題",
        "modelspec.resolution": "1280x720",
        "modelspec.date": "2026-01-02T03:04:05",
    }
    texts = {"author": "作者", "description": "d", "license": "l", "tags": "t", "resolution": "640x640"}
    full = modelspec(**given, date=date, **texts)
    assert {key.removeprefix("modelspec."): full[key] for key in full}.items() >= texts.items()


@pytest.mark.parametrize(
    ("given", "wanted"), [((None, 500), "0,500"), ((100, None), "100,1000"), ((0, 0), "0,0"), ((None, None), None)]
)
def test_modelspec_names_the_timestep_range_when_one_side_is_given(given, wanted: str | None) -> None:
    spec = modelspec(architecture="a", implementation="i", title="t", date=datetime(2026, 1, 1), timestep_range=given)
    assert spec.get("modelspec.timestep_range") == wanted
