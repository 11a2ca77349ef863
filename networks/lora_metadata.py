"""What a LoRA file says about itself, and writing it: training facts (`ss_*`), modelspec, hashes of the tensors."""

from __future__ import annotations

import hashlib
import os
import struct
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path

from torch import Tensor

from common.checkpoint_writer import check_output_file
from common.files import atomic_file, sort_safetensors_metadata
from common.weights import PICKLE_SUFFIXES, Checkpoint
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
    from safetensors.torch import save

    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    content = save(dict(tensors), training)
    (header_bytes,) = struct.unpack("<Q", content[:8])
    view = memoryview(content)
    legacy = hashlib.sha256(view[LEGACY_OFFSET : LEGACY_OFFSET + LEGACY_BYTES]).hexdigest()[:8]
    return {"sshs_model_hash": hashlib.sha256(view[8 + header_bytes :]).hexdigest(), "sshs_legacy_hash": legacy}


def read_metadata(checkpoint: Checkpoint) -> dict[str, str]:
    """Of the first file; a pickle has none."""
    from safetensors import safe_open

    if checkpoint.files[0].suffix.lower() in PICKLE_SUFFIXES:
        return {}
    with safe_open(os.fspath(checkpoint.files[0]), framework="np") as file:
        return file.metadata() or {}


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


def check_output(path: str | Path, *, flag: str, inputs: Iterable[str | Path], input_flag: str) -> None:
    """Makes sure, before anything is read, that a file can be written to `path` and that it is none of the inputs.

    Raises:
        UserError: another suffix than .safetensors, a folder, an input, or a place that cannot be written to.
    """
    check_output_file(path, 0, flag=flag)
    if os.path.exists(path) and any(os.path.exists(file) and os.path.samefile(path, file) for file in inputs):
        raise UserError(flag, path, f"another file than {input_flag}", "give another name")
