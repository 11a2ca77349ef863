"""What a LoRA file says about itself, and writing it: training facts (`ss_*`), modelspec, hashes of the tensors."""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path

from torch import Tensor

from common.checkpoint_writer import check_output_file
from common.files import atomic_file, sort_safetensors_metadata
from common.weights import PICKLE_SUFFIXES, Checkpoint
from networks.peft_config import adapter_file
from options.errors import UserError

MINIMAL_KEYS = ("base_model_version", "network_module", "network_dim", "network_alpha", "network_args")
"""What `--no_metadata` leaves of the training facts, because loaders need it."""
LEGACY_OFFSET, LEGACY_BYTES = 0x100000, 0x10000
DEFAULT_RESOLUTION = "1280x720"


def training_metadata(facts: Mapping[str, object], *, minimal: bool = False) -> dict[str, str]:
    """`ss_` keys and texts of training facts; None becomes `None`.

    Args:
        minimal: only what loaders need, for `--no_metadata`.
    """
    kept = {name: value for name, value in facts.items() if not minimal or name in MINIMAL_KEYS}
    return {f"ss_{name}": str(value) for name, value in kept.items()}


def modelspec(
    *,
    architecture: str,
    implementation: str,
    title: str,
    date: datetime,
    resolution: str | None = None,
    author: str | None = None,
    description: str | None = None,
    license: str | None = None,
    tags: str | None = None,
    timestep_range: tuple[int | None, int | None] = (None, None),
) -> dict[str, str]:
    """The `modelspec.` keys; what is not given is left out. Source: Stability AI's ModelSpec 1.0.0.

    Args:
        architecture: without `/lora`, as in `framepack`.
        date: in local time.
        timestep_range: `--min_timestep` and `--max_timestep`.
    """
    fields = {
        "sai_model_spec": "1.0.0",
        "architecture": f"{architecture}/lora",
        "implementation": implementation,
        "title": title,
        "resolution": resolution or DEFAULT_RESOLUTION,
        "date": date.replace(tzinfo=None).isoformat(timespec="seconds"),
        **{"author": author, "description": description, "license": license, "tags": tags},
    }
    if timestep_range != (None, None):
        low, high = timestep_range
        fields["timestep_range"] = f"{low or 0},{1000 if high is None else high}"
    return {f"modelspec.{name}": text for name, text in fields.items() if text is not None}


def model_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """`sshs_model_hash` of the tensors' bytes and `sshs_legacy_hash` of a small part of the file.

    Both look at a file of the tensors with only the `ss_` metadata, so that a new title does not change them.
    """
    names, header = _header(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    whole, legacy = hashlib.sha256(), hashlib.sha256(header[LEGACY_OFFSET : LEGACY_OFFSET + LEGACY_BYTES])
    position = len(header)
    for name in names:
        content = _bytes(tensors[name])
        whole.update(content)
        start = max(0, LEGACY_OFFSET - position)
        legacy.update(content[start : max(start, LEGACY_OFFSET + LEGACY_BYTES - position)])
        position += len(content)
    return {"sshs_model_hash": whole.hexdigest(), "sshs_legacy_hash": legacy.hexdigest()[:8]}


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[list[str], bytes]:
    """(the names in the order of their bytes in a file, what stands before these)."""
    from safetensors.torch import save

    # The library's own order and spellings, from a file of the same names without content.
    content = save({name: tensor.new_empty(0, device="cpu") for name, tensor in tensors.items()}, dict(metadata))
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    end = 0
    for name in names:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        header[name] |= {"shape": list(tensors[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return names, struct.pack("<Q", len(text)) + text


def _bytes(tensor: Tensor) -> memoryview:
    import torch

    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def read_metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """Of the first file; a pickle has none.

    Raises:
        UserError: it is something else than texts by name.
    """
    if checkpoint.files[0].suffix.lower() in PICKLE_SUFFIXES:
        return {}
    with checkpoint.files[0].open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        metadata = json.loads(stream.read(length)).get("__metadata__") or {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        where = f"{checkpoint.flag} {checkpoint.path}"
        raise UserError(where, "metadata of another kind", "texts by name", "the file is damaged: download it again")
    return metadata


def write_lora(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a safetensors file whole or not at all, with fresh hashes; equal input gives equal bytes.

    Args:
        tensors: on the CPU.
    """
    from safetensors.torch import save_file

    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    with atomic_file(path) as temporary:
        save_file(tensors, temporary, {**metadata, **model_hashes(tensors, metadata)})
        sort_safetensors_metadata(temporary)


def save_lora(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, flag: str) -> None:
    """`write_lora` for the output of a script.

    Args:
        flag: the one that named `path`, for messages.

    Raises:
        UserError: the system does not let it be written; nothing is left behind.
    """
    from safetensors import SafetensorError

    try:
        write_lora(path, tensors, metadata)
    except (OSError, SafetensorError) as error:  # the library's own covers what its writer meets, a full disk too
        reason = getattr(error, "strerror", None) or error
        raise UserError(flag, f"{path}, {reason}", "a place to write to", "make room, or give another name") from error


def check_output(path: str | Path, *, flag: str, inputs: Iterable[str | Path], input_flag: str) -> None:
    """Makes sure, before anything is read, that a file can be written to `path` and that it is none of the inputs.

    Args:
        inputs: as `adapter_file` takes them.

    Raises:
        UserError: another suffix than .safetensors, a folder, an input, or a place that cannot be written to.
    """
    check_output_file(path, 0, flag=flag)
    check_is_other_file(path, flag=flag, inputs=inputs, input_flag=input_flag)


def check_is_other_file(path: str | Path, *, flag: str, inputs: Iterable[str | Path], input_flag: str) -> None:
    """Raises UserError when an output is one of the inputs; arguments as of `check_output`."""
    files = [adapter_file(file) for file in inputs]
    if os.path.exists(path) and any(os.path.exists(file) and os.path.samefile(path, file) for file in files):
        raise UserError(flag, path, f"another file than {input_flag}", "give another name")
