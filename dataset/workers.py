"""Worker processes that read sources, through torch's DataLoader. Imported late, as it imports torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch.utils.data import DataLoader, IterableDataset

from dataset.jobs import Job, Sample
from dataset.loading import NotLoaded, read_jobs
from options.errors import UserError


class _Reading(IterableDataset):
    """The jobs of one worker; picklable, as workers are spawned."""

    def __init__(self, jobs: Sequence[Job], fps: int) -> None:
        self.jobs, self.fps = jobs, fps

    def __iter__(self) -> Iterator[Sample | NotLoaded]:
        yield from read_jobs(self.jobs, self.fps)


def load_ahead(jobs: Sequence[Job], *, fps: int, num_workers: int, num_ahead: int) -> Iterator[Sample | NotLoaded]:
    """Yields the samples of all jobs in their order; each worker is at most `num_ahead` samples ahead.

    A loader for each worker, as one loader for all takes from its workers sample by sample: those with short videos
    would run ahead of one with a long video without end, and their samples would wait for its batches.
    """
    shares = [jobs[worker::num_workers] for worker in range(num_workers)]
    readers = [iter(_loader(_Reading(share, fps), num_ahead)) for share in shares]
    for number, job in enumerate(jobs):
        num_left = len(job.units)
        while num_left:
            loaded = _next(readers[number % num_workers], job)
            num_left -= len(loaded.units) if isinstance(loaded, NotLoaded) else 1
            yield loaded


def _next(reader: Iterator[Sample | NotLoaded], job: Job) -> Sample | NotLoaded:
    try:
        return next(reader)
    except RuntimeError as error:  # DataLoader's, when a worker was killed
        remedy = "it was probably out of memory: fewer --num_workers, then go on with --skip_existing"
        raise UserError(job.item.where, "a worker process that ended", "the item from it", remedy) from error


def _loader(reading: _Reading, num_ahead: int) -> DataLoader:
    """One worker. Samples are numpy arrays: tensors would come through /dev/shm, which is 64 MB in a container."""
    return DataLoader(
        reading,
        batch_size=None,
        num_workers=1,
        prefetch_factor=num_ahead,
        multiprocessing_context="spawn",
        collate_fn=_unchanged,
    )


def _unchanged(sample: Sample | NotLoaded) -> Sample | NotLoaded:
    """Instead of torch's conversion to tensors."""
    return sample
