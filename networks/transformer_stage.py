"""The transformer of a pipeline: loaded when it is first needed, lent its prompts' LoRAs, gone when it is not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Generic, TypeVar

from common.residency import Resident
from common.weights import Checkpoint
from networks.prompt_loras import PromptLoras
from options.request import GenerationRequest

if TYPE_CHECKING:
    import torch
    from torch import nn

Model = TypeVar("Model", bound="nn.Module")
Request = TypeVar("Request", bound=GenerationRequest)


class TransformerStage(Generic[Model, Request]):
    """Knows the largest of the requests that were checked, for which the transformer has to fit.

    Args:
        load: the transformer on its device, fit for a request.
        size: says which of two requests needs more.
        keep, lent: see `Resident`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        load: Callable[[Request], Model],
        *,
        size: Callable[[Request], object],
        device: torch.device,
        keep: bool,
        lent: Model | None = None,
    ) -> None:
        self._size, self._prompt_loras = size, PromptLoras(checkpoint)
        self._largest: Request | None = None
        self._resident = Resident("transformer", lambda: load(self._largest), device, keep=keep, lent=lent)

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

    def step_aside(self) -> None:
        """See `Resident.step_aside`."""
        self._resident.step_aside()
