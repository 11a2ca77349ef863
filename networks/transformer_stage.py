"""The transformer of a pipeline: loaded when it is first needed, lent its prompts' LoRAs, gone when it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from common.device import free_memory
from common.residency import Resident
from common.weights import Checkpoint
from modules.compute import TransformerCompute
from modules.swapping import SwapLimits, check_swap, choose_swap
from networks.lora_merge import LoraMerge
from networks.prompt_loras import PromptLoras
from options.request import GenerationRequest

if TYPE_CHECKING:
    from torch import nn

Model = TypeVar("Model", bound="nn.Module")
Request = TypeVar("Request", bound=GenerationRequest)


class Plan(Protocol):
    """What a request takes."""

    def needed(self, num_blocks: int, offload: bool) -> int:
        """Bytes of the device; see `choose_swap`."""


class TransformerStage(Generic[Model, Request]):
    """Knows the largest of the requests that were checked, for which the transformer has to fit.

    Args:
        load: the family's `load_transformer`.
        merge: LoRAs that the transformer gets while it is loaded.
        limits: how many of its blocks may be swapped.
        plan: of a request.
        size: says which of two requests needs more.
        keep, lent: see `Resident`.

    Raises:
        UserError: more blocks are to be swapped than may be.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        load: Callable[..., Model],
        *,
        compute: TransformerCompute,
        merge: LoraMerge | None,
        limits: SwapLimits,
        plan: Callable[[Request], Plan],
        size: Callable[[Request], object],
        keep: bool,
        lent: Model | None = None,
    ) -> None:
        self._checkpoint, self._load_model, self._compute, self._merge = checkpoint, load, compute, merge
        self._limits, self._plan, self._size = limits, plan, size
        self._prompt_loras = PromptLoras(checkpoint)
        self._largest: Request | None = None
        self._resident = Resident("transformer", self._load, compute.device, keep=keep, lent=lent)
        if lent is None:
            check_swap(compute.swap, limits)

    def _load(self) -> Model:
        compute = self._compute
        plan = cache(lambda: self._plan(self._largest))
        free = free_memory(compute.device)
        swap = choose_swap(compute.swap, self._limits, free=free, needed=lambda *choice: plan().needed(*choice))
        place = {"dtype": compute.transformer_dtype, "device": compute.device}
        model = self._load_model(self._checkpoint, merge=self._merge, fp8=compute.fp8, swap=swap, **place)
        compute.execution.apply_to(model)
        return model

    def check(self, request: Request) -> None:
        """Takes note of a request.

        Raises:
            UserError: one of its LoRAs does not fit.
        """
        self._prompt_loras.check(request.loras)
        self._largest = max(filter(None, (self._largest, request)), key=self._size)

    @contextmanager
    def use(self) -> Iterator[None]:
        """The transformer is on its device, and the prompts' LoRAs leave it afterwards."""
        try:
            with self._resident.use():
                yield
        finally:
            self._prompt_loras.leave_device()

    @contextmanager
    def model_for(self, request: Request) -> Iterator[Model]:
        """The transformer with the request's LoRAs; only while in use."""
        transformer = self._resident.model
        with self._prompt_loras.on(transformer, request.loras):
            yield transformer

    def make_room(self, num_bytes: int) -> None:
        """The transformer steps aside when the device has not so much memory left."""
        if free_memory(self._compute.device) < num_bytes:
            self._resident.step_aside()
