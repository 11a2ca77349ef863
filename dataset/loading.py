"""Decoding and resizing, ahead of the encoder in worker processes when there are any."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import repeat
from pathlib import Path

import numpy as np

from common.media import load_picture
from dataset.config import ImageDataset
from dataset.crops import Crop, cut
from dataset.fingerprints import item_identity
from dataset.frames import control_rate, read_frames
from dataset.jobs import Job, Sample, Unit
from dataset.loss_masks import load_loss_mask
from dataset.planning import Failure
from options.errors import UserError

NUM_AHEAD = {True: 4, False: 1}
"""Samples that each worker may have ready, by whether they are images: a clip may be hundreds of megabytes."""


@dataclass(frozen=True, kw_only=True)
class NotLoaded:
    """Units of a job that could not be read."""

    units: tuple[Unit, ...]
    failure: Failure


def load_samples(jobs: Sequence[Job], *, fps: int, num_workers: int) -> Iterator[Sample | NotLoaded]:
    """The pixels of all units, job by job in their order, however many workers there are.

    Args:
        fps: the frame rate of videos.
        num_workers: processes that decode ahead; 0 decodes here, when asked.
    """
    num_workers = min(num_workers, len(jobs))
    if num_workers < 1:
        yield from read_jobs(jobs, fps)
        return
    from dataset.workers import load_ahead

    is_image = isinstance(jobs[0].dataset, ImageDataset)
    yield from load_ahead(jobs, fps=fps, num_workers=num_workers, num_ahead=NUM_AHEAD[is_image])


def read_jobs(jobs: Sequence[Job], fps: int) -> Iterator[Sample | NotLoaded]:
    """Reads in this process."""
    for job in jobs:
        left = list(job.units)
        try:
            for sample in _read(job, fps):
                left.remove(sample.unit)
                yield sample
            if left:
                got, expected = f"fewer frames than the file announces: {len(left)} clips are not whole", "whole clips"
                raise UserError(str(job.item.path), got, expected, "the video is cut off: repair or shorten it")
        except Exception as error:  # whatever is wrong with one source does not concern the others
            yield NotLoaded(units=tuple(left), failure=Failure.of(job.item, error))


def _read(job: Job, fps: int) -> Iterator[Sample]:
    identity = item_identity(job.item)
    if not isinstance(job.dataset, ImageDataset):
        for unit, frames, control_frames in _clips(job, fps):
            yield Sample(
                job=job, unit=unit, frames=frames, controls=(), identity=identity, control_frames=control_frames
            )
        return
    width, height = job.size
    target, *controls = (
        load_picture(path, width=width, height=height, flag=str(path))
        for path in (job.item.path, *job.item.control_paths)
    )
    (unit,) = job.units
    yield Sample(
        job=job,
        unit=unit,
        frames=target.rgb[None],
        controls=tuple(controls),
        identity=identity,
        loss_mask=load_loss_mask(job.item, job.size),
    )


def _clips(job: Job, fps: int) -> Iterator[tuple[Unit, np.ndarray, np.ndarray | None]]:
    """Each unit with its frames and those of the control video, in the order in which they end."""
    waiting: dict[Crop, list[Unit]] = {}
    for unit in job.units:
        waiting.setdefault(Crop(start=unit.crop.start, length=unit.num_frames), []).append(unit)
    given, limit = job.dataset.source_fps, max(crop.end for crop in waiting)

    def frames_of(path: Path, rate: float | Fraction | None) -> Iterator[np.ndarray]:
        return read_frames(path, size=job.size, limit=limit, target_fps=fps, source_fps=rate, flag=str(path))

    clips = cut(frames_of(job.item.path, given), list(waiting))
    control, controls = job.control_video, repeat((None, None))
    if control is not None:
        frames = frames_of(control, control_rate(control, job.item.path, given))
        controls = cut(_without_end(frames), list(waiting))
    for (crop, clip), (_, control_clip) in zip(clips, controls, strict=False):
        for unit in waiting[crop]:
            yield unit, clip, control_clip


def _without_end(frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The frames, and then the last one for ever."""
    frame = None
    for frame in frames:
        yield frame
    if frame is not None:
        yield from repeat(frame)
