"""Cache files: names, tensor keys, metadata, and whether a file still belongs to its source and settings.

Names and keys are the incumbent's, so that caches interchange; only the fingerprint in the metadata is ours.
A tensor's *content* name (`latents_clean`) is what batches use; its *key* in the file adds size and type
(`latents_clean_9x28x36_float16`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from common.files import atomic_file, sort_safetensors_metadata
from common.weights import TORCH_DTYPES
from options.errors import UserError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

ARCHITECTURES = {"fp": "framepack", "wan": "wan"}
"""The names in file names and in metadata."""
FORMAT_VERSION = "1.0.1"
FINGERPRINT_KEY = "oneframe_fingerprint"
MISSING = "missing"
NO_FINGERPRINT = "no fingerprint"

Fingerprint = Mapping[str, str]
"""Setting -> value, for everything that a cache depends on: source, caption, encode settings, encoder weights."""

VARLEN = "varlen_"
# Written out, because names are read before torch is imported.
DTYPE_NAMES = (
    *("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float8_e4m3fn", "float8_e5m2"),
    *("float4_e2m1fn_x2", "float4_e2m1fn"),
    *("complex128", "complex64", "complex32", "bfloat16", "float64", "float32", "float16"),
    *("uint64", "uint32", "uint16", "uint8", "int64", "int32", "int16", "int8", "bool"),
)


# ---- file names ----


@dataclass(frozen=True, kw_only=True)
class LatentFile:
    """What the name of a latent cache says."""

    path: Path
    stem: str
    """The source's base name without its last extension: what its text cache is called by."""
    size: tuple[int, int]
    """(width, height): of the source for pictures, of the bucket for videos."""
    crop: tuple[int, int] | None
    """(start, frames) of a video's crop, before FramePack trims it; None for pictures."""
    section: int | None
    """FramePack section, 0 the first in time; None for pictures and Wan."""


def source_stem(source: str | Path) -> str:
    """The name that all caches of a source begin with. Two sources of one data set must not share it."""
    return os.path.splitext(Path(source).name)[0]


def image_latent_path(folder: str | Path, source: str | Path, size: tuple[int, int], arch: str) -> Path:
    """`im_0_0800x0600_fp.safetensors`; `size` is the (width, height) of the picture itself."""
    return _latent_path(folder, source_stem(source), size, arch)


def video_latent_path(
    folder: str | Path,
    source: str | Path,
    size: tuple[int, int],
    arch: str,
    *,
    start: int,
    count: int,
    section: int | None = None,
) -> Path:
    """`v1_00013-021_0288x0224_wan.safetensors`, with a FramePack section `v1_00000-081-0001_0288x0224_fp.safetensors`.

    Args:
        size: (width, height) of the bucket.
        count: frames of the crop before FramePack trims it.
    """
    suffix = "" if section is None else f"-{section:04d}"
    return _latent_path(folder, f"{source_stem(source)}_{start:05d}-{count:03d}{suffix}", size, arch)


def text_path(folder: str | Path, source: str | Path, arch: str) -> Path:
    """`im_0_fp_te.safetensors`: one for each source, not for each crop."""
    return Path(folder) / f"{source_stem(source)}_{arch}_te.safetensors"


def _latent_path(folder: str | Path, base: str, size: tuple[int, int], arch: str) -> Path:
    return Path(folder) / f"{base}_{size[0]:04d}x{size[1]:04d}_{arch}.safetensors"


def parse_latent_name(path: str | Path, arch: str, *, video: bool) -> LatentFile | None:
    """What the name says; None when it is no latent cache of `arch`, or for a video none with a crop.

    A picture may be called `v1_00000-081`, so the name alone cannot tell pictures and crops apart.
    """
    path = Path(path)
    crop = r"_(?P<start>\d{5,})-(?P<count>\d{3,})(?:-(?P<section>\d{4,}))?" if video else ""
    pattern = rf"(?P<stem>.*){crop}_(?P<width>\d{{4,}})x(?P<height>\d{{4,}})_{re.escape(arch)}\.safetensors"
    found = re.fullmatch(pattern, path.name, re.DOTALL | re.ASCII)
    if not found:
        return None
    return LatentFile(
        path=path,
        stem=found["stem"],
        size=(int(found["width"]), int(found["height"])),
        crop=(int(found["start"]), int(found["count"])) if video else None,
        section=int(found["section"]) if video and found["section"] else None,
    )


def latent_files(folder: str | Path, arch: str, *, video: bool) -> tuple[LatentFile, ...]:
    """All latent caches of `arch` in `folder`, sorted by name; none when there is no such folder."""
    parsed = (parse_latent_name(Path(folder) / name, arch, video=video) for name in _file_names(folder))
    return tuple(file for file in parsed if file is not None)


def prunable(folder: str | Path, arch: str, kept: Iterable[str | Path], *, text: bool) -> tuple[Path, ...]:
    """Caches of `arch` in `folder` that are not among `kept`, sorted: those of sources that went away.

    Args:
        text: text caches only; else latent caches only. Any other file, such as a LoRA that ends with `_fp`, is safe.
    """
    keep = {_comparable(Path(path).name) for path in kept}
    size = "" if text else r"_\d{4,}x\d{4,}"
    pattern = re.compile(rf".+{size}_{re.escape(arch)}{'_te' if text else ''}\.safetensors", re.DOTALL | re.ASCII)
    names = (name for name in _file_names(folder) if pattern.fullmatch(name) and _comparable(name) not in keep)
    return tuple(Path(folder) / name for name in names)


def abandoned(folder: str | Path) -> tuple[Path, ...]:
    """Temporary files that killed processes left in `folder`. A process that is writing now has such files too."""
    pattern = re.compile(r"\..*\.[0-9a-f]{8}\.tmp\.safetensors", re.DOTALL)
    return tuple(Path(folder) / name for name in _file_names(folder) if pattern.fullmatch(name))


def _file_names(folder: str | Path) -> list[str]:
    # Never a glob: `[x]` in a folder's name would be a pattern.
    if not os.path.isdir(folder):
        return []
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_file())


def _comparable(name: str) -> str:
    # A Mac may give a name back in another Unicode form than it was written in, Windows in another case.
    return os.path.normcase(unicodedata.normalize("NFC", name))


# ---- keys ----


def key_name(content: str, dtype: str, *, main_shape: tuple[int, int, int] | None, varlen: bool = False) -> str:
    """The key of a tensor.

    Args:
        dtype: torch's name of the type; masks have none in their key.
        main_shape: (F, h, w) of the file's main latent, which every `latents…` tensor carries whatever its own shape.
        varlen: the tensor is not stacked in a batch.
    """
    size = ""
    if content.startswith("latents"):
        if main_shape is None:
            raise ValueError(f"{content} needs the shape of the main latent")
        size = "_" + "x".join(map(str, main_shape))
    suffix = "" if content.endswith("_mask") else f"_{dtype}"
    return f"{VARLEN if varlen else ''}{content}{size}{suffix}"


def content_name(key: str) -> str:
    """The content that a key names: without `varlen_`, the type, and the size of latents."""
    content = key.removeprefix(VARLEN)
    if content.endswith("_mask"):
        return content
    dtype = next((name for name in DTYPE_NAMES if content.endswith(f"_{name}")), None)
    content = content.removesuffix(f"_{dtype}") if dtype else content
    return content.rpartition("_")[0] if content.startswith("latents_") else content


# ---- metadata and fingerprints ----


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


def source_identity(source: str | Path, name: str = "source") -> dict[str, str]:
    """The part of a fingerprint that tells a source: its base name, its size in bytes and the hash of its content.

    The content and not the time of change: copying, unpacking and syncing change times, and a week of caching must
    survive that; a file that was replaced within one tick of the clock must not. Hashing is far cheaper than decoding.
    """
    source = Path(source)
    files = sorted(file for file in source.iterdir() if file.is_file()) if source.is_dir() else [source]
    stats = [file.stat() for file in files]
    hashes = [_content_hash(os.fspath(f), s.st_size, s.st_mtime_ns) for f, s in zip(files, stats, strict=True)]
    if source.is_dir():
        listing = "\n".join(f"{digest} {file.name}" for digest, file in zip(hashes, files, strict=True))
        hashes = [text_hash(listing)]
    return {name: source.name, f"{name}_bytes": str(sum(s.st_size for s in stats)), f"{name}_sha256": hashes[0]}


@cache
def _content_hash(path: str, num_bytes: int, mtime_ns: int) -> str:
    """Once for each state of a file in a process; size and time only notice that it changed meanwhile."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def text_hash(text: str) -> str:
    """For captions in fingerprints."""
    return hashlib.sha256(text.encode()).hexdigest()


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
    if stored is None:
        return NO_FINGERPRINT
    for setting in sorted(expected):
        if stored.get(setting) != expected[setting]:
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
        _check_finite(path, content, tensor)
        named = main if main is not None and tensor.is_floating_point() else tensor
        dtype = str(named.dtype).removeprefix("torch.")
        keyed[key_name(content, dtype, main_shape=main_shape, varlen=content in varlen)] = tensor
    return keyed


def _check_finite(path: str | Path, content: str, tensor: torch.Tensor) -> None:
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
