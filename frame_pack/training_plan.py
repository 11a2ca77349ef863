"""What FramePack's trainer shows the transformer at a time."""

from __future__ import annotations

from dataset.cached_items import Layout
from frame_pack.cached_context import CLEAN, CLEAN_2X, CLEAN_4X, FEATURES, TARGET
from frame_pack.config import FramePackConfig
from frame_pack.costs import FramePackCosts, Tokens, group_tokens
from frame_pack.model import PATCH
from hunyuan_model.text_encoders import MAX_LLAMA_TOKENS
from modules.training_plan import TrainedBatch

TEXT = "llama_vec"


def largest_batch(config: FramePackConfig, layouts: tuple[tuple[Layout, int], ...]) -> TrainedBatch:
    """Of all that a data set has."""
    return max((trained_batch(config, layout, size) for layout, size in layouts), key=lambda batch: batch.num_tokens)


def trained_batch(config: FramePackConfig, layout: Layout, size: int) -> TrainedBatch:
    costs = FramePackCosts(config=config, tokens=tokens_of(layout))
    return TrainedBatch(costs=costs, size=size, latents=layout.shape(TARGET))


def tokens_of(layout: Layout) -> Tokens:
    """Of one item, with the longest text that there can be."""
    shapes = {name: shape for name, shape, _ in layout.stacked}
    _, num_frames, height, width = shapes[TARGET]
    rows, columns = height // PATCH, width // PATCH

    def group(names: tuple[str, str], pool: int) -> int:
        return group_tokens(shapes[names[1]][0], rows, columns, pool) if names[1] in shapes else 0

    return Tokens(
        target=num_frames * rows * columns,
        clean=group(CLEAN, 1),
        clean_2x=group(CLEAN_2X, 2),
        clean_4x=group(CLEAN_4X, 4),
        image=shapes[FEATURES][0],
        text=min(shapes[TEXT][0], MAX_LLAMA_TOKENS),
    )
