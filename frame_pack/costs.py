"""What FramePack's transformer computes and keeps, counted layer by layer.

`modules/plan.py` has the conventions. Every block costs the same: a double block has one set of layers for each of its
two streams, and a token goes through one of them.

Shapes: B batch, S steps, L tokens, D width.
"""

from __future__ import annotations

import re
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
from modules.transformer_plan import Kept, Work
from options.fpack_request import FramePackRequest
from options.geometry import VAE_STRIDE

NUM_IMAGE = 729
"""SigLIP's patches."""
OF_TEXT = re.compile(r"transformer_blocks\.\d+\.(attn\.(add_.*|to_add_out)|ff_context\..*)")
OF_PICTURES = re.compile(r"transformer_blocks\.\d+\.(attn|ff)\..*")
OF_ALL = re.compile(r"single_transformer_blocks\.\d+\.(attn\..*|proj_mlp|proj_out)")


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


# ---- operations and bytes ----


@dataclass(frozen=True, kw_only=True)
class FramePackCosts:
    """Of a model of this size and samples of so many tokens; see `modules.transformer_plan.Costs`."""

    config: FramePackConfig
    tokens: Tokens

    @property
    def num_blocks(self) -> int:
        return self.config.num_blocks

    def by_group(self) -> dict[str, int]:
        return self.tokens.by_group()

    def num_rows(self, path: str) -> int:
        if OF_ALL.fullmatch(path):
            return self.tokens.total
        if OF_TEXT.fullmatch(path):
            return self.tokens.texts
        return self.tokens.pictures if OF_PICTURES.fullmatch(path) else 1

    # ---- operations ----

    def step_flops(self, *, batch: int = 1) -> Flops:
        """Of one step: the blocks, and the target's way in and out."""
        config = self.config
        ends = linear_flops(self.tokens.target, 2 * PATCH * PATCH * config.latent_channels * config.width)
        return (self._block_flops() * config.num_blocks + ends) * batch

    def _block_flops(self) -> Flops:
        """Of one block of either kind: query, key, value, output, and the MLP up and down."""
        width, total = self.config.width, self.tokens.total
        weights = 4 * width**2 + 2 * width * self.config.mlp_width
        return linear_flops(total, weights) + attention_flops(total, total, width)

    def prepare_flops(self, *, num_steps: int = 1, batch: int = 1) -> Flops:
        """Of everything that is done once for all steps."""
        config, tokens, width = self.config, self.tokens, self.config.width
        cubes = ((tokens.clean, 1), (tokens.clean_2x, 2), (tokens.clean_4x, 4))
        embeds = (linear_flops(n, config.latent_channels * PATCH**2 * pool**3 * width) for n, pool in cubes)
        image = linear_flops(tokens.image, 3 * width * (config.image_width + width))
        modulations = linear_flops(num_steps, num_modulations(config) * width**2)
        # Guidance, too, which is one for all steps.
        times = linear_flops(num_steps + 1, (TIME_CHANNELS + width) * width)
        pooled = linear_flops(1, (config.pooled_width + width) * width)
        refiner = _refiner_flops(config, tokens.text, num_steps)
        return (sum(embeds, Flops()) + image + modulations + times + pooled + refiner) * batch

    # ---- bytes ----

    def prepared_bytes(self, work: Work) -> int:
        """What is ready for all steps: text, modulations, clean tokens and the rotary tables, which are in float32."""
        config, tokens = self.config, self.tokens
        rows = work.num_steps * (tokens.texts + num_modulations(config)) + tokens.history
        one = self._bytes(rows, work) + work.batch * tokens.total * config.head_dim * 4
        return one * work.num_prepared

    def prepare_bytes(self, work: Work) -> int:
        """At its worst moment, when the last refiner block's MLP computes for all steps, beside what an earlier
        `prepare` of the same section has made ready."""
        ready = self.prepared_bytes(work) // work.num_prepared
        num_rows = work.num_steps * self.tokens.text
        refining = self._bytes(11 * num_rows + self.tokens.history + self.tokens.image, work)
        earlier = ready * (work.num_prepared - 1)
        return earlier + max(refining, ready + self._bytes(num_rows, work)) + work.unpacked

    def step_bytes(self, work: Work) -> int:
        """What one step allocates on top of what is prepared, without gradients.

        In a double block, while the image's MLP computes: image before and after attention, its norm, the MLP before
        and after its activation; query, key, value and result of the attention, text before and after. In a single
        block, in the last product: tokens (twice, as the step still holds the two streams), norm, attention's result,
        the MLP's activation, both joined, output.
        """
        tokens, ratio = self.tokens, self._mlp_ratio
        double = (3 + 2 * ratio) * tokens.pictures + 4 * tokens.total + 2 * tokens.texts
        single = (6 + 2 * ratio) * tokens.total
        rows = max(double if self.config.num_double_blocks else 0, single) + tokens.target
        return self._bytes(rows, work) + work.unpacked

    def kept_bytes(self, work: Work, kept: Kept) -> int:
        """What a forward pass keeps for the backward pass when every linear layer has an adapter.

        A double block keeps its inputs before and after attention with their norms (4), query and key before and after
        their norm and rotation (4), value and result (2), the MLP before and after its activation; a single block one
        input less. Low ranks and statistics make about a tenth of a row. The last block's output is kept, too; of the
        first one's inputs the text is there anyway, and without a checkpoint all of it is not needed again.
        """
        tokens, rows = self.tokens, 0.0
        if 0 in kept.checkpointed:
            rows = 1 - tokens.texts / tokens.total
        for number in range(self.num_blocks):
            if number not in kept.checkpointed:
                rows += (10.1 if number < self.config.num_double_blocks else 9.1) + 2 * self._mlp_ratio
            elif not kept.in_ram:
                rows += 1
        return self._bytes(rows * tokens.total, work)

    def backward_bytes(self, work: Work, kept: Kept) -> int:
        """What the backward pass takes at its worst moment beside what is kept: gradients inside one block, and that
        block's activations where they are computed again."""
        rows = 2 + 2 * self._mlp_ratio
        if len(kept.checkpointed) == self.num_blocks:
            rows += 9 + 2 * self._mlp_ratio
        if kept.checkpointed and kept.in_ram:
            rows += 2  # inputs on their way
        return self._bytes(rows * self.tokens.total, work) + work.unpacked

    @property
    def _mlp_ratio(self) -> float:
        return self.config.mlp_width / self.config.width

    def _bytes(self, rows: float, work: Work) -> int:
        """Of rows as wide as the model."""
        return round(rows * work.batch * self.config.width * work.itemsize)


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
