"""How many of FramePack's blocks `--blocks_to_swap` means."""

from __future__ import annotations

from functools import partial

from frame_pack.config import FramePackConfig
from modules.swapping import SwapLimits


def swap_limits(config: FramePackConfig) -> SwapLimits:
    """Users may ask for 38, in training 36, of the published model; of a smaller one for the same share."""
    return SwapLimits(
        lists={"double": config.num_double_blocks, "single": config.num_single_blocks},
        counts=partial(block_counts, config),
        most_in_generation=2 * config.num_double_blocks * 38 // 40,
        most_in_training=2 * config.num_double_blocks * 36 // 40,
    )


def block_counts(config: FramePackConfig, num_blocks: int) -> tuple[int, int]:
    """How many double and how many single blocks are swapped when users ask for `num_blocks`.

    Source: the facts about block swap: half of them double, and two single ones and one more for each of the others.
    """
    if num_blocks == 0:
        return 0, 0
    double = num_blocks // 2
    return min(double, config.num_double_blocks), min((num_blocks - double) * 2 + 1, config.num_single_blocks)
