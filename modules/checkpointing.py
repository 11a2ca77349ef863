"""Activation checkpointing: a block keeps its inputs only and computes the rest again when gradients are taken."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ParamSpec, TypeVar

import torch
from torch.utils.checkpoint import checkpoint, noop_context_fn

from modules.activation_offload import ActivationOffload
from modules.block_swap import Berth

P, R = ParamSpec("P"), TypeVar("R")


@dataclass(frozen=True, kw_only=True)
class Checkpointing:
    """Which blocks of a model are checkpointed."""

    num_blocks: int = 0
    """The first so many. The last ones are spared: their activations are the first to be freed on the way back."""
    has_dropout: bool = False
    """Whether random numbers have to be the same the second time, which costs a copy of the generators' states."""
    offload: ActivationOffload | None = None
    """Where the inputs wait that checkpointed blocks keep; None leaves them where they are."""

    def of(self, block: Callable[P, R], number: int, berth: Berth | None = None) -> Callable[P, R]:
        """What to call instead of `block`, the model's block of this number; takes positional arguments.

        Args:
            berth: of a block whose weights are swapped. It is checkpointed in any case: without, autograd would keep
                the weights of all of them.
        """
        if not torch.is_grad_enabled():
            return berth.around(block) if berth else block
        if number >= self.num_blocks and berth is None:
            return block
        contexts = berth.contexts if berth else noop_context_fn
        kept = {"preserve_rng_state": self.has_dropout, "context_fn": contexts}
        checkpointed = partial(checkpoint, block, use_reentrant=False, **kept)
        return self.offload.around(checkpointed) if self.offload else checkpointed
