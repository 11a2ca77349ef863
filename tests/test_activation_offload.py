"""What checkpointed blocks keep waits in RAM: the same gradients, and nothing large left on the device."""

from __future__ import annotations

import gc
from weakref import ref

import pytest
import torch
from torch import Tensor, nn

from frame_pack.model import FramePackTransformer
from modules import activation_offload
from modules.activation_offload import ActivationOffload, Parked, PlainPorter, StreamPorter
from modules.checkpointing import Checkpointing
from networks.network import Network
from tests.training_builders import (
    EPOCH,
    NUM_BLOCKS,
    batch_of,
    build_network,
    build_objective,
    build_transformer,
    loss_and_gradients,
    one_frame_item,
    random,
)

CPU = torch.device("cpu")
LARGE_INPUTS = [2, 2, 1, 1]
"""Of each block of the small model: a double block has two streams."""
MIN_BYTES = 30_000
"""Between modulations and tokens of the small model."""


class Recording(PlainPorter):
    """Tells what it does, and gives each tensor back only once it was sent."""

    def __init__(self) -> None:
        self.log: list[tuple[str, int]] = []
        self.originals: list[ref[Tensor]] = []
        self._numbers: dict[Parked, int] = {}

    @property
    def parked(self) -> list[Parked]:
        return list(self._numbers)

    def take_away(self, tensor: Tensor) -> Parked:
        parked = super().take_away(tensor)
        self._numbers[parked] = len(self._numbers)
        self.originals.append(ref(tensor.untyped_storage()))
        self.log.append(("away", self._numbers[parked]))
        return parked

    def send_back(self, parked: Parked) -> None:
        super().send_back(parked)
        self.log.append(("back", self._numbers[parked]))

    def receive(self, parked: Parked) -> Tensor:
        self.log.append(("here", self._numbers[parked]))
        return super().receive(parked)


def adapted(num_checkpointed: int, offload: ActivationOffload | None, dropout: float | None = None):
    transformer = build_transformer()
    network = build_network(transformer, dropout=dropout)
    network.apply_to(transformer)
    transformer.checkpointing = Checkpointing(
        num_blocks=num_checkpointed, has_dropout=dropout is not None, offload=offload
    )
    return transformer, network


def two_items():
    return batch_of({"猫": one_frame_item(1, length=4), "b": one_frame_item(2)})


def gradients(transformer: FramePackTransformer, network: Network) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(7)
    result, found = loss_and_gradients(build_objective(transformer), network, two_items())
    return result.weighted, found


@pytest.mark.parametrize("dropout", [None, 0.3])
@pytest.mark.parametrize("num_checkpointed", [0, 1, 3, NUM_BLOCKS])
def test_losses_and_gradients_are_the_same_to_the_last_bit(num_checkpointed: int, dropout: float | None) -> None:
    expected_loss, expected = gradients(*adapted(num_checkpointed, None, dropout))
    porter = Recording()
    offload = ActivationOffload(porter, min_bytes=MIN_BYTES)
    loss, found = gradients(*adapted(num_checkpointed, offload, dropout))
    assert torch.equal(loss, expected_loss)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
    count = sum(LARGE_INPUTS[:num_checkpointed])
    assert sorted(porter.log) == sorted((what, i) for what in ("away", "back", "here") for i in range(count))


def test_each_one_is_sent_back_before_it_is_asked_for() -> None:
    porter = Recording()
    gradients(*adapted(NUM_BLOCKS, ActivationOffload(porter, min_bytes=MIN_BYTES)))
    log = porter.log[sum(LARGE_INPUTS) :]
    assert log[:4] == [("back", 5), ("back", 4), ("back", 3), ("here", 5)]
    for number in range(5):
        here = log.index(("here", number))
        assert log.index(("back", number)) < here and log[here - 1] != ("back", number), (
            "it would have to be waited for"
        )
    on_the_way = most = 0
    for what, _ in log:
        on_the_way += {"back": 1, "here": -1}[what]
        most = max(most, on_the_way)
    assert most == 3, "the one that is asked for, and two more"


def test_nothing_large_of_a_checkpointed_block_is_left_where_it_was() -> None:
    transformer, network = adapted(NUM_BLOCKS, ActivationOffload(porter := Recording(), min_bytes=MIN_BYTES))
    result = build_objective(transformer)(two_items(), epoch=EPOCH)
    gc.collect()
    assert len(porter.originals) == sum(LARGE_INPUTS) and [kept() for kept in porter.originals] == [None] * 6
    result.weighted.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_what_nobody_takes_gradients_of_is_dropped() -> None:
    offload = ActivationOffload(PlainPorter(), min_bytes=MIN_BYTES)
    transformer, _ = adapted(NUM_BLOCKS, offload)
    objective = build_objective(transformer)
    for _ in range(2):
        objective(two_items(), epoch=EPOCH)
        gc.collect()
        assert not [known for known in offload._parked if known() is not None]
    with torch.no_grad():
        objective(two_items(), epoch=EPOCH)
    assert not [known for known in offload._parked if known() is not None]


def test_small_tensors_stay_where_they_are() -> None:
    offload = ActivationOffload.on(CPU)
    transformer, network = adapted(NUM_BLOCKS, offload)
    gradients(transformer, network)
    assert offload._parked == [], "all of the small model are below a MiB"


def test_gradients_can_be_taken_twice() -> None:
    weight = nn.Parameter(random(64, seed=1))
    offload = ActivationOffload(porter := Recording(), min_bytes=1)
    block = Checkpointing(num_blocks=1, offload=offload).of(lambda x: (x * weight).sin(), 0)
    x = random(8, 64, seed=2).requires_grad_()
    loss = block(x).sum()
    first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
    assert [parked.returning for parked in porter.parked] == [None], "the graph does not hold it"
    second = torch.autograd.grad(loss, (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    expected = torch.autograd.grad((x * weight).sin().sum(), (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, expected, strict=True))


# ---- streams, seen through stand-ins ----


class Stream:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")

    def wait_event(self, event: str) -> None:
        self.log.append(f"{self.name} waits for {event}")

    def record_event(self) -> str:
        event = f"{self.name} {len(self.log)}"
        self.log.append(f"record {event}")
        return event

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def test_copies_and_computation_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    names, compute, kept = iter(["away", "back"]), Stream("compute", log), []

    class Cuda:
        Event = str

        @staticmethod
        def Stream(device: object) -> Stream:  # noqa: N802
            return Stream(next(names), log)

        @staticmethod
        def current_stream(device: object) -> Stream:
            return compute

        @staticmethod
        def stream(stream: Stream) -> Stream:
            return stream

    class Torch:
        cuda = Cuda

        @staticmethod
        def empty_like(like: Tensor, *, device: object, pin_memory: bool = False) -> Tensor:
            log.append("pinned memory" if pin_memory else "device memory")
            return torch.empty_like(like, device=device)

    monkeypatch.setattr(activation_offload, "torch", Torch)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: kept.append(stream.name), raising=False)
    porter, x = StreamPorter(CPU), random(3, 4, seed=1).t()
    parked = porter.take_away(x)
    assert log == ["pinned memory", "away waits for compute", "record away 2"] and kept == ["away"]
    log.clear()
    porter.send_back(parked)
    expected = ["device memory", "back waits for compute", "back waits for away 2", "record back 3"]
    assert log == expected and kept == ["away", "back"]
    log.clear()
    returned = porter.receive(parked)
    assert log == ["compute waits for back 3"]
    assert torch.equal(returned, x) and returned.stride() == x.stride()
