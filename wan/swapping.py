"""How many of Wan's blocks `--blocks_to_swap` means."""

from __future__ import annotations

from modules.swapping import SwapLimits
from wan.config import WanConfig


def swap_limits(config: WanConfig) -> SwapLimits:
    """All but one: 39 of the 14B models, 29 of the 1.3B ones."""
    return SwapLimits(
        lists={"blocks": config.num_blocks},
        counts=lambda num_blocks: (num_blocks,),
        most_in_generation=config.num_blocks - 1,
        most_in_training=config.num_blocks - 1,
        # There a block computes its own keys and values, with layers that come and go with it.
        invariant_in_training="with their blocks",
    )
