"""Whether a cache belongs to its source and settings as they are now: what training refuses, from headers alone."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from dataset.architecture import CacheRules
from dataset.buckets import Size, bucket_sizes, pick_bucket
from dataset.cache_files import CacheHeader, difference, read_indices
from dataset.cache_names import ARCHITECTURES, LatentFile
from dataset.config import ImageDataset, VideoDataset
from dataset.crops import Crop, crops_of
from dataset.fingerprints import ABSENT, MASK_SETTING, Fingerprint, item_identity, text_hash
from dataset.sources import MediaItem
from options.geometry import VAE_STRIDE

MAIN = "latents"


@dataclass(frozen=True, kw_only=True)
class Complaint:
    """Why a cache cannot be trained on."""

    reason: str
    is_noticed: bool
    """Whether caching with --skip_existing sees it as well; else everything has to be made anew."""


# ---- latents ----


def latent_complaint(
    file: LatentFile,
    header: CacheHeader,
    item: MediaItem | None,
    dataset: ImageDataset | VideoDataset,
    rules: CacheRules,
) -> Complaint | None:
    """What is wrong with a latent cache; None when nothing is.

    Args:
        item: its source; None when that is gone, and then the source is not compared.
    """
    reason = _other_architecture(header, rules.arch)
    if reason is None and len(header.shapes.get(MAIN, ())) != 4:
        reason = "no latents of shape (C, F, h, w) in it"
    if reason:
        return Complaint(reason=reason, is_noticed=False)
    stored = header.fingerprint
    if stored is None:
        reason = _incumbent_size(file, header, dataset) or _structure(file, header, dataset, rules)
        is_noticed = False
    else:
        expected = _expected(stored, item, dataset, rules)
        vanished = {key: "none" for key in stored if re.fullmatch(r"control_\d+", key) and item and key not in expected}
        reason, is_noticed = difference(stored, expected | vanished), difference(stored, expected) is not None
    if reason is None and isinstance(dataset, VideoDataset):
        reason, is_noticed = _unplanned(file, num_source_frames(header), dataset, rules), True
    return Complaint(reason=reason, is_noticed=is_noticed) if reason else None


def _other_architecture(header: CacheHeader, arch: str) -> str | None:
    stored, now = header.metadata.get("architecture"), ARCHITECTURES[arch]
    return None if stored in (None, now) else f"architecture is {stored} in the cache, {now} now"


def _expected(
    stored: Fingerprint, item: MediaItem | None, dataset: ImageDataset | VideoDataset, rules: CacheRules
) -> dict[str, str]:
    """What the fingerprint has to say about everything but the encoders."""
    complete = rules.like(stored) if hasattr(rules, "like") else rules
    expected = dict(complete.settings(dataset))
    if source_size := _size(stored.get("source_size", "")):
        expected["size"] = _x(_bucket(source_size, dataset))
    if isinstance(dataset, VideoDataset) and "frame_rate" in stored:
        expected["frame_rate"] = f"{rules.fps} from {dataset.source_fps or 'the file'}"
    if item is None:
        return expected
    try:
        # Videos may be terabytes, and hashing them would hold up every start of a training.
        return expected | {MASK_SETTING: ABSENT} | item_identity(item, hashed=isinstance(dataset, ImageDataset))
    except OSError:  # what went away between listing and looking does not make a cache stale
        return expected


def _structure(
    file: LatentFile, header: CacheHeader, dataset: ImageDataset | VideoDataset, rules: CacheRules
) -> str | None:
    ask = getattr(rules, "complaint", None)
    return ask(header, read_indices(file.path, header), dataset) if ask else None


def _incumbent_size(file: LatentFile, header: CacheHeader, dataset: ImageDataset | VideoDataset) -> str | None:
    *_, height, width = header.shapes[MAIN]
    size = (width * VAE_STRIDE, height * VAE_STRIDE)
    if isinstance(dataset, ImageDataset):
        now = _bucket(file.size, dataset)
        return None if size == now else f"size is {_x(size)} in the cache, {_x(now)} now"
    # Its name holds the bucket, not the video's own size; and it put videos into buckets in any case.
    if size == dataset.resolution or size in bucket_sizes(dataset.resolution):
        return None
    return f"size is {_x(size)} in the cache, which is no bucket of {_x(dataset.resolution)}"


def _bucket(size: Size, dataset: ImageDataset | VideoDataset) -> Size:
    return pick_bucket(size, dataset.resolution, enabled=dataset.enable_bucket, no_upscale=dataset.bucket_no_upscale)


def _size(text: str) -> Size | None:
    found = re.fullmatch(r"(\d+)x(\d+)", text, re.ASCII)
    return (int(found[1]), int(found[2])) if found and int(found[1]) and int(found[2]) else None


def _x(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


# ---- clips ----


def num_source_frames(header: CacheHeader) -> int | None:
    """Frames of the video at the model's rate; None when the cache does not say."""
    stored = (header.fingerprint or {}).get("source_frames", "")
    return int(stored) if re.fullmatch(r"\d+", stored, re.ASCII) else None


def missing_clips(
    files: Iterable[LatentFile], num_frames: int | None, dataset: VideoDataset, rules: CacheRules
) -> list[str]:
    """The clips and sections of a video that should be cached and are not, as `start-frames[-section]`.

    Args:
        files: all latent caches of the video.
        num_frames: of the video; when it is not known, only sections of the clips that are there can be missed.
    """
    there = {(Crop(start=file.crop[0], length=file.crop[1]), file.section) for file in files}
    crops = frozenset(crop for crop, _ in there) if num_frames is None else _crops(num_frames, dataset)
    missing = sorted(_with_sections(crops, dataset, rules) - there)
    return [f"{crop.start}-{crop.length}" + ("" if section is None else f"-{section}") for crop, section in missing]


def _with_sections(crops: Iterable[Crop], dataset: VideoDataset, rules: CacheRules) -> set[tuple[Crop, int | None]]:
    counts = [(crop, rules.trim(crop.length, dataset).num_sections) for crop in crops]
    return {(crop, i if rules.has_sections else None) for crop, count in counts for i in range(count)}


def _unplanned(file: LatentFile, num_frames: int | None, dataset: VideoDataset, rules: CacheRules) -> str | None:
    """Why the data set's settings do not make this clip, or this section of it."""
    crop = Crop(start=file.crop[0], length=file.crop[1])
    # Of an unknown video the clip may be the end: it then is as short as it can be.
    if crop not in _crops(crop.end if num_frames is None else num_frames, dataset):
        return f"a clip of {crop.length} frames from frame {crop.start} on, which {_extraction(dataset)} does not make"
    if (file.section is not None) != rules.has_sections:
        return f"{'a' if file.section is not None else 'no'} section in its name"
    count = rules.trim(crop.length, dataset).num_sections
    if file.section is not None and file.section >= count:
        return f"section {file.section}, and a clip of {crop.length} frames has {count} of them now, from 0 on"
    return None


@lru_cache(maxsize=8)
def _crops(num_frames: int, dataset: VideoDataset) -> frozenset[Crop]:
    return frozenset(crops_of(dataset, num_frames).crops)


def _extraction(dataset: VideoDataset) -> str:
    detail = {
        "full": f"max_frames = {dataset.max_frames}",
        "slide": f"target_frames = {list(dataset.target_frames)} and frame_stride = {dataset.frame_stride}",
        "uniform": f"target_frames = {list(dataset.target_frames)} and frame_sample = {dataset.frame_sample}",
    }
    mode = dataset.frame_extraction
    return f'frame_extraction = "{mode}" with {detail.get(mode, f"target_frames = {list(dataset.target_frames)}")}'


# ---- texts ----


def text_complaint(header: CacheHeader, item: MediaItem | None, arch: str) -> Complaint | None:
    """What is wrong with a text cache; None when nothing is.

    Args:
        item: whose caption it should be; None when that is gone.
    """
    reason = _other_architecture(header, arch) or (None if header.keys else "no tensors in it")
    if reason:
        return Complaint(reason=reason, is_noticed=False)
    if item is None:
        return None
    stored = header.fingerprint
    if stored is None:
        stored = {"caption": text_hash(header.metadata["caption1"])} if "caption1" in header.metadata else None
    if stored is None or stored.get("caption") == text_hash(item.caption):
        return None
    cached, now = _where_they_differ(header.metadata.get("caption1", "unknown"), item.caption)
    return Complaint(reason=f"caption is {cached} in the cache, {now} now", is_noticed=True)


def _where_they_differ(one: str, other: str) -> tuple[str, str]:
    """Captions are long, and their hashes would tell nobody anything."""
    same = len(os.path.commonprefix([one, other]))
    begin = max(same - 15, 0)
    parts = (
        ("…" if begin else "") + text[begin : same + 45] + ("…" if same + 45 < len(text) else "")
        for text in (one, other)
    )
    first, second = map(repr, parts)
    return first, second
