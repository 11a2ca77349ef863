"""Worker processes that read sources, through torch's DataLoader. Imported late, as it imports torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from dataset.jobs import Job, Sample
from dataset.loading import NotLoaded, read_jobs


class _Reading(IterableDataset):
    """The jobs of one worker; picklable, as workers are spawned."""

    def __init__(self, jobs: Sequence[Job], fps: int) -> None:
        self.jobs, self.fps = jobs, fps

    def __iter__(self) -> Iterator[Sample | NotLoaded]:
        worker = get_worker_info()
        yield from read_jobs(self.jobs[worker.id :: worker.num_workers], self.fps)


def loader(jobs: Sequence[Job], *, fps: int, num_workers: int, num_ahead: int) -> DataLoader:
    """Iterates over the samples of all jobs; each worker is at most `num_ahead` samples ahead.

    Samples are numpy arrays, not tensors: these would come through /dev/shm, which is 64 MB in a container.
    """
    return DataLoader(
        _Reading(jobs, fps),
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=num_ahead,
        multiprocessing_context="spawn",
        collate_fn=_unchanged,
    )


def _unchanged(sample: Sample | NotLoaded) -> Sample | NotLoaded:
    """Instead of torch's conversion to tensors."""
    return sample
