"""Which frames of a video make which crops, and the crops from its frames as they come.

Frames come as an iterator, because a minute of 960x544 is already 3 GB: `cut` holds only what its crops still need.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from options.geometry import FRAMES_PER_LATENT, whole_latents

if TYPE_CHECKING:
    from dataset.config import VideoDataset

Mode = Literal["head", "chunk", "slide", "uniform", "full"]


@dataclass(frozen=True, kw_only=True, order=True)
class Crop:
    """A stretch of consecutive frames."""

    start: int
    """The first frame, counted after the change of rate."""
    length: int
    """How many frames; 4n + 1."""

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclass(frozen=True, kw_only=True)
class CropPlan:
    """What is taken from a video, and what is not."""

    crops: tuple[Crop, ...]
    notes: tuple[str, ...]
    """One line for everything that was left out, with the reason."""


@dataclass(frozen=True, kw_only=True)
class Trim:
    """What is used of a crop."""

    num_sections: int
    """Whole FramePack sections; 1 for a model that has none; 0 when the crop is too short."""
    length: int
    """Pixel frames that are used: 4n + 1, of FramePack 4 · sections · window + 1; or 0."""
    note: str | None
    """What was cut off, or why nothing is left; None when the crop fits exactly."""


def plan_crops(
    num_frames: int,
    *,
    mode: Mode,
    target_frames: Sequence[int] = (1,),
    stride: int = 1,
    sample: int = 1,
    max_frames: int = 129,
) -> CropPlan:
    """The crops of a video of `num_frames` frames, for each length in ascending order; no frame is looked at.

    Args:
        target_frames: lengths, each cut to 4n + 1; `full` ignores them.
        stride: `slide` only, frames from one start to the next.
        sample: `uniform` only, starts per length; 1 is the head.
        max_frames: `full` only, the greatest length.

    Raises:
        ValueError: an unknown mode, or a count below 1.
    """
    if min(stride, sample, max_frames, *target_frames) < 1:
        raise ValueError(f"counts below 1: {target_frames=} {stride=} {sample=} {max_frames=}")
    if num_frames < 1:
        return CropPlan(crops=(), notes=("it has no frames",))
    if mode == "full":
        length = whole_latents(min(num_frames, max_frames))
        return CropPlan(crops=(Crop(start=0, length=length),), notes=tuple(_unused(num_frames, length)))
    found: list[Crop] = []
    notes: list[str] = []
    for length in sorted({whole_latents(frames) for frames in target_frames}):
        if length > num_frames:
            notes.append(f"no crop of {length} frames: there are only {num_frames}")
            continue
        starts = _starts(num_frames - length, length, mode, stride, sample)
        found += [Crop(start=start, length=length) for start in dict.fromkeys(starts)]
        notes += _left_out(starts, num_frames, length, mode)
    return CropPlan(crops=tuple(found), notes=tuple(notes))


def crops_of(dataset: VideoDataset, num_frames: int) -> CropPlan:
    """The crops that a data set's settings make of a video, see `plan_crops`."""
    return plan_crops(
        num_frames,
        mode=dataset.frame_extraction,
        target_frames=dataset.target_frames,
        stride=dataset.frame_stride,
        sample=dataset.frame_sample,
        max_frames=dataset.max_frames,
    )


def _starts(last: int, length: int, mode: str, stride: int, sample: int) -> list[int]:
    """The first frames of all crops of one length, 0…`last`, with duplicates."""
    match mode:
        case "head":
            return [0]
        case "chunk":
            return list(range(0, last + 1, length))
        case "slide":
            return list(range(0, last + 1, stride))
        case "uniform":
            return np.linspace(0, last, sample, dtype=int).tolist()
    raise ValueError(f"no frame extraction is called {mode!r}")


def _left_out(starts: list[int], num_frames: int, length: int, mode: str) -> Iterator[str]:
    if duplicates := len(starts) - len(set(starts)):
        yield f"{len(set(starts))} instead of {len(starts)} crops of {length} frames: {duplicates} would be equal"
    if mode == "chunk":
        yield from _unused(num_frames, starts[-1] + length, f" by chunks of {length}")


def _unused(num_frames: int, used: int, why: str = "") -> Iterator[str]:
    if used < num_frames:
        yield f"{num_frames - used} of {num_frames} frames at the end are not used{why}"


def trim(count: int, window: int) -> Trim:
    """Cuts a crop of `count` frames to whole sections of `window` latent frames behind the first latent frame."""
    num_sections = ((count - 1) // FRAMES_PER_LATENT) // window
    section = FRAMES_PER_LATENT * window
    if num_sections < 1:
        note = f"{count} frames are too few for a section: a window of {window} needs {section + 1}"
        return Trim(num_sections=0, length=0, note=note)
    length = num_sections * section + 1
    note = f"{count} frames cut to {length}, {num_sections} sections of {section}" if length < count else None
    return Trim(num_sections=num_sections, length=length, note=note)


def cut(frames: Iterable[np.ndarray], crops: Sequence[Crop]) -> Iterator[tuple[Crop, np.ndarray]]:
    """Yields each crop with its frames, (F, H, W, 3) uint8, as soon as its last frame has come.

    Frames that no later crop needs are let go. Crops whose end never comes are left out: the caller counts. Nothing is
    read beyond the end of the last crop.
    """
    waiting = sorted(crops, key=lambda crop: (crop.end, crop.start))
    held: dict[int, np.ndarray] = {}
    stream = enumerate(frames)
    while waiting:
        try:
            index, frame = next(stream)
        except StopIteration:
            return
        held[index] = frame
        while waiting and waiting[0].end == index + 1:
            crop = waiting.pop(0)
            yield crop, np.stack([held[i] for i in range(crop.start, crop.end)])
        needed = min((crop.start for crop in waiting), default=index + 1)
        for old in [i for i in held if i < needed]:
            del held[old]
