"""Pictures of what the model will see of a data set, drawn before anything is encoded and without any model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from common.files import atomic_file
from common.media import write_video
from common.sheets import contact_sheet, tiled
from dataset.architecture import CacheRules
from dataset.config import ImageDataset
from dataset.jobs import Job, Sample
from dataset.loading import NotLoaded, load_samples
from dataset.planning import Plan

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

CELL_WIDTH = 192
ITEMS_PER_SHEET = 8


def write_previews(
    plans: Sequence[Plan], rules: CacheRules, folder: str | Path, *, max_items: int, num_workers: int
) -> list[Path]:
    """Writes sheets of some items of each data set, each item with its caption, its pictures and their places.

    Args:
        max_items: of each data set, evenly spread over it; 0 is all.

    Returns:
        The sheets: `{data set}_{sheet}.png`, counted from 1.
    """
    written = []
    for number, plan in enumerate(plans, start=1):
        jobs = _spread(sorted(plan.jobs, key=lambda job: job.item.where), max_items)
        samples = _loaded(jobs, rules, num_workers, f"preview of {plan.dataset.where}")
        for sheet, group in enumerate(_groups(samples, ITEMS_PER_SHEET), start=1):
            path = Path(folder) / f"{number:02d}_{sheet:03d}.png"
            picture = tiled([[_drawn(sample, rules)] for sample in group])
            with atomic_file(path) as temporary:
                picture.save(temporary)
            written.append(path)
        if len(jobs) < len(plan.jobs):
            logger.info("%s: the preview shows %d of %d items", plan.dataset.where, len(jobs), len(plan.jobs))
    return written


def write_debug_files(plans: Sequence[Plan], rules: CacheRules, *, videos: bool, num_workers: int) -> list[Path]:
    """Writes a picture of each item, or an mp4 of each clip, under the name of its cache with another suffix.

    Args:
        videos: clips as mp4, with exactly the frames that would be encoded; images stay pictures.
    """
    written = []
    for plan in plans:
        for sample in _loaded(plan.jobs, rules, num_workers, plan.dataset.where):
            is_clip = videos and not isinstance(plan.dataset, ImageDataset)
            path = sample.unit.paths[0].with_suffix(".mp4" if is_clip else ".png")
            with atomic_file(path) as temporary:
                if is_clip:
                    write_video(temporary, sample.frames, fps=rules.fps)
                else:
                    _drawn(sample, rules).save(temporary)
            written.append(path)
    return written


def _loaded(jobs: Sequence[Job], rules: CacheRules, num_workers: int, title: str) -> Iterator[Sample]:
    """What can be read; the rest is only warned about here, and is an error when it is cached."""
    total = sum(len(job.units) for job in jobs)
    with tqdm(total=total, desc=title, unit="item") as bar:
        for loaded in load_samples(jobs, fps=rules.fps, num_workers=num_workers):
            if isinstance(loaded, NotLoaded):
                logger.warning("%s", loaded.failure.message)
                bar.update(len(loaded.units))
            else:
                yield loaded
                bar.update()


def _drawn(sample: Sample, rules: CacheRules) -> Image.Image:
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


def _groups(samples: Iterator[Sample], size: int) -> Iterator[list[Sample]]:
    group: list[Sample] = []
    for sample in samples:
        group.append(sample)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
