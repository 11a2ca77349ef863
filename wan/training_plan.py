"""What Wan's trainer shows the transformer at a time."""

from __future__ import annotations

from dataset.cached_items import Layout
from modules.training_plan import TrainedBatch
from wan.cached_context import INDICES, LATENTS
from wan.config import WanConfig
from wan.costs import Tokens, WanCosts
from wan.model import PATCH


def largest_batch(config: WanConfig, layouts: tuple[tuple[Layout, int], ...]) -> TrainedBatch:
    """Of all that a data set has."""
    return max((trained_batch(config, layout, size) for layout, size in layouts), key=lambda batch: batch.num_tokens)


def trained_batch(config: WanConfig, layout: Layout, size: int) -> TrainedBatch:
    costs = WanCosts(config=config, tokens=tokens_of(layout), in_training=True)
    return TrainedBatch(costs=costs, size=size, latents=layout.shape(LATENTS))


def tokens_of(layout: Layout) -> Tokens:
    """Of one item; how long its text is makes no difference."""
    _, num_frames, height, width = layout.shape(LATENTS)
    frame = (height // PATCH) * (width // PATCH)
    num_controls = num_frames - 1 if INDICES in layout.contents else 0
    return Tokens(target=(num_frames - num_controls) * frame, controls=num_controls * frame)
