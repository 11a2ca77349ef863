"""A safetensors file written tensor by tensor: a model of 26 GB is never in memory as a whole.

Source: the safetensors format (8-byte length, JSON header, data without gaps).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from common.files import atomic_file, check_writable_folder
from common.weights import TORCH_DTYPES, Checkpoint
from options.errors import UserError

if TYPE_CHECKING:
    import torch

SAFETENSORS_DTYPES = {torch_name: name for name, torch_name in TORCH_DTYPES.items()}
MAX_NAME_BYTES = 255
"""On common file systems."""
Layout = Mapping[str, tuple["torch.dtype", tuple[int, ...]]]


def check_output_file(path: str | Path, num_bytes: int, *, flag: str) -> None:
    """Raises UserError for a name or a place that a large safetensors file cannot have, before any work is done."""
    if Path(path).suffix.lower() != ".safetensors":
        raise UserError(flag, path, "a name that ends in .safetensors", "change the name")
    if len(os.fsencode(Path(path).name)) > MAX_NAME_BYTES:
        raise UserError(flag, path, f"a name of at most {MAX_NAME_BYTES} bytes", "shorten it")
    if os.path.isdir(path):
        raise UserError(flag, path, "a file", "it is a folder: give a file name")
    folder = Path(path).absolute().parent
    check_writable_folder(folder, flag=flag)
    nearest = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(nearest).free
    if free < num_bytes:
        expected = f"{num_bytes / 1e9:.1f} GB of free space"
        raise UserError(flag, f"{path}, {free / 1e9:.1f} GB free", expected, "make room, or give another folder")


def write_checkpoint(
    path: str | Path,
    checkpoint: Checkpoint,
    *,
    change: Callable[[str, torch.Tensor], torch.Tensor],
    metadata: Mapping[str, str],
) -> None:
    """Copies a checkpoint into one file, each tensor passed through `change` and cast back to its own type."""
    import torch
    from tqdm import tqdm

    layout = {}
    for name, info in checkpoint.tensors.items():
        dtype = getattr(torch, TORCH_DTYPES.get(info.dtype, info.dtype), None)
        if dtype is None:
            got = f"{name} of type {info.dtype}"
            where = f"{checkpoint.flag} {checkpoint.path}"
            raise UserError(where, got, "types that torch knows", "use the model in another type")
        layout[name] = (dtype, info.shape)
    tensors = ((name, change(name, tensor)) for name, tensor in checkpoint.read())
    write_tensors(path, layout, tqdm(tensors, total=len(layout), desc=Path(path).name, disable=None), metadata)


def write_tensors(
    path: str | Path, layout: Layout, tensors: Iterable[tuple[str, torch.Tensor]], metadata: Mapping[str, str]
) -> None:
    """Writes (name, tensor) pairs, which may come in any order, as they come; the file is there whole or not at all.

    Raises:
        ValueError: a tensor is missing, unexpected, there twice, or of another shape than in `layout`.
    """
    offsets, header = _header(layout, metadata)
    missing = set(layout)
    with atomic_file(path) as temporary:
        with temporary.open("wb") as stream:
            stream.write(header)
            for name, tensor in tensors:
                if name not in missing or tuple(tensor.shape) != layout[name][1]:
                    raise ValueError(f"{name} of shape {tuple(tensor.shape)} is not what comes next in {path}")
                missing.remove(name)
                stream.seek(len(header) + offsets[name])
                stream.write(_bytes(tensor, layout[name][0]))
        if missing:
            raise ValueError(f"{path}: {min(missing)} did not come ({len(missing)} missing)")


def _header(layout: Layout, metadata: Mapping[str, str]) -> tuple[dict[str, int], bytes]:
    """(name → offset behind the header, the header). Wide types first: readers need each aligned to its own size."""
    order = sorted(layout, key=lambda name: (-layout[name][0].itemsize, name))
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    offsets, end = {}, 0
    for name in order:
        dtype, shape = layout[name]
        offsets[name], end = end, end + dtype.itemsize * math.prod(shape)
        short = str(dtype).removeprefix("torch.")
        entries[name] = {
            "dtype": SAFETENSORS_DTYPES[short],
            "shape": list(shape),
            "data_offsets": [offsets[name], end],
        }
    text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return offsets, struct.pack("<Q", len(text)) + text


def _bytes(tensor: torch.Tensor, dtype: torch.dtype) -> memoryview:
    import torch

    flat = tensor.detach().to("cpu", dtype).contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())
