"""What is cached: a *job* is one source with its cache files, a *unit* what is encoded of it in one piece.

Jobs are known before anything is decoded, so that valid caches cost nothing and batches do not depend on timing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.media import Picture
from dataset.config import ImageDataset, VideoDataset
from dataset.crops import Crop
from dataset.fingerprints import Fingerprint
from dataset.sources import MediaItem

Size = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class Unit:
    """An image with its control images, or one crop of a video."""

    paths: tuple[Path, ...]
    """Its cache files: one, or one for each FramePack section in the order of time."""
    crop: Crop | None
    """None for an image."""
    num_frames: int
    """Pixel frames that are encoded, at most the crop's length; 1 for an image."""
    settings: Fingerprint
    """Everything that its files depend on, but what is in the source files and the weights."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One image or video with all that is made of it."""

    item: MediaItem
    dataset: ImageDataset | VideoDataset
    size: Size
    """(width, height) of its bucket, to which targets and controls are resized and cropped."""
    source_size: Size
    """(width, height) of the upright image or video itself."""
    units: tuple[Unit, ...]
    control_video: Path | None = None
    """A video or a folder of frames that is shown beside a video; None for images, and where nobody would use it."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """All its cache files."""
        return tuple(path for unit in self.units for path in unit.paths)


@dataclass(frozen=True, kw_only=True)
class TextJob:
    """One caption."""

    item: MediaItem
    path: Path
    """Its cache file."""

    @property
    def paths(self) -> tuple[Path, ...]:
        return (self.path,)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A unit's pixels, ready to be encoded."""

    job: Job
    unit: Unit
    frames: np.ndarray
    """(F, H, W, 3) uint8 RGB: the target image (F = 1, its alpha dropped) or the frames of the crop, trimmed."""
    controls: tuple[Picture, ...]
    """Control images at the same size, in the order of their indices; none for videos."""
    identity: Mapping[str, str]
    """The fingerprint's part about the files that were read."""
    loss_mask: np.ndarray | None = None
    """(H, W) uint8, white where the loss of an image counts; None in data sets without masks."""
    control_frames: np.ndarray | None = None
    """(F, H, W, 3) uint8 RGB: the same stretch of the control video; None without one."""
