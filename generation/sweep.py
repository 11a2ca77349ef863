"""Sweeps: many requests that differ in one or two settings, and one sheet of their pictures."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from common.files import atomic_file
from common.sheets import contact_sheet
from generation.jobs import Job, single_job
from generation.runner import Result
from options.errors import UserError
from options.flags_generate import RequestFlags
from options.request import ImageSize
from options.sweep import Sweep, SweepPoint, sweep_points

logger = logging.getLogger(__name__)

CELL_WIDTH = 256


@dataclass(frozen=True, kw_only=True)
class SweepPlan:
    """The cells of a sweep, and their grid."""

    jobs: tuple[Job, ...]
    labels: tuple[str, ...]
    columns: int


def plan_sweep(texts: Sequence[str], flags: RequestFlags, image_size: ImageSize) -> SweepPlan:
    """Resolves and checks every cell.

    Raises:
        UserError: a sweep that cannot be, or a cell whose request cannot.
    """
    sweeps = [Sweep.parse(text) for text in texts]
    points = sweep_points(flags, sweeps)
    jobs = tuple(_sweep_job(point, image_size) for point in points)
    columns = len(sweeps[1].values) if len(sweeps) == 2 else min(len(points), 5)
    return SweepPlan(jobs=jobs, labels=tuple(point.label for point in points), columns=columns)


def _sweep_job(point: SweepPoint, image_size: ImageSize) -> Job:
    try:
        return single_job(point.flags, image_size, where=point.label)
    except UserError as error:
        raise UserError.within(f"--sweep {point.label}", error) from error


class SweepSheet:
    """Collects a sweep's pictures and draws them as one labelled sheet; of a video, its middle frame."""

    def __init__(self, plan: SweepPlan) -> None:
        self._labels = {id(job): label for job, label in zip(plan.jobs, plan.labels, strict=True)}
        self._columns = plan.columns
        self._cells: dict[str, Image.Image] = {}
        self._stem = ""

    def add(self, result: Result) -> None:
        self._stem = self._stem or result.stem
        if result.frames is not None:
            picture = Image.fromarray(result.frames[len(result.frames) // 2])
            picture.thumbnail((CELL_WIDTH * 2, CELL_WIDTH * 2))  # a thousand cells at full size would fill the memory
            self._cells[self._labels[id(result.job)]] = picture

    def save(self, folder: Path) -> Path | None:
        """Writes `{stem of the first result}_sweep.png`, failed cells grey; None when no pictures were decoded."""
        if not self._cells:
            return None
        empty = Image.new("RGB", next(iter(self._cells.values())).size, "grey")
        cells = [(label, self._cells.get(label, empty)) for label in self._labels.values()]
        path = folder / f"{self._stem}_sweep.png"
        with atomic_file(path) as temporary:
            contact_sheet(cells, columns=self._columns, cell_width=CELL_WIDTH).save(temporary, format="PNG")
        logger.info("saved %s", path)
        return path
