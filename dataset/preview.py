"""Pictures of what the model will see of a data set, drawn before anything is encoded and without any model."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from tqdm import tqdm

from common.files import atomic_file
from common.media import write_video
from common.sheets import contact_sheet, tiled
from dataset.architecture import CacheRules
from dataset.config import ImageDataset
from dataset.jobs import Job, Sample
from dataset.loading import NotLoaded, load_samples
from dataset.planning import Failure, Plan
from dataset.sources import files_in
from options.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)
T = TypeVar("T")

CELL_WIDTH = 192
ITEMS_PER_SHEET = 8


def write_previews(
    plans: Sequence[Plan], rules: CacheRules, folder: str | Path, *, name: str, max_items: int, num_workers: int
) -> list[Path]:
    """Writes sheets of some items of each data set, each item with its caption, its pictures and their places.

    Args:
        name: what the sheets' names begin with; earlier ones of that name are removed.
        max_items: of each data set, evenly spread over it; 0 is all.

    Returns:
        The sheets: `{name}_{data set}_{sheet}.png`, counted from 1.
    """
    for old in files_in(folder, [".png"]) if os.path.isdir(folder) else ():
        if re.fullmatch(rf"{re.escape(name)}_\d\d+_\d{{3,}}", old.stem):
            old.unlink()
    written = []
    for number, plan in enumerate(plans, start=1):
        jobs = _spread(sorted(plan.jobs, key=lambda job: job.item.where), max_items)
        told: list[Failure] = []  # caching will fail for these, and report them
        samples = _loaded(jobs, rules, num_workers, f"preview of {plan.dataset.where}", told)
        for sheet, group in enumerate(_groups(_drawn(samples, rules, told), ITEMS_PER_SHEET), start=1):
            path = Path(folder) / f"{name}_{number:02d}_{sheet:03d}.png"
            _save(path, tiled([[row] for _, row in group]).save)
            written.append(path)
        if len(jobs) < len(plan.jobs):
            logger.info("%s: the preview shows %d of %d items", plan.dataset.where, len(jobs), len(plan.jobs))
    return written


def write_debug_files(
    plans: Sequence[Plan], rules: CacheRules, *, videos: bool, num_workers: int
) -> tuple[list[Path], list[Failure]]:
    """Writes a picture of each item, or an mp4 of each clip, under the name of its cache with another suffix.

    Args:
        videos: clips as mp4, with exactly the frames that would be encoded; images stay pictures.

    Returns:
        The files, and what could not be drawn.
    """
    written: list[Path] = []
    failures: list[Failure] = []
    for plan in plans:
        samples = _loaded(plan.jobs, rules, num_workers, plan.dataset.where, failures)
        if videos and not isinstance(plan.dataset, ImageDataset):
            writers = ((s, partial(write_video, frames=s.frames, fps=rules.fps), ".mp4") for s in samples)
        else:
            writers = ((s, row.save, ".png") for s, row in _drawn(samples, rules, failures))
        for sample, write, suffix in writers:
            path = sample.unit.paths[0].with_suffix(suffix)
            _save(path, write)
            written.append(path)
    return written, failures


def _loaded(
    jobs: Sequence[Job], rules: CacheRules, num_workers: int, title: str, failures: list[Failure]
) -> Iterator[Sample]:
    """What can be read; the rest is warned about and added to `failures`."""
    total = sum(len(job.units) for job in jobs)
    with tqdm(total=total, desc=title, unit="item") as bar:
        for loaded in load_samples(jobs, fps=rules.fps, num_workers=num_workers):
            if isinstance(loaded, NotLoaded):
                _warn(loaded.failure, failures)
                bar.update(len(loaded.units))
            else:
                yield loaded
                bar.update()


def _save(path: Path, write: Callable[[Path], None]) -> None:
    try:
        with atomic_file(path) as temporary:
            write(temporary)
    except OSError as error:
        raise UserError(str(path), error.strerror or str(error), "a file that can be written", "make room") from error


def _warn(failure: Failure, failures: list[Failure]) -> None:
    logger.warning("%s", failure.message)
    failures.append(failure)


def _drawn(
    samples: Iterable[Sample], rules: CacheRules, failures: list[Failure]
) -> Iterator[tuple[Sample, Image.Image]]:
    """Each sample with its row; what cannot be drawn is treated as in `_loaded`."""
    for sample in samples:
        try:
            row = _row(sample, rules)
        except UserError as error:
            _warn(Failure.of(sample.job.item, error), failures)
        else:
            yield sample, row


def _row(sample: Sample, rules: CacheRules) -> Image.Image:
    cells = rules.cells(sample)
    width, height = sample.job.size
    place = "" if sample.unit.crop is None else f", frames {sample.unit.crop.start} to {sample.unit.crop.end - 1}"
    title = f"{sample.job.item.path.name} ({width}x{height}{place}): {sample.job.item.caption}"
    return contact_sheet(cells, columns=len(cells), cell_width=CELL_WIDTH, title=title)


def _spread(jobs: Sequence[Job], count: int) -> list[Job]:
    """At most `count` of the jobs, evenly spread; all for 0."""
    if not count or count >= len(jobs):
        return list(jobs)
    return [jobs[i * len(jobs) // count] for i in range(count)]


def _groups(values: Iterable[T], size: int) -> Iterator[list[T]]:
    group: list[T] = []
    for value in values:
        group.append(value)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
