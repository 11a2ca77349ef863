"""What a preview shows of an item for Wan: its frames in the order of time, what is given, what masks leave of it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.media import Picture
from dataset.config import ImageDataset, VideoDataset
from dataset.crops import Crop
from dataset.jobs import Job, Sample, Unit
from dataset.sources import MediaItem
from wan.caching import WanCacheRules

WIDTH, HEIGHT = 48, 32
CLIP = "unmasked, 224x224"


def sample(dataset: ImageDataset | VideoDataset, frames: np.ndarray, *controls: Picture, **changes) -> Sample:
    crop = None if isinstance(dataset, ImageDataset) else Crop(start=0, length=len(frames))
    unit = Unit(paths=(Path("cache/猫.safetensors"),), crop=crop, num_frames=len(frames), settings={})
    item = MediaItem(where="画像/猫.png", path=Path("画像/猫.png"), caption="a cat")
    job = Job(item=item, dataset=dataset, size=(WIDTH, HEIGHT), source_size=(WIDTH, HEIGHT), units=(unit,))
    return Sample(job=job, unit=unit, frames=frames, controls=controls, identity={}, **changes)


def flat(level: int) -> np.ndarray:
    return np.full((HEIGHT, WIDTH, 3), level, dtype=np.uint8)


def images(*indices: int, **changes) -> ImageDataset:
    values = {"where": "d.toml", "cache_directory": Path("cache"), "fp_1f_target_index": 1}
    return ImageDataset(**(values | {"fp_1f_clean_indices": indices} | changes))


def control(level: int, alpha: np.ndarray | None = None) -> Picture:
    return Picture(rgb=flat(level), alpha=alpha)


def one_frame(dataset: ImageDataset, *controls: Picture) -> list[tuple[str, Image.Image]]:
    return list(WanCacheRules(mode="one_frame").cells(sample(dataset, flat(70)[None], *controls)))


def labels(cells: list[tuple[str, Image.Image]]) -> list[str]:
    return [label for label, _ in cells]


def levels(cells: list[tuple[str, Image.Image]]) -> list[int]:
    """Of flat pictures."""
    found = [np.asarray(picture) for _, picture in cells]
    assert all((pixels == pixels[0, 0]).all() for pixels in found)
    return [int(pixels[0, 0, 0]) for pixels in found]


def test_pictures_stand_in_the_order_of_their_places() -> None:
    cells = one_frame(images(5, 0), control(10), control(20))
    assert labels(cells) == [
        "control 1 @ 0",
        "target @ 1, made from grey",
        "control 0 @ 5",
        f"CLIP (i2v and flf2v): control 0, {CLIP}",
        f"CLIP (flf2v): control 1, {CLIP}",
    ]
    assert levels(cells) == [20, 70, 10, 10, 20] and cells[-1][1].size == (224, 224)


def test_masks_dim_their_own_control_in_steps_of_latent_pixels() -> None:
    left = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    left[:, : WIDTH // 2] = 255
    cells = one_frame(images(2, 0), control(200, left), control(90))
    assert labels(cells)[:3] == ["control 1 @ 0", "target @ 1, made from grey", "control 0 @ 2, masked"]
    masked = np.asarray(cells[2][1])
    assert (masked[:, :8] >= 198).all() and 0.1 < masked[:, -8:].max() / 200 < 0.7
    blocks = masked.reshape(HEIGHT // 8, 8, WIDTH // 8, 8, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()
    assert levels([cells[0], cells[1], *cells[3:]]) == [90, 70, 200, 90]


def test_a_single_control_is_seen_by_both_models() -> None:
    assert labels(one_frame(images(0), control(10)))[2:] == [f"CLIP (i2v and flf2v): control 0, {CLIP}"]


@pytest.mark.parametrize(("source", "name", "level"), [(1, "control 1", 20), ("target", "target", 70)])
def test_the_picture_that_clip_is_told_to_look_at(source, name: str, level: int) -> None:
    cells = one_frame(images(0, 2, fp_1f_image_embedding_source=source), control(10), control(20))
    assert labels(cells)[3:] == [f"CLIP: {name}, {CLIP}"] and levels(cells)[3:] == [level]


def clip(mode: str, num_frames: int, **changes) -> list[tuple[str, Image.Image]]:
    """Of a clip whose frame i is filled with i."""
    dataset = VideoDataset(where="d.toml", cache_directory=Path("cache"))
    frames = np.stack([flat(i) for i in range(num_frames)])
    return list(WanCacheRules(mode=mode).cells(sample(dataset, frames, **changes)))


@pytest.mark.parametrize(
    ("mode", "first", "last"),
    [
        ("t2v", "frame 0; frames: 41, latents: 11", "frame 40"),
        ("i2v", "frame 0: given, seen by CLIP too; frames: 41, latents: 11", "frame 40"),
        ("flf2v", "frame 0: given, seen by CLIP too; frames: 41, latents: 11", "frame 40: given, seen by CLIP too"),
    ],
)
def test_frames_of_a_clip_are_spread_and_given_ones_told(mode: str, first: str, last: str) -> None:
    cells = clip(mode, 41)
    assert labels(cells) == [first, "frame 8", "frame 16", "frame 24", "frame 32", last]
    assert levels(cells) == [0, 8, 16, 24, 32, 40]


def test_a_control_video_is_shown_behind_its_video() -> None:
    control_frames = np.stack([flat(100 + i) for i in range(5)])
    cells = clip("t2v", 5, control_frames=control_frames)
    assert labels(cells)[-3:] == ["control, frame 0", "control, frame 2", "control, frame 4"]
    assert levels(cells) == [0, 1, 2, 3, 4, 100, 102, 104]


def test_a_picture_is_shown_with_its_control() -> None:
    cells = list(WanCacheRules(mode="t2v").cells(sample(images(), flat(70)[None], control(10), control(20))))
    assert labels(cells) == ["image", "control"] and levels(cells) == [70, 10]
