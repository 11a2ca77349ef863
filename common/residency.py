"""Models come to the device when they are needed and leave it afterwards."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Generic, TypeVar

from common.device import peak_logged, release_memory

if TYPE_CHECKING:
    import torch
    from torch import nn

logger = logging.getLogger(__name__)

Model = TypeVar("Model", bound="nn.Module")


class Resident(Generic[Model]):
    """A model that is loaded when it is first used and is on the device only while in use.

    Users ask for `model` each time and keep no reference, so that leaving really frees the memory.

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
        self._in_use = self._aside = False

    @property
    def model(self) -> Model:
        """The model, on its device; only while in use.

        Raises:
            RuntimeError: outside of `use`.
        """
        if not self._in_use:
            raise RuntimeError(f"{self.name} is asked for while it is not in use")
        if self._aside:
            self._model.to(self._device)
            self._aside = False
        return self._model

    @contextmanager
    def use(self) -> Iterator[None]:
        """Makes `model` available. Uses may be nested; the outermost one brings the model in and out."""
        if self._in_use:
            yield
            return
        try:
            with peak_logged(self.name, self._device):
                self._enter()
                self._in_use = True
                yield
        finally:
            self._in_use = False
            self._leave()

    def step_aside(self) -> None:
        """Makes room on the device in the middle of a use; the next access to `model` brings it back."""
        if self._in_use and self._lent is None and not self._aside:
            self._model.to("cpu")
            self._aside = True
            release_memory(self._device)

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
        """Also after a use that was interrupted while the model came in."""
        self._aside = False
        if self._lent is not None:
            return
        if not self._keep:
            self._model = None
        elif self._model is not None:
            self._model.to("cpu")
        release_memory(self._device)
