"""Samples that are encoded together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from dataset.jobs import Job, Sample, Unit


class Batches:
    """Gathers samples into batches of equal shape.

    Who is in which batch is decided over all jobs, valid caches included. So a run that goes on after an interruption
    makes the same batches as an undisturbed one, but for the one that was interrupted: in floating point the result of
    an item depends, in the last bit, on how many are encoded with it.

    Args:
        jobs: all of them.
        wanted: those that will come, with only the units that will come.
    """

    def __init__(self, jobs: Iterable[Job], wanted: Iterable[Job], batch_size: int) -> None:
        places: Counter[tuple] = Counter()
        self._batch_of: dict[Path, tuple] = {}
        for job in jobs:
            for unit in job.units:
                shape = (job.size, unit.num_frames, len(job.item.control_paths))
                self._batch_of[unit.paths[0]] = (shape, places[shape] // batch_size)
                places[shape] += 1
        self._missing = Counter(self._batch_of[unit.paths[0]] for job in wanted for unit in job.units)
        self._waiting: dict[tuple, list[Sample]] = {}

    def add(self, sample: Sample) -> list[Sample]:
        """The batch that the sample completes; empty while others are still to come."""
        batch = self._batch_of[sample.unit.paths[0]]
        self._waiting.setdefault(batch, []).append(sample)
        return self._completed(batch)

    def give_up(self, units: Sequence[Unit]) -> Iterable[list[Sample]]:
        """The batches that are complete now that these units will not come."""
        batches = [self._completed(self._batch_of[unit.paths[0]]) for unit in units]
        return [batch for batch in batches if batch]

    def _completed(self, batch: tuple) -> list[Sample]:
        self._missing[batch] -= 1
        return [] if self._missing[batch] else self._waiting.pop(batch, [])
