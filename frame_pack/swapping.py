"""What of FramePack's transformer lies in RAM: what users ask for, how much they may, and what `auto` chooses."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from frame_pack.config import FramePackConfig
from modules.block_swap import SwapOptions
from options.errors import UserError
from options.swap_count import SwapCount

logger = logging.getLogger(__name__)

FLAG = "--blocks_to_swap"
SHARE = 0.95
"""Of the memory that is free; the rest is lost in gaps between allocations."""
RESERVE = 1 << 29
"""Bytes for what nobody counts: work space of kernels, mostly."""


@dataclass(frozen=True, kw_only=True)
class SwapWish:
    """What the flags say."""

    blocks: SwapCount
    for_training: bool = False
    offload_invariant: Literal["auto", "always", "never"] = "never"
    """In training these weights are needed in every step; those of swapped blocks are swapped, too."""
    pinned: bool = False
    ring_size: int = 2

    def options(self, config: FramePackConfig, num_blocks: int, *, offload: bool) -> SwapOptions:
        """For a number of blocks as users count them."""
        return SwapOptions(
            counts=block_counts(num_blocks, config),
            invariant="all" if offload else "of swapped blocks" if self.for_training else "none",
            pinned=self.pinned,
            ring_size=self.ring_size,
        )


def block_counts(num_blocks: int, config: FramePackConfig) -> tuple[int, int]:
    """How many double and how many single blocks are swapped when users ask for `num_blocks`.

    Source: the facts about block swap: half of them double, and two single ones and one more for each of the others.
    """
    if num_blocks == 0:
        return 0, 0
    double = num_blocks // 2
    return min(double, config.num_double_blocks), min((num_blocks - double) * 2 + 1, config.num_single_blocks)


def most_blocks(config: FramePackConfig, *, for_training: bool) -> int:
    """What users may ask for: 38, in training 36, of the published model; of a smaller one the same share."""
    return 2 * config.num_double_blocks * (36 if for_training else 38) // 40


def check_swap(wish: SwapWish, config: FramePackConfig) -> None:
    """Raises UserError for more blocks than may be swapped."""
    most = most_blocks(config, for_training=wish.for_training)
    if (wish.blocks.value or 0) > most:
        what = "in training" if wish.for_training else "in generation"
        raise UserError(FLAG, wish.blocks, f"at most {most} {what} of a model like this", f"use {most}, or auto")


def choose_swap(
    wish: SwapWish, config: FramePackConfig, *, free: float, needed: Callable[[int, bool], int]
) -> SwapOptions:
    """What is to lie in RAM: what was asked for, and as little as fits where that is left open.

    Args:
        free: bytes of the device that could be allocated now; infinite where nobody can tell.
        needed: of these, all that is taken with (so many swapped blocks, offloading what only `prepare` needs).
    """
    choices = list(_choices(wish, config))
    num_blocks, offload = choices[0]
    size, available = 0, SHARE * free - RESERVE
    for num_blocks, offload in choices if math.isfinite(free) else ():
        if (size := needed(num_blocks, offload)) <= available:
            break
    options = wish.options(config, num_blocks, offload=offload)
    if wish.blocks.is_auto:
        logger.info("%s auto: %d, which are %d double and %d single blocks", FLAG, num_blocks, *options.counts)
    if wish.offload_invariant == "auto" and offload and not num_blocks:
        logger.info("--offload_invariant auto: memory is short, so weights that a prompt needs once wait in RAM")
    if size > available:
        text = "the transformer and its work take about %.1f GB, and %.1f GB are free: it may not fit"
        logger.warning(text, size / 1e9, free / 1e9)
    return options


def _choices(wish: SwapWish, config: FramePackConfig) -> Iterator[tuple[int, bool]]:
    """(blocks, whether to offload) that may be chosen, the fastest first."""
    most = most_blocks(config, for_training=wish.for_training)
    for num_blocks in range(most + 1) if wish.blocks.is_auto else [wish.blocks.value]:
        if wish.offload_invariant == "auto" and num_blocks == 0:
            yield 0, False
        yield num_blocks, wish.offload_invariant != "never"
