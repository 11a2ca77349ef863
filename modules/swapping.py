"""How many of a transformer's blocks lie in RAM: what users ask for, how much they may, and what `auto` chooses."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from modules.block_swap import Invariant, SwapOptions, swapped_numbers
from options.errors import UserError
from options.flags_train import MemoryFlags
from options.swap_count import SwapCount

logger = logging.getLogger(__name__)

FLAG = "--blocks_to_swap"
SHARE = 0.95
"""Of the memory that is free; the rest is lost in gaps between allocations."""
RESERVE = 1 << 29
"""Bytes for what nobody counts: work space of kernels, mostly."""


@dataclass(frozen=True, kw_only=True)
class SwapLimits:
    """How a model counts its blocks for `--blocks_to_swap`."""

    lists: Mapping[str, int]
    """How many blocks there are of each kind, in the order of the model's lists."""
    counts: Callable[[int], tuple[int, ...]]
    """How many of each are swapped when users ask for so many."""
    most_in_generation: int
    """That users may ask for."""
    most_in_training: int
    invariant_in_training: Invariant = "of swapped blocks"
    """What becomes of the layers that only `prepare` calls: all of them are needed in every step of a training."""

    def most(self, *, for_training: bool) -> int:
        return self.most_in_training if for_training else self.most_in_generation

    def numbers(self, num_blocks: int) -> list[int]:
        """Which of the model's blocks are swapped when users ask for so many."""
        return swapped_numbers(self.counts(num_blocks), self.lists.values())

    def described(self, num_blocks: int) -> str:
        counts = self.counts(num_blocks)
        if len(self.lists) == 1:
            return str(num_blocks)
        named = " and ".join(f"{count} {kind}" for kind, count in zip(self.lists, counts, strict=True))
        return f"{num_blocks}, which are {named} blocks"


@dataclass(frozen=True, kw_only=True)
class SwapWish:
    """What the flags say."""

    blocks: SwapCount = SwapCount()
    for_training: bool = False
    offload_invariant: Literal["auto", "always", "never"] = "never"
    pinned: bool = False
    ring_size: int = 2

    @classmethod
    def of_training(cls, flags: MemoryFlags) -> SwapWish:
        return cls(
            blocks=flags.blocks_to_swap or SwapCount(),
            for_training=True,
            pinned=flags.use_pinned_memory_for_block_swap,
            ring_size=flags.block_swap_ring_size,
        )

    def options(self, limits: SwapLimits, num_blocks: int, *, offload: bool) -> SwapOptions:
        """For a number of blocks as users count them."""
        return SwapOptions(
            counts=limits.counts(num_blocks),
            invariant="all" if offload else limits.invariant_in_training if self.for_training else "none",
            pinned=self.pinned,
            ring_size=self.ring_size,
        )

    def choices(self, limits: SwapLimits) -> Iterator[tuple[int, bool]]:
        """(blocks, whether to offload) that may be chosen, the fastest first."""
        most = limits.most(for_training=self.for_training)
        for num_blocks in range(most + 1) if self.blocks.is_auto else [self.blocks.value]:
            if self.offload_invariant == "auto" and num_blocks == 0:
                yield 0, False
            yield num_blocks, self.offload_invariant != "never"


def check_swap(wish: SwapWish, limits: SwapLimits) -> None:
    """Raises UserError for more blocks than may be swapped."""
    most = limits.most(for_training=wish.for_training)
    if (wish.blocks.value or 0) > most:
        what = "in training" if wish.for_training else "in generation"
        raise UserError(FLAG, wish.blocks, f"at most {most} {what} of a model like this", f"use {most}, or auto")


def choose_swap(wish: SwapWish, limits: SwapLimits, *, free: float, needed: Callable[[int, bool], int]) -> SwapOptions:
    """What is to lie in RAM: what was asked for, and as little as fits where that is left open.

    Args:
        free: bytes of the device that could be allocated now; infinite where nobody can tell.
        needed: of these, all that is taken with (so many swapped blocks, offloading what only `prepare` needs).
    """
    choices = list(wish.choices(limits))
    num_blocks, offload = choices[0]
    size, available = 0, SHARE * free - RESERVE
    for num_blocks, offload in choices if math.isfinite(free) else ():
        if (size := needed(num_blocks, offload)) <= available:
            break
    if wish.blocks.is_auto:
        logger.info("%s auto: %s", FLAG, limits.described(num_blocks))
    if wish.offload_invariant == "auto" and offload and not num_blocks:
        logger.info("--offload_invariant auto: memory is short, so weights that a prompt needs once wait in RAM")
    if size > available:
        text = "the transformer and its work take about %.1f GB, and %.1f GB are free: it may not fit"
        logger.warning(text, size / 1e9, free / 1e9)
    return wish.options(limits, num_blocks, offload=offload)
