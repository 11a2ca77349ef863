"""Activation checkpointing: a block keeps its inputs only and computes the rest again when gradients are taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, TypeVar

import torch
from torch.utils.checkpoint import checkpoint

P, R = ParamSpec("P"), TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Checkpointing:
    """Which blocks of a model are checkpointed."""

    num_blocks: int = 0
    """The first so many. The last ones are spared: their activations are the first to be freed on the way back."""
    has_dropout: bool = False
    """Whether random numbers have to be the same the second time, which costs a copy of the generators' states."""

    def of(self, block: Callable[P, R], number: int) -> Callable[P, R]:
        """What to call instead of `block`, the model's block of this number; takes positional arguments."""
        if number >= self.num_blocks or not torch.is_grad_enabled():
            return block
        return partial(checkpoint, block, use_reentrant=False, preserve_rng_state=self.has_dropout)
