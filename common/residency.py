"""Models come to the device when they are needed and leave it afterwards."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Generic, TypeVar

from common.device import release_memory

if TYPE_CHECKING:
    import torch
    from torch import nn

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound="nn.Module")


class Resident(Generic[Model]):
    """A model that is loaded when it is first used and is on the device only while in use.

    Args:
        load: builds the model on its device.
        keep: leaving keeps a copy in RAM for the next use; else the model is freed and a next use loads it again.
        lent: a model that belongs to someone else; it is neither loaded nor moved nor freed.
    """

    def __init__(
        self, name: str, load: Callable[[], Model], device: torch.device, *, keep: bool, lent: Model | None = None
    ) -> None:
        self.name, self._load, self._device, self._keep, self._lent = name, load, device, keep, lent
        self._model: Model | None = lent
        self.in_use = False

    @contextmanager
    def use(self) -> Iterator[Model]:
        """The model, on its device. Uses may be nested; the outermost one brings it in and out."""
        if self.in_use:
            yield self._model
            return
        self._enter()
        self.in_use = True
        try:
            yield self._model
        finally:
            self.in_use = False
            self._leave()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Makes room on the device for a while, in the middle of a use."""
        if not self.in_use or self._lent is not None:
            yield
            return
        self._model.to("cpu")
        release_memory(self._device)
        try:
            yield
        finally:
            self._model.to(self._device)

    def _enter(self) -> None:
        if self._lent is not None:
            return
        if self._model is not None:
            self._model.to(self._device)
            return
        start = time.perf_counter()
        self._model = self._load()
        logger.info("%s loaded in %.1f s", self.name, time.perf_counter() - start)

    def _leave(self) -> None:
        if self._lent is not None:
            return
        if self._keep:
            self._model.to("cpu")
        else:
            self._model = None
        release_memory(self._device)
