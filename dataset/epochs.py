"""Which batches an epoch has, in which order, and who trains them: functions of the seed, the epoch and the items.

The order comes from sorting by hashes, not from a random generator: it needs no state, so any epoch can be had at once
and by any process; it does not depend on the platform or on how a version of Python shuffles.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True, kw_only=True)
class ItemKey:
    """What an epoch shows once. Stable: the same on every machine and in every run with the same caches."""

    dataset: int
    """The data set's number in its file, from 0."""
    name: str
    """The latent cache's file name, its letters with accents in Unicode's composed form (NFC)."""
    repeat: int
    """0 … num_repeats - 1."""


Batch = tuple[ItemKey, ...]


@dataclass(frozen=True, kw_only=True)
class Bucket:
    """Items that can be stacked."""

    keys: tuple[ItemKey, ...]
    """All of one data set, with their repeats."""
    batch_size: int

    @property
    def num_batches(self) -> int:
        return -(-len(self.keys) // self.batch_size)


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where training goes on."""

    epoch: int = 0
    """From 0."""
    batch: int = 0
    """Batches of this epoch that were trained, by all processes together: so their number may change in between."""

    def as_dict(self) -> dict[str, int]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, saved: Mapping[str, object]) -> Position:
        """What `as_dict` gave.

        Raises:
            ValueError: it is something else.
        """
        is_ours = saved.keys() == {"epoch", "batch"}
        if not is_ours or not all(type(value) is int and value >= 0 for value in saved.values()):
            raise ValueError(f"not a position in the data: {dict(saved)}")
        return cls(**saved)


def stable_number(*parts: int | str) -> int:
    """64 bits that depend on `parts` alone: an order, or the seed of a generator."""
    text = json.dumps(parts)  # ASCII, and ("a", "b") differs from ("ab",)
    return int.from_bytes(hashlib.sha256(text.encode("ascii")).digest()[:8], "big")


def epoch_batches(buckets: Sequence[Bucket], *, seed: int, epoch: int) -> tuple[Batch, ...]:
    """All batches of an epoch: shuffled inside each bucket, cut, then shuffled over all buckets and data sets."""

    def place(kind: str, key: ItemKey) -> int:
        return stable_number(kind, seed, epoch, key.dataset, key.name, key.repeat)

    batches: list[Batch] = []
    for bucket in buckets:
        keys = sorted(bucket.keys, key=lambda key: place("item", key))
        batches += [tuple(keys[i : i + bucket.batch_size]) for i in range(0, len(keys), bucket.batch_size)]
    return tuple(sorted(batches, key=lambda batch: place("batch", batch[0])))


def share(batches: Sequence[Batch], start: Position, *, rank: int, world: int) -> Iterator[tuple[Batch, Position]]:
    """This process's batches of an epoch from `start` on, each with the position behind it.

    Every process gets as many: where they do not come out even, the last round is filled up from the epoch's beginning.
    """
    num_rounds = -(-(len(batches) - start.batch) // world)
    for done in range(start.batch, start.batch + num_rounds * world, world):
        is_last = done + world >= len(batches)
        after = Position(epoch=start.epoch + 1) if is_last else Position(epoch=start.epoch, batch=done + world)
        yield batches[(done + rank) % len(batches)], after
