"""Weights that lie in RAM and visit the device: a ring of slots there takes them in turn.

A *unit* is what comes and goes together, a block's linear layers for example. Frozen weights never change, so that
copies go one way only: the master stays in RAM, and a slot is simply overwritten when its unit has been used. Copies
are made ahead of their use, as many as there are slots, on a stream of their own; events alone keep them in order with
what is computed. The host waits for nothing where masters are page-locked, else for its staging buffers.

While a unit is in use its parameters are views of the slot, else of the master: `.data` is set, and not another
parameter put in its place, so that whoever holds the parameter (a compiled graph, an adapter's layer, a state dict)
sees the same object with the same type and shape. A graph that has recorded addresses (CUDA graphs, the compile mode
`reduce-overhead`) does not go together with this, and is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor, nn

from options.errors import UserError, one_line

ALIGNMENT = 256
"""Bytes; what CUDA gives to tensors of their own, so that kernels find what they expect."""


@dataclass(frozen=True, kw_only=True)
class Weight:
    """A tensor of a unit and its place in the unit's bytes."""

    layer: nn.Module
    name: str
    dtype: torch.dtype
    shape: torch.Size
    start: int

    @property
    def tensor(self) -> Tensor:
        return getattr(self.layer, self.name)

    @property
    def num_bytes(self) -> int:
        return self.dtype.itemsize * self.shape.numel()

    def within(self, storage: Tensor) -> Tensor:
        """The view of `storage`, a unit's bytes, that is this weight."""
        return storage[self.start : self.start + self.num_bytes].view(self.dtype).view(self.shape)


class Unit:
    """Frozen weights of some layers. Making one moves them into RAM, into one piece of memory.

    Args:
        weights: (layer, name of its parameter or buffer).
        pinned: in page-locked RAM, from where a GPU fetches them by itself.

    Raises:
        UserError: there is not enough such RAM.
    """

    def __init__(self, weights: Iterable[tuple[nn.Module, str]], *, pinned: bool = False) -> None:
        self._weights: list[Weight] = []
        self.num_bytes = 0
        for layer, name in weights:
            tensor = getattr(layer, name)
            place = Weight(layer=layer, name=name, dtype=tensor.dtype, shape=tensor.shape, start=self.num_bytes)
            self._weights.append(place)
            self.num_bytes += -(-place.num_bytes // ALIGNMENT) * ALIGNMENT
        self.master = _pinned(self.num_bytes) if pinned else torch.empty(self.num_bytes, dtype=torch.uint8)
        for weight in self._weights:
            weight.within(self.master).copy_(weight.tensor)
        self.to_master()

    def holds(self, layer: nn.Module) -> bool:
        return any(weight.layer is layer for weight in self._weights)

    def to(self, storage: Tensor) -> None:
        """Lets the layers use these bytes."""
        for weight in self._weights:
            weight.tensor.data = weight.within(storage)

    def to_master(self) -> None:
        """Lets the layers show what lies in RAM."""
        self.to(self.master)

    def hide(self) -> None:
        """Leaves the layers nothing, until `to` or `to_master`."""
        for weight in self._weights:
            weight.tensor.data = weight.tensor.new_empty(0)


def _pinned(num_bytes: int) -> Tensor:
    try:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        got, expected = (
            f"no {num_bytes / 1e6:.0f} MB more of it ({one_line(str(error))[:100]})",
            "enough page-locked RAM",
        )
        raise UserError("--use_pinned_memory_for_block_swap", got, expected, "leave it out") from error


class Slot:
    """Room for one unit on the device."""

    def __init__(self, storage: Tensor) -> None:
        self.storage = storage
        self.rank: int | None = None
        """Whose weights it has, or is about to have."""
        self.filled: torch.cuda.Event | None = None
        self.free: torch.cuda.Event | None = None


class Copies(Protocol):
    """How a slot gets a unit's weights."""

    def new_slot(self, num_bytes: int) -> Slot: ...

    def start(self, slot: Slot, master: Tensor) -> None:
        """Begins to fill the slot, once all that was computed before `done` is over."""

    def wait(self, slot: Slot) -> None:
        """What is computed from now on sees the slot filled."""

    def done(self, slot: Slot) -> None:
        """What is computed from now on does not need the slot any more."""


class PlainCopies:
    """At once: for a CPU, on which nothing overlaps."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = device

    def new_slot(self, num_bytes: int) -> Slot:
        return Slot(torch.empty(num_bytes, dtype=torch.uint8, device=self._device))

    def start(self, slot: Slot, master: Tensor) -> None:
        slot.storage[: len(master)].copy_(master)

    def wait(self, slot: Slot) -> None:
        pass

    def done(self, slot: Slot) -> None:
        pass


class StreamCopies:
    """On a CUDA stream of their own, beside what is computed.

    A GPU fetches by itself from page-locked RAM only. Where the masters are not, they pass through staging buffers that
    are; filling one is the host's work, which the device's work on earlier units hides.

    Args:
        num_staging: of these buffers; 0 for masters that are pinned.
    """

    def __init__(self, device: torch.device, *, num_staging: int) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._staging: list[Tensor | None] = [None] * num_staging
        self._staged: list[torch.cuda.Event | None] = [None] * num_staging
        self._turn = 0

    def new_slot(self, num_bytes: int) -> Slot:
        slot = Slot(torch.empty(num_bytes, dtype=torch.uint8, device=self._device))
        # Whenever the slot is given up, its memory is nobody else's before the last copy into it is over.
        slot.storage.record_stream(self._stream)
        self.done(slot)
        return slot

    def start(self, slot: Slot, master: Tensor) -> None:
        if not self._staging:
            self._copy(slot, master)
            return
        turn = self._turn = (self._turn + 1) % len(self._staging)
        if (staged := self._staged[turn]) is not None:
            staged.synchronize()
        if self._staging[turn] is None or len(self._staging[turn]) < len(master):
            self._staging[turn] = torch.empty(len(slot.storage), dtype=torch.uint8, pin_memory=True)
        self._staged[turn] = self._copy(slot, self._staging[turn][: len(master)].copy_(master))

    def _copy(self, slot: Slot, source: Tensor) -> torch.cuda.Event:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(slot.free)
            slot.storage[: len(source)].copy_(source, non_blocking=True)
            slot.filled = torch.cuda.Event(blocking=True)  # a host that has to wait for it sleeps
            slot.filled.record(self._stream)
        return slot.filled

    def wait(self, slot: Slot) -> None:
        torch.cuda.current_stream(self._device).wait_event(slot.filled)

    def done(self, slot: Slot) -> None:
        slot.free = torch.cuda.current_stream(self._device).record_event()


class Ring:
    """Slots that units pass through. One unit is in use at a time; its rank is its place in `units`.

    What comes next is told each time, as *order*: ranks, the nearest first. The slots get the units that are needed
    next; one that is needed soon again stays. An order that turns out wrong costs time and nothing else: a unit that
    is not there is fetched when it is asked for.
    """

    def __init__(self, units: Sequence[Unit], num_slots: int, copies: Copies) -> None:
        self.units, self._copies = units, copies
        self._num_slots = min(num_slots, len(units))
        self._slots: list[Slot] = []
        self._current: tuple[Unit, Slot] | None = None

    @property
    def num_bytes(self) -> int:
        """On the device."""
        return sum(len(slot.storage) for slot in self._slots)

    @contextmanager
    def using(self, rank: int, order: Sequence[int]) -> Iterator[None]:
        """The unit's layers can be called within.

        Args:
            order: of what is needed after it.
        """
        self.hold(rank, order)
        try:
            yield
        finally:
            self._end()
            self._fetch(order)

    def hold(self, rank: int, order: Sequence[int]) -> None:
        """The unit's layers can be called until another unit is asked for."""
        self._end()
        self._fetch([rank, *order])
        slot = next(slot for slot in self._slots if slot.rank == rank)
        self._copies.wait(slot)
        self.units[rank].to(slot.storage)
        self._current = self.units[rank], slot

    def close(self) -> None:
        """Gives up the slots, until a unit is asked for again."""
        self._end()
        self._slots = []

    def _end(self) -> None:
        if self._current is not None:
            unit, slot = self._current
            self._current = None
            unit.to_master()
            self._copies.done(slot)

    def _fetch(self, order: Sequence[int]) -> None:
        """Starts copies of what is needed next and not there yet."""
        if not self._slots:
            size = max(unit.num_bytes for unit in self.units)
            self._slots = [self._copies.new_slot(size) for _ in range(self._num_slots)]
        wanted = list(islice(dict.fromkeys(order), self._num_slots))
        there = {slot.rank for slot in self._slots}
        spare = (slot for slot in self._slots if slot.rank not in wanted)
        for rank in wanted:
            if rank not in there:
                slot = next(spare)
                slot.rank = None  # should the copy fail, nobody takes it for made
                self._copies.start(slot, self.units[rank].master)
                slot.rank = rank
