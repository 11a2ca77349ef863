"""Batches for training, read from caches: by shape and data set, in an order that the seed gives, from any position."""

from __future__ import annotations

import logging
import pickle
import signal
import threading
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from dataset.architecture import CacheRules
from dataset.cache_checks import MAIN
from dataset.cache_files import read_cache
from dataset.cached_items import CachedItem, CachingScripts, Layout, find_cached_items
from dataset.config import DatasetConfig
from dataset.epochs import Batch, Bucket, ItemKey, Position, epoch_batches, share
from options.errors import UserError
from options.geometry import VAE_STRIDE

logger = logging.getLogger(__name__)

Contents = dict[str, Tensor | list[Tensor]]


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainBatch:
    """Items of one shape and one data set, as they were cached."""

    contents: Mapping[str, Tensor | list[Tensor]]
    """Content -> (B, …) in the type that is stored; a list of B tensors where lengths differ. On the CPU."""
    items: tuple[ItemKey, ...]
    """What the B rows are: timesteps and noise are functions of the seed, the epoch and these."""
    after: Position
    """Where training goes on when this batch has been trained."""


class TrainingDataset:
    """Everything that the data sets have in their caches."""

    def __init__(self, config: DatasetConfig, rules: CacheRules, scripts: CachingScripts) -> None:
        """Finds and checks the caches; no tensor is kept.

        Args:
            config: data sets that `rules` have checked.
            scripts: what messages tell to run.

        Raises:
            UserErrors: caches that are damaged, stale or mixed, or none at all.
        """
        self._config = config
        self._items = find_cached_items(config, rules, scripts)
        self._buckets = _buckets(self._items, config)

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """By data set, then by shapes."""
        return tuple(bucket for _, bucket in self._buckets)

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """What the items of each bucket look like."""
        return tuple(layout for layout, _ in self._buckets)

    @property
    def batch_layouts(self) -> tuple[tuple[Layout, int], ...]:
        """(layout, how many items a batch of it has at most)."""
        return tuple((layout, min(bucket.batch_size, len(bucket.keys))) for layout, bucket in self._buckets)

    @property
    def contents(self) -> Mapping[str, frozenset[str]]:
        """A data set's place -> what every one of its caches holds; data sets without caches are left out."""
        places = [self._config.datasets[bucket.keys[0].dataset].where for bucket in self.buckets]
        return dict(zip(places, (layout.contents for layout in self.layouts), strict=True))

    @property
    def num_items(self) -> int:
        """What an epoch shows, repeats included."""
        return sum(len(bucket.keys) for bucket in self.buckets)

    @property
    def num_batches(self) -> int:
        """Of an epoch, all processes together."""
        return sum(bucket.num_batches for bucket in self.buckets)

    def reader(self) -> BatchReader:
        """What reads batches, and nothing else: it is copied to every worker."""
        return BatchReader(self._items)

    def summary(self) -> list[str]:
        """For the log: per data set a line of counts and a line of buckets."""
        lines = []
        for number, dataset in enumerate(self._config.datasets):
            mine = [(layout, bucket) for layout, bucket in self._buckets if bucket.keys[0].dataset == number]
            num_shown = sum(len(bucket.keys) for _, bucket in mine)
            num_batches = sum(bucket.num_batches for _, bucket in mine)
            repeats = f" x {dataset.num_repeats} repeats" if dataset.num_repeats > 1 else ""
            lines.append(
                f"{dataset.where}: {num_shown // dataset.num_repeats} items{repeats}, "
                f"{num_batches} batches of up to {dataset.batch_size}"
            )
            counts = [f"{_pixels(layout)}: {len(bucket.keys) // dataset.num_repeats}" for layout, bucket in mine]
            if counts:
                lines.append(f"  buckets (width x height x latent frames: items): {', '.join(counts)}")
        return lines


def _buckets(items: Sequence[CachedItem], config: DatasetConfig) -> list[tuple[Layout, Bucket]]:
    by_layout: dict[tuple[int, Layout], list[CachedItem]] = defaultdict(list)
    for item in items:
        by_layout[item.dataset, item.layout].append(item)
    found = []
    for number, layout in sorted(by_layout, key=lambda key: (key[0], key[1].stacked, key[1].varlen)):
        dataset = config.datasets[number]
        keys = tuple(
            ItemKey(dataset=number, name=item.name, repeat=repeat)
            for item in by_layout[number, layout]
            for repeat in range(dataset.num_repeats)
        )
        found.append((layout, Bucket(keys=keys, batch_size=dataset.batch_size)))
    return found


def _pixels(layout: Layout) -> str:
    _, frames, height, width = layout.shape(MAIN)
    return f"{width * VAE_STRIDE}x{height * VAE_STRIDE}x{frames}"


class BatchReader(Dataset):
    """Reads and stacks. What workers are asked for, `reader[batch]`, is None when a file cannot be read: exceptions do
    not come whole out of another process, so `read` is to raise it in this one."""

    def __init__(self, items: Sequence[CachedItem]) -> None:
        self._items = {(item.dataset, item.name): item for item in items}

    def __getitem__(self, batch: Batch) -> Contents | None:
        try:
            return self.read(batch)
        except UserError:
            return None

    def read(self, batch: Batch) -> Contents:
        """Stacks what can be stacked.

        Raises:
            UserError: a file is gone, damaged, or not what it was when training began.
        """
        items = [self._items[key.dataset, key.name] for key in batch]
        rows = [_row(item) for item in items]
        layout = items[0].layout
        stacked = {content: torch.stack([row[content] for row in rows]) for content, _, _ in layout.stacked}
        return stacked | {content: [row[content] for row in rows] for content in layout.varlen}


def _row(item: CachedItem) -> dict[str, Tensor]:
    row = read_cache(item.latents) | read_cache(item.text)
    varlen = item.layout.varlen
    stacked = sorted(
        (c, tuple(t.shape), str(t.dtype).removeprefix("torch.")) for c, t in row.items() if c not in varlen
    )
    if tuple(stacked) != item.layout.stacked or not row.keys() >= set(varlen):
        expected = "what was there when training began"
        raise UserError(f"{item.latents} or {item.text.name}", "other tensors", expected, "start training again")
    return row


class _Order(Sampler):
    """What the loader reads next; set before each epoch, as workers stay from epoch to epoch."""

    def __init__(self) -> None:
        self.batches: Sequence[Batch] = ()

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


class BatchLoader:
    """This process's batches, epoch by epoch."""

    def __init__(
        self, dataset: TrainingDataset, *, seed: int, num_workers: int = 0, rank: int = 0, world: int = 1
    ) -> None:
        """Starts nothing yet.

        Args:
            num_workers: processes that read ahead; the batches are the same with any number.
            rank: this process's number, from 0.
            world: how many processes train together.
        """
        self._buckets, self._seed = dataset.buckets, seed
        self._rank, self._world = rank, world
        self._reader = dataset.reader()
        self._order = _Order()
        self._workers = _workers(self._reader, self._order, num_workers) if num_workers else None
        self.num_batches = -(-dataset.num_batches // world)
        """Of an epoch, for each process."""
        if extra := self.num_batches * world - dataset.num_batches:
            logger.warning(
                "%d batches for %d processes: %d at the beginning of an epoch are trained again at its end, so that "
                "all processes have %d",
                *(dataset.num_batches, world, extra, self.num_batches),
            )

    def epoch(self, start: Position) -> Iterator[TrainBatch]:
        """Yields the batches of an epoch from `start` on: exactly what an undisturbed epoch would yield there.

        Raises:
            UserError: a cache cannot be read any more.
            ValueError: the epoch has no such batch, so the position is one in other data.
        """
        batches = epoch_batches(self._buckets, seed=self._seed, epoch=start.epoch)
        if start.batch >= len(batches):
            raise ValueError(f"{start} in an epoch of {len(batches)} batches")
        mine = list(share(batches, start, rank=self._rank, world=self._world))
        for (batch, after), contents in zip(mine, self._contents([batch for batch, _ in mine]), strict=True):
            yield TrainBatch(contents=contents or self._reader.read(batch), items=batch, after=after)

    def _contents(self, batches: Sequence[Batch]) -> Iterator[Contents | None]:
        if self._workers is None:
            return map(self._reader.read, batches)
        self._order.batches = batches
        with _children_deaf_to_ctrl_c():
            return map(pickle.loads, self._workers)


def _workers(reader: BatchReader, order: _Order, num_workers: int) -> DataLoader:
    return DataLoader(
        reader,
        sampler=order,
        batch_size=None,
        num_workers=num_workers,
        multiprocessing_context="spawn",
        persistent_workers=True,
        worker_init_fn=_ignore_ctrl_c,
        # Pickled in the worker, as torch would send tensors through /dev/shm, which is 64 MB in a container.
        collate_fn=pickle.dumps,
        # Of its own, because the loader draws from it: the global one serves dropout, and its state is resumed.
        generator=torch.Generator(),
    )


def _ignore_ctrl_c(worker: int = 0) -> None:
    """A terminal sends it to workers too, and a run could not finish its step without them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _children_deaf_to_ctrl_c() -> Iterator[None]:
    """Workers that are started inside inherit it: before they can ignore anything themselves, they import for long."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    _ignore_ctrl_c()
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
