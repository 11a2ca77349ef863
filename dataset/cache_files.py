"""Cache files: metadata, reading, writing, and whether a file still belongs to its source and settings."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from common.files import atomic_file, sort_safetensors_metadata
from common.weights import TORCH_DTYPES
from dataset.cache_names import ARCHITECTURES, VARLEN, content_name, key_name
from dataset.fingerprints import ABSENT, Fingerprint
from options.errors import UserError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

FORMAT_VERSION = "1.0.1"
FINGERPRINT_KEY = "oneframe_fingerprint"
MISSING = "missing"
NO_FINGERPRINT = "no fingerprint"


# ---- metadata ----


def latent_metadata(
    arch: str, size: tuple[int, int], fingerprint: Fingerprint, *, frame_count: int | None = None
) -> dict[str, str]:
    """Of a latent cache; `size` and `frame_count` (videos only) as in its name."""
    metadata = {"width": str(size[0]), "height": str(size[1])}
    if frame_count is not None:
        metadata["frame_count"] = str(frame_count)
    return metadata | _common_metadata(arch, fingerprint)


def text_metadata(arch: str, caption: str, fingerprint: Fingerprint) -> dict[str, str]:
    """Of a text cache."""
    return {"caption1": caption} | _common_metadata(arch, fingerprint)


def _common_metadata(arch: str, fingerprint: Fingerprint) -> dict[str, str]:
    text = json.dumps(dict(fingerprint), sort_keys=True, ensure_ascii=False)
    return {"architecture": ARCHITECTURES[arch], "format_version": FORMAT_VERSION, FINGERPRINT_KEY: text}


def staleness(path: str | Path, expected: Fingerprint) -> str | None:
    """Why the cache cannot be used for the settings `expected`; None when it can.

    Settings that `expected` leaves out are not compared: whose source is gone cannot know its hash.

    Returns:
        None, `MISSING`, `NO_FINGERPRINT` (the incumbent's file: usable, but unknown), else the reason: the first
        setting that differs with both values, or that the file is damaged.
    """
    if not os.path.isfile(path):
        return MISSING
    try:
        stored = cache_header(path).fingerprint
    except UserError as error:
        return error.complaint
    return NO_FINGERPRINT if stored is None else difference(stored, expected)


def difference(stored: Fingerprint, expected: Fingerprint) -> str | None:
    """The first setting of `expected` that a cache was not made with, and both values; None when there is none."""
    for setting in sorted(expected):
        if stored.get(setting, ABSENT) != expected[setting]:
            return f"{setting} is {stored.get(setting, 'not recorded')} in the cache, {expected[setting]} now"
    return None


# ---- reading ----


@dataclass(frozen=True, kw_only=True)
class CacheHeader:
    """A cache file without its tensors."""

    keys: Mapping[str, str]
    """Content -> key in the file."""
    dtypes: Mapping[str, str]
    """Content -> torch's name of the stored type."""
    shapes: Mapping[str, tuple[int, ...]]
    """Content -> shape."""
    metadata: Mapping[str, str]

    @property
    def varlen(self) -> frozenset[str]:
        """Contents that are not stacked in a batch."""
        return frozenset(content for content, key in self.keys.items() if key.startswith(VARLEN))

    @property
    def fingerprint(self) -> Fingerprint | None:
        """None for a file that has none."""
        try:
            stored = json.loads(self.metadata.get(FINGERPRINT_KEY, "null"))
        except ValueError:
            return None
        return stored if isinstance(stored, dict) else None


def cache_header(path: str | Path) -> CacheHeader:
    """Reads names, types, shapes and metadata.

    Raises:
        UserError: nothing there, a damaged file, or two keys for one content.
    """
    from safetensors import safe_open

    with _cache_at(path), safe_open(os.fspath(path), framework="np") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}
        header = CacheHeader(
            keys=_by_content(path, slices),
            dtypes={content_name(k): TORCH_DTYPES.get(s.get_dtype(), s.get_dtype()) for k, s in slices.items()},
            shapes={content_name(k): tuple(s.get_shape()) for k, s in slices.items()},
            metadata=file.metadata() or {},
        )
    return header


def read_cache(path: str | Path) -> dict[str, torch.Tensor]:
    """Content -> tensor on the CPU.

    Raises:
        UserError: as `cache_header`.
    """
    stored = _read_keys(path)
    return {content: stored[key] for content, key in _by_content(path, stored).items()}


def read_indices(path: str | Path, header: CacheHeader) -> dict[str, torch.Tensor]:
    """The small tensors of a file that say where its frames stand on the time axis; no other is read.

    Raises:
        UserError: as `cache_header`.
    """
    from safetensors import safe_open

    keys = {content: key for content, key in header.keys.items() if content.endswith("_indices")}
    with _cache_at(path), safe_open(os.fspath(path), framework="pt") as file:
        return {content: file.get_tensor(key) for content, key in keys.items()}


def _read_keys(path: str | Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load

    with _cache_at(path):
        # Not memory-mapped: Windows does not replace a file that is mapped.
        return load(Path(path).read_bytes())


def _by_content(path: str | Path, keys: Iterable[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for key in sorted(keys):
        content = content_name(key)
        if content in found:
            raise UserError(str(path), f"{found[content]} and {key}", f"{content} once", "remove the file, cache again")
        found[content] = key
    return found


@contextmanager
def _cache_at(path: str | Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        reason = "no such file" if not os.path.isfile(path) else f"a damaged file ({error})"
        raise UserError(str(path), reason, "a cache", "cache it again") from error


# ---- writing ----


def write_cache(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    main: str | None,
    metadata: Mapping[str, str],
    varlen: Collection[str] = (),
) -> None:
    """Writes content -> tensor, whole or not at all; equal content gives equal bytes.

    Args:
        main: the content, of shape (C, F, h, w), whose size stands in the keys of all latents and whose type stands in
            those of all floating-point tensors, whatever their own; None in text caches.
        varlen: contents that are not stacked in a batch.

    Raises:
        UserError: a NaN or an infinity in a tensor.
        OSError: it cannot be written.
    """
    keyed = _keyed(path, tensors, tensors[main] if main is not None else None, varlen)
    _save(path, keyed, metadata)


def write_text_cache(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    *,
    metadata: Mapping[str, str],
    varlen: Collection[str] = (),
) -> None:
    """`write_cache` for texts: what another encoder wrote for the same caption is kept, and so is its metadata.

    When the caption changed, or the file is damaged, nothing is kept, and a warning says so.

    Raises:
        UserError: as `write_cache`, or the file is another architecture's.
    """
    keyed = _keyed(path, tensors, None, varlen)
    if os.path.isfile(path):
        kept, old_metadata = _kept(path, set(tensors), metadata)
        keyed, metadata = kept | keyed, {**old_metadata, **metadata}
    _save(path, keyed, metadata)


def _kept(
    path: str | Path, written: set[str], metadata: Mapping[str, str]
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """What stays of the text cache at `path`: (key -> tensor, metadata)."""
    try:
        header, stored = cache_header(path), _read_keys(path)
    except UserError as error:
        logger.warning("%s; it is replaced", error)
        return {}, {}
    architecture = header.metadata.get("architecture")
    if architecture != metadata["architecture"]:
        expected = f"one of {metadata['architecture']}"
        raise UserError(str(path), f"a cache of {architecture}", expected, "give another cache_directory")
    others = {key: tensor for key, tensor in stored.items() if content_name(key) not in written}
    if header.metadata.get("caption1") != metadata["caption1"]:
        dropped = f", {', '.join(sorted(others))} of the old one removed" if others else ""
        logger.warning("%s: the caption changed; the new one is stored%s", path, dropped)
        return {}, dict(header.metadata)
    return others, dict(header.metadata)


def _keyed(
    path: str | Path, tensors: Mapping[str, torch.Tensor], main: torch.Tensor | None, varlen: Collection[str]
) -> dict[str, torch.Tensor]:
    """Key -> tensor, checked."""
    main_shape = tuple(main.shape[-3:]) if main is not None else None
    keyed = {}
    for content, tensor in tensors.items():
        check_finite(path, content, tensor)
        named = main if main is not None and tensor.is_floating_point() else tensor
        dtype = str(named.dtype).removeprefix("torch.")
        keyed[key_name(content, dtype, main_shape=main_shape, varlen=content in varlen)] = tensor
    return keyed


def check_finite(path: str | Path, content: str, tensor: torch.Tensor) -> None:
    """Raises UserError for a NaN or an infinity."""
    if not tensor.is_floating_point():
        return
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # isfinite knows no float8
    if bad := int((~wide.isfinite()).sum()):
        remedy = "the source or the encoder is at fault; another type for the encoder may help"
        raise UserError(str(path), f"{bad} of {tensor.numel()} values of {content} not finite", "numbers only", remedy)


def _save(path: str | Path, keyed: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    from safetensors.torch import save

    # Cloned, because the format refuses tensors that share memory, and slices of one clip do.
    plain = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in keyed.items()}
    content = save(plain, metadata=dict(metadata))
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)
        sort_safetensors_metadata(temporary)
