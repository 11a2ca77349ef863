"""What a cache depends on, and whether a cache file still belongs to its source and settings.

The fingerprint is ours; the incumbent's files have none.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from dataset.items import MediaItem

Fingerprint = Mapping[str, str]
"""Setting -> value, for everything that a cache depends on: source, caption, encode settings, encoder weights."""
ABSENT = "none"
"""What is expected of a setting that a cache need not record."""
MASK_SETTING = "loss_mask"
WHOLE = "whole"
"""The mask of an image that has none while others of its data set have."""


def source_identity(source: str | Path, name: str = "source", *, hashed: bool = True) -> dict[str, str]:
    """The part of a fingerprint that tells a source: its base name, its size in bytes and the hash of its content.

    The content and not the time of change: copying, unpacking and syncing change times, and a week of caching must
    survive that; a file that was replaced within one tick of the clock must not. Hashing is far cheaper than decoding.

    Args:
        hashed: without the hash nothing is read, and a file of the same name and size is taken for the same.
    """
    source = Path(source)
    files = sorted(file for file in source.iterdir() if file.is_file()) if source.is_dir() else [source]
    stats = [file.stat() for file in files]
    identity = {name: source.name, f"{name}_bytes": str(sum(s.st_size for s in stats))}
    if not hashed:
        return identity
    hashes = [_content_hash(os.fspath(f), s.st_size, s.st_mtime_ns) for f, s in zip(files, stats, strict=True)]
    if source.is_dir():
        listing = "\n".join(f"{digest} {file.name}" for digest, file in zip(hashes, files, strict=True))
        hashes = [text_hash(listing)]
    return identity | {f"{name}_sha256": hashes[0]}


def files_identity(source: Path, controls: Sequence[Path] = (), *, hashed: bool = True) -> dict[str, str]:
    """The identity of a source together with its control images, in their order.

    Raises:
        OSError: a file cannot be read.
    """
    identity = source_identity(source, hashed=hashed)
    for number, control in enumerate(controls):
        identity |= source_identity(control, f"control_{number}", hashed=hashed)
    return identity


def item_identity(item: MediaItem, *, hashed: bool = True) -> dict[str, str]:
    """`files_identity` of an item, and its loss mask where its data set has masks."""
    identity = files_identity(item.path, item.control_paths, hashed=hashed)
    if item.mask_path:
        return identity | source_identity(item.mask_path, MASK_SETTING, hashed=hashed)
    return identity | ({MASK_SETTING: WHOLE} if item.is_masked else {})


@cache
def _content_hash(path: str, num_bytes: int, mtime_ns: int) -> str:
    """Once for each state of a file in a process; size and time only notice that it changed meanwhile."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def text_hash(text: str) -> str:
    """For captions in fingerprints."""
    return hashlib.sha256(text.encode()).hexdigest()
