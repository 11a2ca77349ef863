"""Names of cache files and of the tensors in them: the incumbent's, so that caches interchange.

A tensor's *content* name (`latents_clean`) is what batches use; its *key* in the file adds size and type
(`latents_clean_9x28x36_float16`).
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURES = {"fp": "framepack", "wan": "wan"}
"""The names in file names and in metadata."""
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
    return _text_path(folder, source_stem(source), arch)


def text_path_of(latents: LatentFile, arch: str) -> Path:
    """The text cache that goes with a latent cache."""
    return _text_path(latents.path.parent, latents.stem, arch)


def _text_path(folder: str | Path, stem: str, arch: str) -> Path:
    return Path(folder) / f"{stem}_{arch}_te.safetensors"


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
    keep = {comparable(Path(path).name) for path in kept}
    size = "" if text else r"_\d{4,}x\d{4,}"
    pattern = re.compile(rf".+{size}_{re.escape(arch)}{'_te' if text else ''}\.safetensors", re.DOTALL | re.ASCII)
    names = (name for name in _file_names(folder) if pattern.fullmatch(name) and comparable(name) not in keep)
    return tuple(Path(folder) / name for name in names)


def cached_stems(path: str | Path, arch: str) -> set[str]:
    """The stems whose cache a file may be: of a picture, of a video's crop, of a text."""
    path = Path(path)
    found = (parse_latent_name(path, arch, video=video) for video in (True, False))
    text = path.name.removesuffix(f"_{arch}_te.safetensors")
    return {file.stem for file in found if file} | ({text} if text != path.name else set())


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


def comparable(name: str) -> str:
    """One spelling for all that name one file."""
    # A Mac may give a name back in another Unicode form than it was written in, Windows in another case.
    return os.path.normcase(unicodedata.normalize("NFC", name))


# ---- keys ----


def key_name(content: str, dtype: str, *, main_shape: tuple[int, int, int] | None, varlen: bool = False) -> str:
    """The key of a tensor.

    Args:
        dtype: torch's name of the type; masks have none in their key, but for masks of latents.
        main_shape: (F, h, w) of the file's main latent, which every `latents…` tensor carries whatever its own shape.
        varlen: the tensor is not stacked in a batch.
    """
    size, suffix = "", "" if content.endswith("_mask") else f"_{dtype}"
    if content.startswith("latents"):
        if main_shape is None:
            raise ValueError(f"{content} needs the shape of the main latent")
        size, suffix = "_" + "x".join(map(str, main_shape)), f"_{dtype}"
    return f"{VARLEN if varlen else ''}{content}{size}{suffix}"


def content_name(key: str) -> str:
    """The content that a key names: without `varlen_`, the type, and the size of latents."""
    content = key.removeprefix(VARLEN)
    if content.endswith("_mask"):
        return content
    dtype = next((name for name in DTYPE_NAMES if content.endswith(f"_{name}")), None)
    content = content.removesuffix(f"_{dtype}") if dtype else content
    return content.rpartition("_")[0] if content.startswith("latents_") else content
