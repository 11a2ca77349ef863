"""Units of weights in RAM and the slots that they pass through, one after the other."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from modules import weight_ring
from modules.weight_ring import PlainCopies, Ring, Slot, StreamCopies, Unit
from options.errors import UserError

CPU = torch.device("cpu")
POISON = 0xFF
"""Not a number in every type of weights: float32, bfloat16, float8_e4m3fn."""


class LateCopies(PlainCopies):
    """The worst that a stream of its own can do: what is to be overwritten is spoilt at once, and what is to come
    comes when it is waited for. Tells what it does."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[str, Tensor]] = []
        self._coming: dict[Slot, Tensor] = {}
        self._in_use: set[Slot] = set()

    def start(self, slot: Slot, master: Tensor) -> None:
        assert slot not in self._in_use
        slot.storage.fill_(POISON)
        self._coming[slot] = master
        self.log.append(("start", master))

    def wait(self, slot: Slot) -> None:
        if slot in self._coming:
            super().start(slot, self._coming.pop(slot))
        self._in_use.add(slot)
        self.log.append(("wait", slot.storage))

    def done(self, slot: Slot) -> None:
        self._in_use.remove(slot)

    @property
    def started(self) -> list[Tensor]:
        return [tensor for what, tensor in self.log if what == "start"]


def layers(*widths: int) -> list[nn.Linear]:
    return [nn.Linear(3, width).requires_grad_(False) for width in widths]


def ring_of(num_units: int, num_slots: int) -> tuple[Ring, list[nn.Linear], LateCopies]:
    """Units of one layer each."""
    copies, found = LateCopies(), layers(*range(4, 4 + num_units))
    return Ring([Unit([(layer, "weight")]) for layer in found], num_slots, copies), found, copies


def ranks(ring: Ring, tensors: list[Tensor]) -> list[int]:
    return [next(rank for rank, unit in enumerate(ring.units) if unit.master is tensor) for tensor in tensors]


def onward(rank: int, num_units: int) -> list[int]:
    return [*range(rank + 1, num_units), *range(rank)]


# ---- units ----


def test_a_units_weights_are_views_of_one_piece_of_ram_with_the_same_bits() -> None:
    mixed = nn.Linear(5, 7)
    mixed.weight = nn.Parameter(torch.randn(7, 5).to(torch.float8_e4m3fn), requires_grad=False)
    mixed.register_buffer("scale_weight", torch.rand(7, 1).bfloat16())
    mixed.register_buffer("one", torch.tensor(2.5))
    given = [("weight", mixed.weight), ("scale_weight", mixed.scale_weight), ("one", mixed.one)]
    before = {name: tensor.clone() for name, tensor in given}
    parameter = mixed.weight
    unit = Unit((mixed, name) for name in before)
    assert mixed.weight is parameter, "whoever holds the parameter goes on seeing it"
    start = unit.master.data_ptr()
    for name, tensor in before.items():
        now = getattr(mixed, name)
        assert (now.dtype, now.shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(now.reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
        assert (now.data_ptr() - start) % 256 == 0 and 0 <= now.data_ptr() - start < unit.num_bytes
    assert unit.num_bytes == len(unit.master) == 3 * 256


def test_a_weight_that_lies_in_a_file_is_read_into_ram(tmp_path) -> None:
    """Reading maps files into memory; a master that stayed there would be read again in every step."""
    (layer,) = layers(4)
    path = tmp_path / "重み.bin"
    path.write_bytes(bytes(4 * 12))
    layer.weight.data = torch.from_file(str(path), shared=True, size=12).view(4, 3)
    Unit([(layer, "weight")])
    path.write_bytes(bytes([1] * 48))
    assert not layer.weight.any()


def test_too_little_page_locked_ram_is_said_in_one_line(monkeypatch) -> None:
    def empty(*_: object, **rest: object) -> Tensor:
        assert rest["pin_memory"]
        raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")

    (layer,) = layers(4)
    monkeypatch.setattr(weight_ring.torch, "empty", empty)
    with pytest.raises(UserError, match="--use_pinned_memory_for_block_swap: got no 0 MB more.*leave it out") as error:
        Unit([(layer, "weight")], pinned=True)
    assert "\n" not in str(error.value)


# ---- the schedule ----


def test_every_unit_is_copied_once_in_each_round_and_before_its_turn() -> None:
    ring, found, copies = ring_of(5, 2)
    for _ in range(3):
        for rank in range(5):
            with ring.using(rank, onward(rank, 5)):
                there = {slot.rank for slot in ring._slots}
                assert there == {rank, (rank + 1) % 5}, "the next one is on its way while this one is used"
                assert not found[rank].weight.isnan().any()
    assert ranks(ring, copies.started) == [*range(5), *range(5), *range(5), 0, 1], "the last two are for a next round"


def test_the_first_round_starts_with_what_is_needed_first() -> None:
    ring, _, copies = ring_of(5, 3)
    with ring.using(0, onward(0, 5)):
        assert ranks(ring, copies.started) == [0, 1, 2]
    assert ranks(ring, copies.started) == [0, 1, 2, 3]


@pytest.mark.parametrize("num_slots", [1, 2, 3, 4, 7])
def test_on_the_way_out_and_back_nothing_is_copied_that_is_there_still(num_slots: int) -> None:
    """In training the last units are the first to be needed again, and the first ones the first of the next step."""
    num_units = 4
    ring, found, copies = ring_of(num_units, num_slots)
    for _ in range(3):
        copies.log.clear()
        for rank in range(num_units):
            with ring.using(rank, [*range(rank + 1, num_units), *reversed(range(num_units))]):
                assert not found[rank].weight.isnan().any()
        for rank in reversed(range(num_units)):
            ring.hold(rank, [*reversed(range(rank)), *range(num_units)])
            assert not found[rank].weight.isnan().any()
    assert len(copies.started) == 2 * max(0, num_units - num_slots)


def test_no_more_than_the_slots_are_on_the_device() -> None:
    ring, _, _ = ring_of(5, 2)
    assert ring.num_bytes == 0
    for rank in (0, 3, 1, 1, 4):
        with ring.using(rank, onward(rank, 5)):
            assert ring.num_bytes == 2 * max(unit.num_bytes for unit in ring.units)
    ring.close()
    assert ring.num_bytes == 0


def test_more_slots_than_units_are_not_made() -> None:
    ring, _, copies = ring_of(3, 9)
    for _ in range(2):
        for rank in range(3):
            with ring.using(rank, onward(rank, 3)):
                pass
    assert len(ring._slots) == len(copies.started) == 3


def test_a_unit_that_nobody_foresaw_is_fetched_when_it_is_asked_for() -> None:
    ring, found, _ = ring_of(6, 2)
    wanted = [layer.weight.clone() for layer in found]
    for rank in (0, 4, 2, 2, 5, 1):
        with ring.using(rank, onward(rank, 6)):
            assert torch.equal(found[rank].weight, wanted[rank])


def test_only_the_unit_in_use_is_a_slots() -> None:
    ring, found, _ = ring_of(3, 2)

    def in_ram() -> list[bool]:
        units = zip(found, ring.units, strict=True)
        return [layer.weight.data_ptr() == unit.master.data_ptr() for layer, unit in units]

    with ring.using(1, onward(1, 3)):
        assert in_ram() == [True, False, True]
    assert in_ram() == [True] * 3
    ring.hold(2, [1, 0])
    assert in_ram() == [True, True, False]
    with pytest.raises(ZeroDivisionError), ring.using(0, [1]):
        raise ZeroDivisionError
    assert in_ram() == [True] * 3, "also when what is computed fails"


def test_masters_never_change() -> None:
    ring, found, _ = ring_of(4, 2)
    before = [unit.master.clone() for unit in ring.units]
    for rank in (0, 1, 2, 3, 0, 3):
        with ring.using(rank, onward(rank, 4)):
            found[rank](torch.ones(3))
    assert all(torch.equal(unit.master, kept) for unit, kept in zip(ring.units, before, strict=True))


# ---- streams, seen through stand-ins ----


class FakeEvent:
    def __init__(self, blocking: bool = False) -> None:
        self.blocking = blocking

    def record(self, stream: FakeStream) -> None:
        stream.log.append(("record", stream.name, self))

    def synchronize(self) -> None:
        assert self.blocking, "the host would spin"
        FakeStream.log.append(("host waits", "host", self))


class FakeStream:
    log: list = []  # noqa: RUF012

    def __init__(self, device: object, name: str = "side") -> None:
        self.name = name

    def wait_event(self, event: FakeEvent | None) -> None:
        assert event is not None
        self.log.append(("wait", self.name, event))

    def record_event(self) -> FakeEvent:
        event = FakeEvent()
        event.record(self)
        return event

    def __enter__(self) -> None:
        self.log.append(("enter", self.name, None))

    def __exit__(self, *_: object) -> None:
        self.log.append(("exit", self.name, None))


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[list]:
    """What happens on the two streams and on the host, in order."""
    compute = FakeStream(None, "compute")

    class Cuda:
        Stream, Event = FakeStream, FakeEvent

        @staticmethod
        def current_stream(device: object) -> FakeStream:
            return compute

        @staticmethod
        def stream(stream: FakeStream) -> FakeStream:
            return stream

    class Torch:
        cuda = Cuda

        def __getattr__(self, name: str) -> object:
            return getattr(torch, name)

        @staticmethod
        def empty(*shape: int, pin_memory: bool = False, **rest: object) -> Tensor:
            found = torch.empty(*shape, **rest)
            if pin_memory:
                FakeStream.log.append(("pin", "host", found))
            return found

    monkeypatch.setattr(weight_ring, "torch", Torch())
    kept = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: kept.append(tensor), raising=False)
    FakeStream.log.clear()
    yield FakeStream.log
    assert kept, "a slot's memory would be given away while it is being filled"


@pytest.mark.parametrize("num_staging", [0, 2])
def test_a_slot_is_filled_after_its_last_use_and_used_after_it_was_filled(num_staging: int, streams) -> None:
    copies = StreamCopies(CPU, num_staging=num_staging)
    slot = copies.new_slot(16)
    for number in range(4):
        copies.start(slot, torch.full((16,), number, dtype=torch.uint8))
        copies.wait(slot)
        assert slot.storage.eq(number).all()
        copies.done(slot)
    events = [entry for entry in streams if entry[0] in ("record", "wait")]
    assert events[0][:2] == ("record", "compute"), "whoever had the slot's memory before is to be done with it"
    for last_use, round_ in zip([0, 4, 8, 12], [1, 5, 9, 13], strict=True):
        waits, fills, comes, leaves = events[round_ : round_ + 4]
        assert waits == ("wait", "side", events[last_use][2])
        assert fills[:2] == ("record", "side")
        assert comes == ("wait", "compute", fills[2])
        assert leaves[:2] == ("record", "compute")
    assert len(events) == 17


def test_staging_buffers_are_filled_again_when_they_have_been_fetched(streams) -> None:
    copies = StreamCopies(CPU, num_staging=2)
    slots = [copies.new_slot(16) for _ in range(3)]
    fetched = []
    for number in range(5):
        slot = slots[number % 3]
        copies.start(slot, torch.full((12,), number, dtype=torch.uint8))
        fetched.append(slot.filled)
        copies.wait(slot)
        assert slot.storage[:12].eq(number).all()
    assert [event for what, _, event in streams if what == "host waits"] == fetched[:3]
    assert sum(what == "pin" for what, _, _ in streams) == 2


def test_pinned_masters_need_no_staging_and_no_waiting(streams) -> None:
    copies = StreamCopies(CPU, num_staging=0)
    slot = copies.new_slot(16)
    for _ in range(4):
        copies.start(slot, torch.zeros(16, dtype=torch.uint8))
    assert not [what for what, _, _ in streams if what in ("host waits", "pin")]
