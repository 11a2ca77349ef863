"""Caches to train on, for the tests of the training data set: ours, and the incumbent's by the facts alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dataset.buckets import pick_bucket
from dataset.cache_files import latent_metadata, text_metadata, write_cache, write_text_cache
from dataset.cache_names import image_latent_path, text_path, video_latent_path
from dataset.cached_items import CachingScripts
from dataset.config import DatasetConfig, ImageDataset, VideoDataset
from dataset.crops import Crop, Trim, trim
from dataset.fingerprints import files_identity, text_hash
from dataset.sources import MediaItem, list_items
from dataset.training_dataset import TrainingDataset

SCRIPTS = CachingScripts(latents="cache_latents.py", texts="cache_texts.py")
ENCODERS = {"vae": "abc", "encoder_dtype": "float32"}


@dataclass(frozen=True, kw_only=True)
class Rules:
    """A stand-in for a model's rules; `complaint` is left out, as it may be."""

    arch: str = "fp"
    fps: int = 30
    has_sections: bool = True
    mode: str = "one_frame"

    def settings(self, dataset: ImageDataset | VideoDataset) -> dict[str, str]:
        target = getattr(dataset, "fp_1f_target_index", None)
        return {"mode": self.mode, "target_index": str(target), "window": str(dataset.fp_latent_window_size)}

    def trim(self, length: int, dataset: VideoDataset) -> Trim:
        return trim(length, dataset.fp_latent_window_size)


RULES = Rules()
VIDEO_RULES = Rules(mode="sections")
WAN_RULES = Rules(arch="wan", fps=16, has_sections=False)


def number_of(stem: str) -> int:
    """A number from 0 to 999 that tells items apart in their tensors."""
    return sum(stem.encode()) % 1000


# ---- sources: nobody decodes them, so any bytes do ----


def image_set(folder: Path, stems=("a", "b", "c"), *, number: int = 1, **changes) -> ImageDataset:
    """Images with captions and a control image each."""
    for stem in stems:
        write(folder / "images" / f"{stem}.png", f"image {stem}")
        write(folder / "controls" / f"{stem}.png", f"control {stem}")
        write(folder / "images" / f"{stem}.txt", f"caption of {stem}")
    given = {
        "where": f"data.toml [datasets][{number}]",
        "image_directory": folder / "images",
        "control_directory": folder / "controls",
        "cache_directory": folder / "cache",
        "caption_extension": ".txt",
        "resolution": (64, 64),
        "fp_1f_target_index": 9,
    }
    return ImageDataset(**(given | changes))


def video_set(folder: Path, stems=("v", "w"), *, number: int = 1, **changes) -> VideoDataset:
    """Videos with captions; a window of 1 latent frame makes a section of 4 frames."""
    for stem in stems:
        write(folder / "videos" / f"{stem}.mp4", f"video {stem}")
        write(folder / "videos" / f"{stem}.txt", f"caption of {stem}")
    given = {
        "where": f"data.toml [datasets][{number}]",
        "video_directory": folder / "videos",
        "cache_directory": folder / "cache",
        "caption_extension": ".txt",
        "resolution": (64, 64),
        "target_frames": (5, 9),
        "fp_latent_window_size": 1,
    }
    return VideoDataset(**(given | changes))


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


# ---- our caches ----


def cache_images(dataset, rules=RULES, *, sizes=None, default=(100, 100), **changes) -> None:
    """Caches all images and captions. `sizes`: stem -> (width, height) of the source; `changes` go to all tensors."""
    for item in list_items(dataset).items:
        cache_image(dataset, item, rules, size=(sizes or {}).get(item.stem, default), changes=changes)
        cache_text(dataset, item, rules)


def cache_image(dataset, item: MediaItem, rules=RULES, *, size=(100, 100), changes: Mapping = {}, **settings) -> Path:
    bucket = bucket_of(size, dataset)
    fingerprint = {**rules.settings(dataset), "size": x(bucket), "source_size": x(size), **ENCODERS}
    fingerprint |= files_identity(item.path, item.control_paths) | settings
    path = image_latent_path(dataset.cache_directory, item.path, size, rules.arch)
    tensors = image_tensors(bucket, number_of(item.stem)) | changes
    tensors = {content: tensor for content, tensor in tensors.items() if tensor is not None}
    metadata = latent_metadata(rules.arch, size, fingerprint)
    write_cache(path, tensors, main="latents", metadata=metadata)
    return path


def image_tensors(bucket, number: int) -> dict[str, torch.Tensor]:
    width, height = bucket[0] // 8, bucket[1] // 8
    return {
        "latents": torch.full((16, 1, height, width), number).half(),
        "latent_indices": torch.tensor([9]),
        "latents_clean": torch.full((16, 2, height, width), number + 0.5).half(),
        "clean_latent_indices": torch.tensor([0, 10]),
        "clean_latent_2x_indices": torch.tensor([11, 12]),
        "image_embeddings": torch.full((7, 5), number).half(),
    }


def cache_videos(dataset, rules=VIDEO_RULES, *, num_frames=9, size=(100, 100)) -> None:
    """Caches the heads of all videos, as many as fit."""
    for item in list_items(dataset).items:
        for length in dataset.target_frames:
            if length <= num_frames:
                cache_clip(dataset, item, Crop(start=0, length=length), rules, num_frames=num_frames, size=size)
        cache_text(dataset, item, rules)


def cache_clip(dataset, item, crop: Crop, rules=VIDEO_RULES, *, num_frames=9, size=(100, 100), sections=None) -> None:
    bucket = bucket_of(size, dataset)
    place = {"start": crop.start, "count": crop.length}
    fingerprint = {**rules.settings(dataset), "size": x(bucket), "source_size": x(size), **ENCODERS}
    fingerprint |= {"frame_rate": f"{rules.fps} from {dataset.source_fps or 'the file'}"}
    fingerprint |= {"source_frames": str(num_frames)} | {name: str(value) for name, value in place.items()}
    fingerprint |= files_identity(item.path, item.control_paths)
    count = rules.trim(crop.length, dataset).num_sections
    for section in (sections or range(count)) if rules.has_sections else (None,):
        folder = dataset.cache_directory
        path = video_latent_path(folder, item.path, bucket, rules.arch, section=section, **place)
        frames = dataset.fp_latent_window_size if rules.has_sections else (crop.length - 1) // 4 + 1
        value = number_of(item.stem) + (section or 0) / 8
        tensors = {
            "latents": torch.full((16, frames, bucket[1] // 8, bucket[0] // 8), value).half(),
            "latent_indices": torch.arange(frames),
        }
        metadata = latent_metadata(rules.arch, bucket, fingerprint, frame_count=crop.length)
        write_cache(path, tensors, main="latents", metadata=metadata)


def cache_text(dataset, item: MediaItem, rules=RULES, *, caption=None, **changes) -> Path:
    caption = item.caption if caption is None else caption
    path = text_path(dataset.cache_directory, item.path, rules.arch)
    number = float(number_of(item.stem))
    tensors = {
        "llama_vec": torch.full((6, 4), number).half(),
        "llama_attention_mask": torch.arange(6) < 3,
        "clip_l_pooler": torch.full((3,), number).half(),
    } | changes
    metadata = text_metadata(rules.arch, caption, {"caption": text_hash(caption), "text_encoder1": "def"})
    path.unlink(missing_ok=True)
    write_text_cache(path, tensors, metadata=metadata)
    return path


def bucket_of(size, dataset):
    return pick_bucket(size, dataset.resolution, enabled=dataset.enable_bucket, no_upscale=dataset.bucket_no_upscale)


def x(size) -> str:
    return f"{size[0]}x{size[1]}"


# ---- the incumbent's caches: plain safetensors, written by cache_format.md 1 to 5 ----


def incumbent_image(folder: Path, stem: str, *, caption=None, size=(100, 100), latent=(8, 8), **changes) -> None:
    """A one-frame item with one control image and no history at quarter resolution; `changes`: key -> tensor."""
    folder.mkdir(parents=True, exist_ok=True)
    number, (height, width) = number_of(stem), latent
    shape = f"1x{height}x{width}"
    tensors = {
        f"latents_{shape}_float16": torch.full((16, 1, height, width), number).half(),
        "latent_indices_int64": torch.tensor([9]),
        f"latents_clean_{shape}_float16": torch.full((16, 2, height, width), number + 0.25).half(),
        "clean_latent_indices_int64": torch.tensor([0, 10]),
        "clean_latent_2x_indices_int64": torch.tensor([11, 12]),
        "image_embeddings_float16": torch.full((7, 5), number).half(),
    }
    metadata = {"architecture": "framepack", "width": str(size[0]), "height": str(size[1]), "format_version": "1.0.1"}
    name = f"{stem}_{size[0]:04d}x{size[1]:04d}_fp.safetensors"
    save_file(tensors | changes, folder / name, metadata=metadata)
    incumbent_text(folder, stem, caption=caption)


def incumbent_text(folder: Path, stem: str, *, caption=None) -> None:
    number = float(number_of(stem))
    tensors = {
        "llama_vec_float16": torch.full((6, 4), number).half(),
        "llama_attention_mask": torch.arange(6) < 3,
        "clip_l_pooler_float16": torch.full((3,), number).half(),
    }
    caption = f"caption of {stem}" if caption is None else caption
    metadata = {"architecture": "framepack", "caption1": caption, "format_version": "1.0.1"}
    save_file(tensors, folder / f"{stem}_fp_te.safetensors", metadata=metadata)


def collate_by_the_facts(pairs) -> dict:
    """dataset_config.md 7.2: (latent file, text file) of each item -> content -> stacked tensor, or list."""
    dtypes = sorted((str(v)[6:] for v in vars(torch).values() if isinstance(v, torch.dtype)), key=len, reverse=True)
    gathered: dict[str, list] = {}
    lists = set()
    for pair in pairs:
        for key, tensor in {k: t for file in pair for k, t in load_file(file).items()}.items():
            content = key.replace("varlen_", "")
            if not content.endswith("_mask"):
                dtype = next((dtype for dtype in dtypes if content.endswith("_" + dtype)), None)
                content = content[: -len(dtype) - 1] if dtype else content
                if content.startswith("latents_"):
                    content = content[: content.rindex("_")]
            lists |= {content} if key.startswith("varlen_") else set()
            gathered.setdefault(content, []).append(tensor)
    return {content: found if content in lists else torch.stack(found) for content, found in gathered.items()}


# ---- training data sets ----


def training_set(*datasets, rules=RULES) -> TrainingDataset:
    return TrainingDataset(DatasetConfig(datasets=datasets), rules, SCRIPTS)


def equal(one: Mapping, other: Mapping) -> bool:
    """Same contents, types and bits."""

    def same(a, b) -> bool:
        if isinstance(a, list) or isinstance(b, list):
            return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
        return a.dtype == b.dtype and torch.equal(a, b)

    return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
