"""Checkpoints: found, described from their headers, told apart, and loaded strictly, tensor by tensor.

A `Checkpoint` knows names, shapes and types without having read a weight, so a wrong file is noticed at the door.
torch is imported only when a pickle is opened or weights are loaded.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import math
import os
import re
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from common.files import existing_file
from options.errors import UserError, did_you_mean, one_line

if TYPE_CHECKING:
    import torch
    from torch import nn

    Place = torch.device | str | Callable[[str], torch.device | str]
    """One device for all tensors, or one for each name."""

logger = logging.getLogger(__name__)

PICKLE_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt"}
SHARD_NAME = re.compile(r"(?P<prefix>.*?)(?P<index>\d+)-of-(?P<count>0*[1-9]\d*)\.safetensors")
DTYPE = re.compile(r"BOOL|BF16|[CFIU]\d+(_[A-Z0-9]+)?")
"""Types that safetensors has or may get; the number is that of bits."""
MAX_HEADER_BYTES = 100_000_000
"""The format's own limit."""
NUM_SAMPLES, SAMPLE_BYTES = 64, 1 << 16
TORCH_DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "BOOL": "bool", "U8": "uint8"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8"},
}
"""How safetensors and torch spell a type."""


@dataclass(frozen=True, kw_only=True)
class TensorInfo:
    """Where a tensor lies and what it is."""

    file: Path
    key: str
    """Its name in the file; a `Checkpoint` may list it under another."""
    dtype: str
    """As safetensors spells it (`BF16`, `F32`), for pickles as torch does (`bfloat16`)."""
    shape: tuple[int, ...]
    """That it is listed with."""
    rows: tuple[int, int] | None = None
    """First and end, where it is only a part of what is stored under `key`."""

    @property
    def num_bytes(self) -> int:
        name = TORCH_DTYPES.get(self.dtype, self.dtype)
        bits = 8 if name == "bool" else int(re.sub(r"\D*(\d+).*", r"\1", name))
        return math.prod(self.shape) * bits // 8

    def part_of(self, stored: torch.Tensor) -> torch.Tensor:
        """This tensor out of what is stored under its key."""
        return (stored if self.rows is None else stored[slice(*self.rows)]).reshape(self.shape)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One model's tensors, over however many files, described but not read."""

    flag: str
    """The flag that named it, for messages."""
    path: Path
    """The file or folder as the user gave it."""
    files: tuple[Path, ...]
    tensors: Mapping[str, TensorInfo]
    config: Mapping[str, object]
    """The `config.json` beside the files; empty when there is none."""
    memmap: bool = True
    """False reads with plain file reads, for network drives on which memory maps are slow."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: info.shape for name, info in self.tensors.items()}

    @property
    def num_bytes(self) -> int:
        """Of all tensors as they are stored."""
        return sum(info.num_bytes for info in self.tensors.values())

    def shape(self, name: str, num_dims: int) -> tuple[int, ...]:
        """The shape of a tensor from which a dimension of the model is read.

        Raises:
            UserError: there is no such tensor, or it has another number of dimensions.
        """
        info = self.tensors.get(name)
        if info is None:
            got, expected = f"{len(self.tensors)} tensors without {name}", "a whole model"
            raise UserError(f"{self.flag} {self.path}", got, expected, "the file is incomplete or another model's")
        if len(info.shape) != num_dims:
            got = f"{name} of shape {info.shape}"
            raise UserError(f"{self.flag} {self.path}", got, f"{num_dims} dimensions", "the file is another model's")
        return info.shape

    def count(self, pattern: str) -> int:
        """How many of `pattern.format(0)`, `pattern.format(1)`, … there are up to the first gap: a number of layers."""
        return next(i for i in itertools.count() if pattern.format(i) not in self.tensors)

    def rename(self, rule: Callable[[str], str | None]) -> Checkpoint:
        """The same checkpoint with every name passed through `rule`; a name that becomes None is dropped."""
        renamed = {rule(name): info for name, info in self.tensors.items()}
        renamed.pop(None, None)
        return replace(self, tensors=renamed)

    def read(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields (name, tensor) file by file, each tensor in its stored type on the CPU."""
        for file in self.files:
            names: dict[str, list[str]] = {}
            for name, info in self.tensors.items():
                if info.file == file:
                    names.setdefault(info.key, []).append(name)
            with _reader(file, self.flag, self.memmap) as get_tensor:
                for key, parts in names.items():
                    whole = get_tensor(key)
                    yield from ((name, self.tensors[name].part_of(whole)) for name in parts)


def without_prefix(checkpoint: Checkpoint, anchor: str) -> Checkpoint:
    """The checkpoint without what other programs put before all names, `model.diffusion_model.` for example.

    Args:
        anchor: a tensor that the model has under this name.
    """
    prefix = next((name.removesuffix(anchor) for name in checkpoint.tensors if f".{name}".endswith(f".{anchor}")), "")
    return checkpoint.rename(lambda name: name.removeprefix(prefix)) if prefix else checkpoint


def fingerprint(checkpoint: Checkpoint) -> str:
    """A hash that tells one file from another without reading all of it: names, shapes, and samples of the content."""
    digest = hashlib.sha256(repr(sorted((n, i.dtype, i.shape) for n, i in checkpoint.tensors.items())).encode())
    for file in checkpoint.files:
        size = file.stat().st_size
        digest.update(str(size).encode())
        with file.open("rb") as stream:
            for part in range(NUM_SAMPLES):
                stream.seek(max(0, size - SAMPLE_BYTES) * part // (NUM_SAMPLES - 1))
                digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def open_checkpoint(path: str | Path, *, flag: str, subfolder: str | None = None, memmap: bool = True) -> Checkpoint:
    """Reads the headers of a safetensors file, of all shards of a set, of a snapshot folder, or of a pickle.

    Args:
        subfolder: where a snapshot folder keeps this model (`vae`, `text_encoder`); the folder itself is tried next.

    Raises:
        UserError: nothing there, a truncated file, a missing shard, or not a checkpoint at all.
    """
    files = locate(path, flag=flag, subfolder=subfolder)
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        is_pickle = file.suffix.lower() in PICKLE_SUFFIXES
        tensors |= _pickle_header(file, flag) if is_pickle else _safetensors_header(file, flag)
    config = _read_config(files[0].with_name("config.json"), flag)
    return Checkpoint(flag=flag, path=Path(path), files=files, tensors=tensors, config=config, memmap=memmap)


def locate(path: str | Path, *, flag: str, subfolder: str | None = None) -> tuple[Path, ...]:
    """The files that `path` stands for: itself, the set whose shard it is, or what a folder holds.

    Raises:
        UserError: when there is nothing, or a shard of the set is missing.
    """
    path = Path(path)
    if os.path.isdir(path):
        folders = [path / subfolder, path] if subfolder else [path]
        found = next((sorted(f.glob("*.safetensors")) for f in folders if any(f.glob("*.safetensors"))), None)
        if not found:
            looked = " or ".join(str(folder) for folder in folders)
            raise UserError(flag, f"the folder {path}", f"*.safetensors in {looked}", "give the snapshot or a file")
        path = found[0]
    existing_file(path, flag=flag, expected="an existing file or folder")
    shard = SHARD_NAME.fullmatch(path.name)
    if not shard:
        return (path,)
    count = int(shard["count"])
    files = [path.with_name(f"{shard['prefix']}{i:05d}-of-{count:05d}.safetensors") for i in range(1, count + 1)]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise UserError(flag, path, f"all {count} shards beside it", f"add {', '.join(missing)}")
    return tuple(files)


def _read_config(file: Path, flag: str) -> dict[str, object]:
    """The content of a `config.json`; empty when there is none."""
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(flag, f"{file} ({error})", "JSON", "repair it, or remove it") from error
    if not isinstance(config, dict):
        raise UserError(flag, file, "a JSON object", "repair it, or remove it")
    return config


def _safetensors_header(file: Path, flag: str) -> dict[str, TensorInfo]:
    """Names, types and shapes from the JSON header. Source: the safetensors format (8-byte length, JSON, data)."""
    size = file.stat().st_size
    header, length = None, 0
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            with suppress(ValueError):
                header = json.loads(stream.read(length))
    entries = {key: value for key, value in header.items() if key != "__metadata__"} if isinstance(header, dict) else {}
    if not entries:
        kind = "a GGUF file" if start[:4] == b"GGUF" else f"{size} bytes"
        raise UserError(flag, f"{file}, {kind}", "a safetensors file", "it is damaged or of another format")
    tensors = {key: _tensor_info(file, key, entry, flag) for key, entry in entries.items()}
    end = 8 + length + max(entry["data_offsets"][1] for entry in entries.values())
    if end > size:
        raise UserError(flag, f"{file}, {size} bytes", f"{end} bytes", "it is truncated: download it again")
    return tensors


def _tensor_info(file: Path, key: str, entry: object, flag: str) -> TensorInfo:
    """One entry of the header; raises UserError where type, shape and place do not belong together."""
    try:
        info = TensorInfo(file=file, key=key, dtype=entry["dtype"], shape=tuple(entry["shape"]))
        start, end = entry["data_offsets"]
        are_numbers = all(type(number) is int and number >= 0 for number in (*info.shape, start, end))
        if are_numbers and DTYPE.fullmatch(info.dtype) and end - start == info.num_bytes:
            return info
    except (TypeError, KeyError, ValueError):
        pass
    got, expected = f"{file}, {key}: {entry}", "a type and a shape that fill its place"
    raise UserError(flag, got, expected, "the file is damaged: download it again")


def _pickle_header(file: Path, flag: str) -> dict[str, TensorInfo]:
    """The same for a torch file, whose tensors are put on the meta device."""
    return {
        key: TensorInfo(file=file, key=key, dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape))
        for key, tensor in _load_pickle(file, "meta", flag).items()
    }


def _load_pickle(file: Path, device: str, flag: str, memmap: bool = True) -> dict[str, torch.Tensor]:
    """A torch file's state dict, loaded with `weights_only`."""
    import torch

    try:
        content = torch.load(file, map_location=device, weights_only=True, mmap=memmap and zipfile.is_zipfile(file))
    except Exception as error:  # a damaged or hostile pickle can raise anything
        reason = str(error).split(". ")[0]
        raise UserError(flag, file, "a torch file with tensors only", f"it is damaged or unsafe ({reason})") from error
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    tensors = {k: v for k, v in content.items() if isinstance(v, torch.Tensor)} if isinstance(content, Mapping) else {}
    if not tensors:
        raise UserError(flag, file, "a torch file that holds a state dict", "give the model's weights")
    return tensors


@contextmanager
def _reader(file: Path, flag: str, memmap: bool) -> Iterator[Callable[[str], torch.Tensor]]:
    """A function from a key in `file` to its tensor on the CPU."""
    if file.suffix.lower() in PICKLE_SUFFIXES:
        yield _load_pickle(file, "cpu", flag, memmap).__getitem__
    elif memmap:
        from safetensors import safe_open

        with safe_open(file, framework="pt") as tensors:
            yield tensors.get_tensor
    else:
        with file.open("rb") as stream:
            length = struct.unpack("<Q", stream.read(8))[0]
            header = json.loads(stream.read(length))
            yield lambda key: _plain_read(stream, 8 + length, header[key])


def _plain_read(stream: BinaryIO, data_start: int, entry: Mapping) -> torch.Tensor:
    """One tensor by seek and read, without a memory map; exactly one copy of it is made."""
    import torch

    dtype = getattr(torch, TORCH_DTYPES[entry["dtype"]])
    start, end = entry["data_offsets"]
    if start == end:
        return torch.empty(entry["shape"], dtype=dtype)
    buffer = bytearray(end - start)
    stream.seek(data_start + start)
    stream.readinto(buffer)
    return torch.frombuffer(buffer, dtype=torch.uint8).view(dtype).reshape(entry["shape"])


def check_names_and_shapes(module: nn.Module, checkpoint: Checkpoint) -> None:
    """Compares a module's state dict (it may be on the meta device) with a checkpoint's header.

    Raises:
        UserError: a tensor is missing, unexpected or of another shape; the first offender is named.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    found = checkpoint.shapes
    where = f"{checkpoint.flag} {checkpoint.path}"
    missing = [name for name in wanted if name not in found]
    if unexpected := [name for name in found if name not in wanted]:
        remedy = did_you_mean(unexpected[0], missing, "the file is of another model or version")
        expected = f"only the tensors of {type(module).__name__}"
        raise UserError(where, f"{len(unexpected)} unexpected tensors, {unexpected[0]} first", expected, remedy)
    if missing:
        got = f"no {missing[0]} ({len(missing)} missing of {len(wanted)})"
        raise UserError(where, got, f"all tensors of {type(module).__name__}", "the file is incomplete or another's")
    if wrong := [name for name, shape in wanted.items() if found[name] != shape]:
        name = wrong[0]
        raise UserError(where, f"{name} of shape {found[name]}", f"{wanted[name]}", "the file is another model's")


def load_weights(module: nn.Module, checkpoint: Checkpoint, *, dtype: torch.dtype | None, device: Place) -> None:
    """Fills `module` (its parameters may be on the meta device) from `checkpoint`, strictly, and freezes it.

    Each tensor is read, cast and moved on its own, so the peak is the model in its target type plus one tensor.

    Args:
        dtype: the type for floating-point tensors; None keeps the file's.

    Raises:
        UserError: as `check_names_and_shapes`, before anything is read.
    """
    check_names_and_shapes(module, checkpoint)
    tensors = checkpoint.read()
    fill(module, checkpoint, ((n, t.to(dtype) if dtype and t.is_floating_point() else t) for n, t in tensors), device)


def fill(module: nn.Module, checkpoint: Checkpoint, tensors: Iterable[tuple[str, torch.Tensor]], device: Place) -> None:
    """Puts tensors into `module` as they come, each on its device, and freezes them.

    Args:
        tensors: (name, tensor) for everything that the state dict has, in any order, in their final types.
        checkpoint: where they come from, for the log.

    Raises:
        ValueError: a tensor did not come, or one that the module does not have.
    """
    import torch
    from tqdm import tqdm

    place = device if callable(device) else lambda name: device
    missing, num_bytes = set(module.state_dict()), 0
    for name, tensor in tqdm(tensors, total=len(missing), desc=checkpoint.flag, leave=False, disable=None):
        if name not in missing:
            raise ValueError(f"{name} came, which {type(module).__name__} does not wait for")
        missing.remove(name)
        target = tensor.to(place(name))
        num_bytes += target.numel() * target.element_size()
        parent, _, leaf = name.rpartition(".")
        owner = module.get_submodule(parent)
        if leaf in owner._parameters:
            owner._parameters[leaf] = torch.nn.Parameter(target, requires_grad=False)
        else:
            owner._buffers[leaf] = target
    if missing:
        raise ValueError(f"{min(missing)} did not come ({len(missing)} missing)")
    _place_buffers(module, place)
    count, files = len(checkpoint.tensors), len(checkpoint.files)
    size = f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.2f} MB"
    logger.info("%s: %d tensors, %s, from %d file%s", checkpoint.flag, count, size, files, "s" * (files > 1))


def _place_buffers(module: nn.Module, place: Callable[[str], torch.device | str]) -> None:
    """Moves what no checkpoint holds: rotary tables, position ids."""
    for path, owner in module.named_modules():
        for leaf, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[leaf] = buffer.to(place(f"{path}.{leaf}" if path else leaf))


def empty_module(build: Callable[[], nn.Module]) -> nn.Module:
    """Builds a module whose parameters lie on the meta device while its buffers are real (rotary tables, ids)."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        return build().eval()


def empty_model(checkpoint: Checkpoint, build: Callable[[], nn.Module]) -> nn.Module:
    """`empty_module` for dimensions that were read from `checkpoint`'s shapes.

    Raises:
        UserError: no model has these dimensions: some tensor has a shape that it should not have, or `config.json`
            says something that cannot be.
    """
    try:
        return empty_module(build)
    except Exception as error:  # libraries have errors of their own for numbers and names that they cannot use
        where, remedy = f"{checkpoint.flag} {checkpoint.path}", "the file or its config.json is damaged or another's"
        got = f"shapes that do not fit together ({one_line(str(error))})"
        raise UserError(where, got, "the published layout", remedy) from error
