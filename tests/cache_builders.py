"""Small data sets, and an encoder that costs nothing, for the tests of the caching scripts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from common.media import write_video
from common.processes import Processes
from dataset.caching import CachingOptions
from dataset.config import load_dataset_config
from dataset.jobs import Sample
from frame_pack.caching import FramePackCacheRules

ENCODERS = {"vae": "vae of the test", "encoder_dtype": "float32"}
NAMES = ("猫", "a [1]", "two words")


def picture(seed: int, size: tuple[int, int] = (64, 64)) -> np.ndarray:
    """(H, W, 3) uint8: coloured blocks that differ from seed to seed."""
    width, height = size
    blocks = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), 3), dtype=np.uint8)
    return blocks.repeat(8, 0).repeat(8, 1)[:height, :width]


def write_picture(path: Path, seed: int, size: tuple[int, int] = (64, 64)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(seed, size)).save(path)
    return path


def write_clip(
    path: Path, num_frames: int, *, fps: float = 30, seed: int = 0, size: tuple[int, int] = (32, 32)
) -> Path:
    """A clip whose frames get brighter one by one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    first = picture(seed, size) // 4
    write_video(path, [first + np.uint8(4 * (number % 40)) for number in range(num_frames)], fps=fps)
    return path


def write_config(path: Path, *datasets: Mapping[str, object]) -> Path:
    """A data set file in TOML; `Path`s and tuples become strings and lists."""
    lines = ["[general]", 'caption_extension = ".txt"', "resolution = [32, 32]"]
    for values in datasets:
        lines.append("[[datasets]]")
        lines += [f"{key} = {_toml(value)}" for key, value in ({"fp_latent_window_size": 1} | values).items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def _toml(value: object) -> str:
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)


def image_set(folder: Path, names: Sequence[str] = NAMES, *, size: tuple[int, int] = (40, 32), **keys) -> Path:
    """Pictures with captions and a control image each; returns the data set file. Caches go to `folder / "cache"`."""
    for number, name in enumerate(names):
        write_picture(folder / "images" / f"{name}.png", 2 * number, size)
        write_picture(folder / "controls" / f"{name}.png", 2 * number + 1, size)
        (folder / "images" / f"{name}.txt").write_text(f"caption of {name}", encoding="utf-8")
    return write_config(folder / "data.toml", image_keys(folder) | keys)


def image_keys(folder: Path) -> dict[str, object]:
    return {
        "image_directory": folder / "images",
        "control_directory": folder / "controls",
        "cache_directory": folder / "cache",
        "fp_1f_target_index": 9,
        "fp_1f_clean_indices": [0],
    }


def video_set(folder: Path, lengths: Mapping[str, int], *, fps: float = 30, **keys) -> Path:
    """Clips of these lengths with captions; returns the data set file."""
    for number, (name, length) in enumerate(lengths.items()):
        write_clip(folder / "videos" / f"{name}.mp4", length, fps=fps, seed=number)
        (folder / "videos" / f"{name}.txt").write_text(f"caption of {name}", encoding="utf-8")
    places = {"video_directory": folder / "videos", "cache_directory": folder / "cache", "target_frames": [5]}
    return write_config(folder / "data.toml", places | keys)


class PlainEncoder:
    """In the place of the VAE: a latent pixel is the mean brightness of its 8 x 8 pixels, in every fourth frame."""

    def __init__(self) -> None:
        self.batches: list[list[Sample]] = []

    @property
    def encoded(self) -> list[str]:
        """The names of the sources, in the order in which they came."""
        return [sample.job.item.stem for batch in self.batches for sample in batch]

    def encode(self, samples: Sequence[Sample]) -> list[list[dict]]:
        self.batches.append(list(samples))
        return [self.tensors(sample) for sample in samples]

    def tensors(self, sample: Sample) -> list[dict]:
        import torch

        latents = _means(sample.frames[::4])
        if sample.unit.crop is None:
            controls = [_means(control.rgb[None]) for control in sample.controls]
            clean = torch.cat(controls, dim=1) if controls else latents
            return [{"latents": latents, "latents_clean": clean, "latent_indices": torch.tensor([9])}]
        start, rest = latents[:, :1], latents[:, 1:]
        sections = rest.split(rest.shape[1] // len(sample.unit.paths), dim=1)
        return [{"latents": section, "latents_clean": start} for section in sections]

    @contextmanager
    def opened(self) -> Iterator[PlainEncoder]:
        yield self


def _means(frames: np.ndarray):
    import torch

    count, height, width, _ = frames.shape
    means = frames.reshape(count, height // 8, 8, width // 8, 8, 3).mean((2, 4, 5), dtype=np.float64)
    return torch.from_numpy(means / 255).half().expand(16, -1, -1, -1)


def run_loop(
    config: Path,
    mode: str = "one_frame",
    *,
    encoder: PlainEncoder | None = None,
    encoders: Mapping[str, str] = ENCODERS,
    processes: Processes | None = None,
    window: int | None = None,
    no_2x: bool = False,
    **options,
) -> tuple[int, PlainEncoder]:
    """Caches with the loop that the script uses: (exit code, the encoder that did it)."""
    from dataset.latent_caching import cache_latents

    encoder = encoder or PlainEncoder()
    rules = FramePackCacheRules(mode=mode, window=window, no_2x=no_2x)
    datasets = load_dataset_config(config)
    options = CachingOptions(**options)
    code = cache_latents(datasets, rules, encoder.opened, encoders, options, processes or Processes())
    return code, encoder


def files(folder: Path) -> dict[str, bytes]:
    """Name -> content of everything in a folder."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())} if folder.is_dir() else {}
