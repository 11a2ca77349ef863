"""What a preview shows of an item: the frames that are cached, their places, and what masks leave of them."""

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common.media import Picture
from dataset.config import ImageDataset, VideoDataset
from dataset.crops import Crop
from dataset.jobs import Job, Sample, Unit
from dataset.sources import MediaItem
from frame_pack.cache_preview import MAX_CELLS
from frame_pack.caching import FramePackCacheRules

WIDTH, HEIGHT = 48, 32


def sample(dataset: ImageDataset | VideoDataset, frames: np.ndarray, *controls: Picture) -> Sample:
    crop = None if isinstance(dataset, ImageDataset) else Crop(start=0, length=len(frames))
    unit = Unit(paths=(Path("cache/猫.safetensors"),), crop=crop, num_frames=len(frames), settings={})
    item = MediaItem(where="画像/猫.png", path=Path("画像/猫.png"), caption="a cat")
    job = Job(item=item, dataset=dataset, size=(WIDTH, HEIGHT), source_size=(WIDTH, HEIGHT), units=(unit,))
    return Sample(job=job, unit=unit, frames=frames, controls=controls, identity={})


def flat(level: int) -> np.ndarray:
    return np.full((HEIGHT, WIDTH, 3), level, dtype=np.uint8)


def images(*indices: int, **changes) -> ImageDataset:
    values = {"where": "d.toml", "cache_directory": Path("cache"), "fp_1f_target_index": 1}
    return ImageDataset(**(values | {"fp_1f_clean_indices": indices} | changes))


def labels(cells: list[tuple[str, Image.Image]]) -> list[str]:
    return [label for label, _ in cells]


def pixels(picture: Image.Image) -> np.ndarray:
    assert picture.mode == "RGB"
    return np.asarray(picture)


def control(level: int, alpha: np.ndarray | None = None) -> Picture:
    return Picture(rgb=flat(level), alpha=alpha)


def test_kisekaeichi_shows_what_the_masks_leave() -> None:
    left = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    left[:, : WIDTH // 2] = 255
    dataset = images(0, 10, fp_1f_no_post=True)
    rules = FramePackCacheRules(mode="one_frame", no_2x=True, no_4x=True)
    cells = rules.cells(sample(dataset, flat(70)[None], control(200, left), control(90)))
    assert labels(cells) == [
        "control 0 @ 0, masked",
        "control 1 @ 10",
        "target @ 1",
        "SigLIP: control 0, unmasked, 384x384",
    ]
    masked = pixels(cells[0][1])
    assert masked.shape == (HEIGHT, WIDTH, 3)
    assert (masked[:, :8] >= 198).all()
    hidden = masked[:, -8:]
    assert 0.1 < hidden.max() / 200 < 0.7  # dimmed, yet something is left of it
    # A mask works on latents, so a hard edge falls into steps of eight pixels.
    blocks = masked.reshape(HEIGHT // 8, 8, WIDTH // 8, 8, 3)
    assert (blocks == blocks[:, :1, :, :1]).all()
    assert (pixels(cells[1][1]) == 90).all() and (pixels(cells[2][1]) == 70).all()
    assert cells[3][1].size == (384, 384) and (pixels(cells[3][1]) == 200).all()


def test_a_half_transparent_mask_dims_by_half_and_shows_the_picture_through() -> None:
    picture = flat(0)
    picture[8:24, 8:40] = 240
    rules = FramePackCacheRules(mode="one_frame")

    def shown(alpha: int) -> np.ndarray:
        mask = np.full((HEIGHT, WIDTH), alpha, dtype=np.uint8)
        cells = rules.cells(sample(images(0), flat(0)[None], Picture(rgb=picture, alpha=mask)))
        return pixels(cells[0][1]).astype(float)

    opaque, half, nothing = shown(255), shown(128), shown(0)
    assert (opaque == picture).all()
    assert np.abs(half - (opaque + nothing) / 2).max() <= 1.5
    assert nothing[16, 16].mean() > nothing[0, 0].mean() + 20


def test_groups_of_zeros_are_named_with_their_places() -> None:
    cells = FramePackCacheRules(mode="one_frame").cells(sample(images(0, 1), flat(70)[None], control(1), control(2)))
    assert labels(cells)[2:4] == ["target @ 1", "post @ 10 (zero), 2x @ 11-12 (zero), 4x @ 13-28 (zero)"]
    rules = FramePackCacheRules(mode="one_frame", no_4x=True, window=4)
    cells = rules.cells(sample(images(0, fp_1f_no_post=True), flat(70)[None], control(1)))
    assert labels(cells)[:3] == ["control 0 @ 0", "target @ 1", "2x @ 6-7 (zero)"]


@pytest.mark.parametrize(
    ("source", "name", "level"), [("control", "control 0", 1), (1, "control 1", 2), ("target", "target", 70)]
)
def test_the_picture_that_siglip_sees(source: str | int, name: str, level: int) -> None:
    dataset = images(10, 0, fp_1f_image_embedding_source=source)
    hidden = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    cells = FramePackCacheRules(mode="one_frame").cells(
        sample(dataset, flat(70)[None], control(1, hidden), control(2, hidden))
    )
    assert labels(cells)[:2] == ["control 0 @ 10, masked", "control 1 @ 0, masked"]
    label, picture = cells[-1]
    assert label == f"SigLIP: {name}, unmasked, 384x384" and (pixels(picture) == level).all()


def clip_cells(num_sections: int, window: int, mode: str = "sections") -> list[tuple[str, Image.Image]]:
    """Of a clip whose frame i is filled with i."""
    frames = np.stack([flat(i) for i in range(4 * num_sections * window + 1)])
    dataset = VideoDataset(where="d.toml", cache_directory=Path("cache"), fp_latent_window_size=window)
    return list(FramePackCacheRules(mode=mode).cells(sample(dataset, frames)))


def frame_numbers(cells: list[tuple[str, Image.Image]]) -> list[int]:
    """From the pictures, which must be what their labels say."""
    shown = [int(pixels(picture)[0, 0, 0]) for _, picture in cells]
    assert shown[1:] == [int(re.search(r"frame (\d+)", label)[1]) for label in labels(cells)[1:]]
    return shown


def test_sections_show_their_frames_and_places() -> None:
    cells = clip_cells(2, 9)
    assert frame_numbers(cells) == [0, 1, 13, 24, 36, 37, 49, 60, 72]
    assert labels(cells) == [
        "start @ 0, seen by SigLIP too; frames: 73, sections: 2",
        "section 0, frame 1: target @ 1-9, sees 9 of 19 later: 1x @ 10, 2x @ 11-12, 4x @ 13-28",
        "section 0, frame 13",
        "section 0, frame 24",
        "section 0, frame 36",
        "section 1, frame 37: target @ 10-18, sees 0 of 19 later: 1x @ 19, 2x @ 20-21, 4x @ 22-37",
        "section 1, frame 49",
        "section 1, frame 60",
        "section 1, frame 72",
    ]


def test_f1_sections_tell_what_is_before_them() -> None:
    cells = clip_cells(2, 9, "f1")
    assert labels(cells)[1] == (
        "section 0, frame 1: target @ 20-28, sees 1 of 19 earlier: 1x @ 19, 2x @ 17-18, 4x @ 1-16"
    )
    assert "section 1, frame 37: target @ 20-28, sees 10 of 19 earlier:" in labels(cells)[5]


def test_five_sections_show_their_first_and_last_frames() -> None:
    cells = clip_cells(5, 1)
    assert frame_numbers(cells) == [0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20]
    assert "section 3, frame 13: target @ 3, sees 1 of 19 later: 1x @ 4," in labels(cells)[7]


@pytest.mark.parametrize("num_sections", [1, 2, 3, 4, 5, 6, 11, 12, 40])
def test_a_row_stays_short_and_reaches_the_end(num_sections: int) -> None:
    cells = clip_cells(num_sections, 1)
    sections = [int(re.match(r"section (\d+)", label)[1]) for label in labels(cells)[1:]]
    assert len(cells) <= MAX_CELLS == 12
    assert sections == sorted(sections) and {0, num_sections - 1} <= set(sections)
    assert len(set(sections)) == min(num_sections, 11)
