"""What FramePack's transformer computes and keeps, counted layer by layer.

`modules/plan.py` has the conventions. Every block costs the same: a double block has one set of layers for each of its
two streams, and a token goes through one of them.

Shapes: B batch, S steps, L tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from frame_pack.config import FramePackConfig
from frame_pack.context import (
    HISTORY_FRAMES,
    PackedContext,
    f1_context,
    one_frame_context,
    section_context,
)
from frame_pack.layers import TIME_CHANNELS
from frame_pack.model import PATCH
from modules.plan import Flops, attention_flops, linear_flops
from options.fpack_request import FramePackRequest
from options.geometry import VAE_STRIDE

NUM_IMAGE = 729
"""SigLIP's patches."""


# ---- tokens ----


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Of one sample, by group."""

    target: int
    clean: int
    clean_2x: int
    clean_4x: int
    image: int
    """SigLIP's, which go with the text."""
    text: int

    @classmethod
    def of(cls, context: PackedContext, *, num_text: int, num_image: int = NUM_IMAGE) -> Tokens:
        """What the model makes of a context, whose latents may be on the meta device."""
        height, width = context.token_grid
        groups = {
            pool: group_tokens(group.indices.shape[1], height, width, pool) for group, pool in context.coarse_to_fine()
        }
        return cls(
            target=context.num_target_tokens,
            clean=groups[1],
            clean_2x=groups.get(2, 0),
            clean_4x=groups.get(4, 0),
            image=num_image,
            text=num_text,
        )

    @property
    def history(self) -> int:
        """All that is clean."""
        return self.clean + self.clean_2x + self.clean_4x

    @property
    def pictures(self) -> int:
        """What goes through a double block's image layers."""
        return self.history + self.target

    @property
    def texts(self) -> int:
        """What goes through a double block's text layers."""
        return self.image + self.text

    @property
    def total(self) -> int:
        return self.pictures + self.texts

    def by_group(self) -> dict[str, int]:
        """In the order and with the names of a report."""
        groups = {"target": self.target, "clean": self.clean, "2x": self.clean_2x, "4x": self.clean_4x}
        return groups | {"image": self.image, "text": self.text}


def group_tokens(num_frames: int, height: int, width: int, pool: int) -> int:
    """Of clean frames that are `pool` times coarser than a target of `height` x `width` tokens."""
    frames, rows, columns = (-(-size // pool) for size in (num_frames, height, width))
    return frames * rows * columns


def context_of(request: FramePackRequest) -> PackedContext:
    """The context of one of its sections without any content: all of them have equally many tokens."""
    like = torch.empty(1, 1, 1, request.height // VAE_STRIDE, request.width // VAE_STRIDE, device="meta")
    window = request.latent_window_size
    if request.one_frame is not None:
        controls = [like] * len(request.control_image_paths)
        return one_frame_context(controls, [None] * len(controls), request.one_frame, window=window, like=like)
    others = like.expand(-1, -1, HISTORY_FRAMES, -1, -1)
    if request.f1:
        return f1_context(like, torch.cat([others, like], dim=2), window=window)
    return section_context(like, others, padding=0, window=window)


def num_tokens(request: FramePackRequest) -> int:
    """Of its pictures, which is nearly all; texts are not counted."""
    return Tokens.of(context_of(request), num_text=0).total


# ---- operations ----


def step_flops(config: FramePackConfig, tokens: Tokens, *, batch: int = 1) -> Flops:
    """Of one step: the blocks, and the target's way in and out."""
    patch = PATCH * PATCH * config.latent_channels
    ends = linear_flops(tokens.target, 2 * patch * config.width)
    return (block_flops(config, tokens) * num_blocks(config) + ends) * batch


def block_flops(config: FramePackConfig, tokens: Tokens) -> Flops:
    """Of one block of either kind."""
    weights = linear_flops(tokens.total, block_weights(config))
    return weights + attention_flops(tokens.total, tokens.total, config.width)


def block_weights(config: FramePackConfig) -> int:
    """That a token meets in a block: query, key, value, output, and the MLP up and down."""
    return 4 * config.width**2 + 2 * config.width * config.mlp_width


def num_blocks(config: FramePackConfig) -> int:
    return config.num_double_blocks + config.num_single_blocks


def prepare_flops(config: FramePackConfig, tokens: Tokens, *, num_steps: int = 1, batch: int = 1) -> Flops:
    """Of everything that is done once for all steps."""
    width, channels = config.width, config.latent_channels
    cubes = ((tokens.clean, 1), (tokens.clean_2x, 2), (tokens.clean_4x, 4))
    embeds = sum((linear_flops(n, channels * PATCH**2 * pool**3 * width) for n, pool in cubes), Flops())
    image = linear_flops(tokens.image, 3 * width * (config.image_width + width))
    modulations = linear_flops(num_steps, num_modulations(config) * width**2)
    times = linear_flops(num_steps + 1, (TIME_CHANNELS + width) * width)  # and guidance, which is one for all steps
    pooled = linear_flops(1, (config.pooled_width + width) * width)
    return (embeds + image + modulations + times + pooled + _refiner_flops(config, tokens.text, num_steps)) * batch


def num_modulations(config: FramePackConfig) -> int:
    """Vectors, each as wide as the model, that blocks and the output are modulated with in one step."""
    return 12 * config.num_double_blocks + 3 * config.num_single_blocks + 2


def _refiner_flops(config: FramePackConfig, num_text: int, num_steps: int) -> Flops:
    """The first block's attention does not know the step yet, so it is computed once."""
    width = config.width
    inputs = linear_flops(num_text, config.text_width * width) + linear_flops(1, (config.text_width + width) * width)
    inputs += linear_flops(num_steps, (TIME_CHANNELS + width) * width)
    attention = linear_flops(num_text, 4 * width**2) + attention_flops(num_text, num_text, width)
    rest = linear_flops(num_text, 8 * width**2) + linear_flops(1, 2 * width**2)
    if not config.num_refiner_blocks:
        return inputs
    all_attention = attention * (1 + (config.num_refiner_blocks - 1) * num_steps)
    return inputs + all_attention + rest * (config.num_refiner_blocks * num_steps)


# ---- bytes ----


@dataclass(frozen=True, kw_only=True)
class Work:
    """How the transformer computes, as far as its memory depends on it."""

    itemsize: int
    """Bytes of a number that it computes with."""
    batch: int = 1
    num_steps: int = 1
    """That are prepared together."""
    num_prepared: int = 1
    """2 with classifier-free guidance."""
    unpacked: int = 0
    """Bytes of the largest weight that is made whole from fp8 while its layer computes."""


def prepared_bytes(config: FramePackConfig, tokens: Tokens, work: Work) -> int:
    """What is ready for all steps: text, modulations, clean tokens and the rotary tables, which are in float32."""
    rows = work.num_steps * (tokens.texts + num_modulations(config)) + tokens.history
    one = work.batch * (rows * config.width * work.itemsize + tokens.total * config.head_dim * 4)
    return one * work.num_prepared


def prepare_bytes(config: FramePackConfig, tokens: Tokens, work: Work) -> int:
    """At its worst moment, when the last refiner block's MLP computes for all steps, beside what an earlier `prepare`
    of the same section has made ready."""
    ready = prepared_bytes(config, tokens, work) // work.num_prepared
    row = work.batch * config.width * work.itemsize
    num_rows = work.num_steps * tokens.text
    refining = (11 * num_rows + tokens.history + tokens.image) * row
    earlier = ready * (work.num_prepared - 1)
    return earlier + max(refining, ready + num_rows * row) + work.unpacked


def step_bytes(config: FramePackConfig, tokens: Tokens, work: Work) -> int:
    """What one step allocates on top of what is prepared, without gradients.

    Counted in rows as wide as the model. In a double block, while the image's MLP computes: image before and after
    attention, its norm, the MLP before and after its activation; query, key, value and result of the attention, text
    before and after. In a single block, in the last product: tokens (twice, as the step still holds the two streams),
    norm, attention's result, the MLP's activation, both joined, output.
    """
    ratio = config.mlp_width / config.width
    double = (3 + 2 * ratio) * tokens.pictures + 4 * tokens.total + 2 * tokens.texts
    single = (6 + 2 * ratio) * tokens.total
    rows = max(double if config.num_double_blocks else 0, single) + tokens.target
    return round(rows * work.batch * config.width * work.itemsize) + work.unpacked


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Which blocks keep what for the backward pass."""

    checkpointed: frozenset[int] = frozenset()
    """Numbers of those that keep their inputs only."""
    in_ram: bool = False
    """Whether these inputs wait in RAM."""


def kept_bytes(config: FramePackConfig, tokens: Tokens, work: Work, kept: Kept) -> int:
    """What a forward pass keeps for the backward pass when every linear layer has an adapter.

    Counted in rows as wide as the model. A double block keeps its inputs before and after attention with their norms
    (4), query and key before and after their norm and rotation (4), value and result (2), the MLP before and after its
    activation; a single block one input less. Low ranks and statistics make about a tenth of a row. The last block's
    output is kept, too; of the first one's inputs the text is there anyway, and without a checkpoint all of it is not
    needed again.
    """
    rows = 1 - (tokens.texts / tokens.total if 0 in kept.checkpointed else 1)
    for number in range(num_blocks(config)):
        if number not in kept.checkpointed:
            is_double = number < config.num_double_blocks
            rows += (10.1 if is_double else 9.1) + 2 * config.mlp_width / config.width
        elif not kept.in_ram:
            rows += 1
    return round(rows * tokens.total * work.batch * config.width * work.itemsize)


def backward_bytes(config: FramePackConfig, tokens: Tokens, work: Work, kept: Kept) -> int:
    """What the backward pass takes at its worst moment beside what is kept: gradients inside one block, and that
    block's activations where they are computed again."""
    ratio = config.mlp_width / config.width
    rows = 2 + 2 * ratio
    if len(kept.checkpointed) == num_blocks(config):
        rows += 9 + 2 * ratio
    if kept.checkpointed and kept.in_ram:
        rows += 2  # inputs on their way
    return round(rows * tokens.total * work.batch * config.width * work.itemsize) + work.unpacked
