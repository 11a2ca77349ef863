"""What checkpointing keeps of each block waits in RAM until its gradients are taken.

Autograd hands everything that a checkpointed block keeps, which is its inputs, to a pair of hooks. Large tensors go to
RAM while the next block computes, and come back, in reverse order, while a later block's gradients are taken. They are
copied, so results are the same to the last bit. Small ones (modulations, masks) are not worth it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, Protocol, TypeVar
from weakref import ref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

P, R = ParamSpec("P"), TypeVar("R")
MIN_BYTES = 1 << 20
NUM_AHEAD = 2
"""Tensors on their way back; a block has at most two large inputs."""


@dataclass(eq=False)
class Parked:
    """A tensor that is in RAM, on its way there, or on its way back."""

    host: Tensor
    event: torch.cuda.Event | None = None
    """Of the last copy."""
    returning: Tensor | None = None
    """What it comes back to, from the beginning of that copy until it is received."""


class Porter(Protocol):
    """How tensors get to RAM and back."""

    def take_away(self, tensor: Tensor) -> Parked:
        """Begins to copy it; whoever has no other use for it may drop it."""

    def send_back(self, parked: Parked) -> None:
        """Begins to bring it back."""

    def receive(self, parked: Parked) -> Tensor:
        """What is computed from now on sees it there again."""


class PlainPorter:
    """At once: for a CPU."""

    def take_away(self, tensor: Tensor) -> Parked:
        return Parked(tensor.to("cpu", copy=True))

    def send_back(self, parked: Parked) -> None:
        parked.returning = parked.host

    def receive(self, parked: Parked) -> Tensor:
        return parked.returning


class StreamPorter:
    """Through pinned RAM, on a CUDA stream of its own: each way has a copy engine of its own, too."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._away, self._back = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def take_away(self, tensor: Tensor) -> Parked:
        # Kept as dense as it is: what reads it again is to see the same strides.
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        self._away.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._away):
            host.copy_(tensor, non_blocking=True)
            parked = Parked(host, self._away.record_event())
        tensor.record_stream(self._away)
        return parked

    def send_back(self, parked: Parked) -> None:
        tensor = torch.empty_like(parked.host, device=self._device)
        # Its memory may have been another tensor's a moment ago.
        self._back.wait_stream(torch.cuda.current_stream(self._device))
        self._back.wait_event(parked.event)
        with torch.cuda.stream(self._back):
            tensor.copy_(parked.host, non_blocking=True)
            parked.event = self._back.record_event()
        tensor.record_stream(self._back)
        parked.returning = tensor

    def receive(self, parked: Parked) -> Tensor:
        torch.cuda.current_stream(self._device).wait_event(parked.event)
        return parked.returning


class ActivationOffload:
    """Sends away what blocks keep, and has it sent back a little ahead of its use.

    Args:
        min_bytes: smaller tensors stay.
    """

    def __init__(self, porter: Porter, *, min_bytes: int = MIN_BYTES) -> None:
        self._porter, self._min_bytes = porter, min_bytes
        self._parked: list[ref[Parked]] = []
        """In the order in which they came. Autograd owns them, and drops those that nobody takes gradients of."""

    @classmethod
    def on(cls, device: torch.device) -> ActivationOffload:
        return cls(StreamPorter(device) if device.type == "cuda" else PlainPorter())

    def around(self, checkpointed: Callable[P, R]) -> Callable[P, R]:
        """`checkpointed`, a block within a checkpoint, with its inputs going to RAM."""

        def call(*arguments: P.args, **rest: P.kwargs) -> R:
            # What the block itself would have autograd keep does not come here: the checkpoint has hooks of its own.
            with saved_tensors_hooks(self._pack, self._unpack):
                return checkpointed(*arguments, **rest)

        return call

    def _pack(self, tensor: Tensor) -> Tensor | Parked:
        if tensor.nbytes < self._min_bytes:
            return tensor
        parked = self._porter.take_away(tensor.detach())
        self._parked = [*filter(lambda known: known() is not None, self._parked), ref(parked)]
        return parked

    def _unpack(self, parked: Tensor | Parked) -> Tensor:
        if isinstance(parked, Tensor):
            return parked
        waiting = [known for known in self._parked if known() not in (None, parked)]
        # Autograd goes backwards: what came last is asked for next.
        for wanted in (parked, *(known() for known in reversed(waiting[-NUM_AHEAD:]))):
            if wanted is not None and wanted.returning is None:
                self._porter.send_back(wanted)
        self._parked = waiting
        tensor, parked.returning = self._porter.receive(parked), None
        return tensor
