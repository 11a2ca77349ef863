"""What Wan's transformer computes and keeps, counted layer by layer.

`modules/plan.py` has the conventions.

Shapes: B batch, S steps, L tokens, D width.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from modules.layers import MAX_ROWS
from modules.plan import Flops, attention_flops, linear_flops
from modules.transformer_plan import Kept, Work
from options.geometry import VAE_STRIDE
from options.wan_request import WanRequest
from wan.config import WanConfig
from wan.context import NUM_FEATURES
from wan.model import PATCH

FLOAT32 = 4
"""Bytes."""
OF_TEXT = re.compile(r"blocks\.\d+\.cross_attn\.[kv]")
OF_IMAGE = re.compile(r"blocks\.\d+\.cross_attn\.[kv]_img")
OF_TOKENS = re.compile(r"blocks\.\d+\.(self_attn\.[qkvo]|cross_attn\.[qo]|ffn\.\d+)")


# ---- tokens ----


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Of one sample; those that attend to one another."""

    target: int
    """Of the frames that are kept."""
    controls: int = 0
    """Of one-frame mode's other frames."""

    @classmethod
    def of(cls, request: WanRequest) -> Tokens:
        side = VAE_STRIDE * PATCH
        frame = (request.height // side) * (request.width // side)
        return cls(target=num_target_frames(request) * frame, controls=len(request.control_image_paths) * frame)

    @property
    def total(self) -> int:
        return self.target + self.controls

    def by_group(self) -> dict[str, int]:
        """In the order and with the names of a report."""
        return {"target": self.target} | ({"controls": self.controls} if self.controls else {})


def num_target_frames(request: WanRequest) -> int:
    """Latent frames that are kept: all, but in one-frame mode a single one."""
    return request.num_latent_frames + request.appends_end


def num_tokens(request: WanRequest) -> int:
    """All that the transformer computes with."""
    return Tokens.of(request).total


def num_features(config: WanConfig) -> int:
    """Rows of CLIP features that the model is shown."""
    if config.image_width is None:
        return 0
    return config.num_image_positions or NUM_FEATURES


# ---- operations and bytes ----


@dataclass(frozen=True, kw_only=True)
class WanCosts:
    """Of a model of this size and samples of so many tokens; see `modules.transformer_plan.Costs`."""

    config: WanConfig
    tokens: Tokens
    in_training: bool = False
    """Whether gradients are taken: then keys and values of text and picture are computed in the blocks."""

    @property
    def num_blocks(self) -> int:
        return self.config.num_blocks

    def by_group(self) -> dict[str, int]:
        return self.tokens.by_group()

    def num_rows(self, path: str) -> int:
        if OF_TOKENS.fullmatch(path):
            return self.tokens.total
        if OF_TEXT.fullmatch(path):
            return self.config.text_length
        return num_features(self.config) if OF_IMAGE.fullmatch(path) else 1

    def without(self, num_blocks: int) -> WanCosts:
        """Of the model without so many of its blocks."""
        return replace(self, config=replace(self.config, num_blocks=self.num_blocks - num_blocks))

    # ---- operations ----

    def step_flops(self, *, batch: int = 1) -> Flops:
        """Of one step: the blocks, and the tokens' way in and out."""
        config, total = self.config, self.tokens.total
        channels = config.in_channels + config.latent_channels
        ends = linear_flops(total, PATCH * PATCH * channels * config.width)
        known = self._known_flops() if self.in_training else Flops()
        return (self._block_flops() * config.num_blocks + known + ends) * batch

    def _block_flops(self) -> Flops:
        """Of one block: query, key, value and output; query and output; the MLP up and down."""
        width, total = self.config.width, self.tokens.total
        weights = 6 * width**2 + 2 * width * self.config.mlp_width
        return linear_flops(total, weights) + attention_flops(total, total + self._num_context, width)

    def _known_flops(self) -> Flops:
        """Of all blocks' keys and values of text and picture."""
        return linear_flops(self._num_context, 2 * self.config.width**2) * self.config.num_blocks

    def prepare_flops(self, *, num_steps: int = 1, batch: int = 1) -> Flops:
        """Of everything that is done once for all steps."""
        config, width = self.config, self.config.width
        times = linear_flops(num_steps, (config.time_width + width + 6 * width) * width)
        text = linear_flops(config.text_length, (config.text_width + width) * width)
        image_width = config.image_width or 0
        image = linear_flops(num_features(config), (image_width + width) * image_width)
        known = Flops() if self.in_training else self._known_flops()
        return (times + text + image + known) * batch

    # ---- bytes ----

    def prepared_bytes(self, work: Work) -> int:
        """What is ready for all steps: the context, its keys and values, what lies beside the latents; and in float32
        times, modulations and the rotary tables."""
        config = self.config
        rows = self._num_context * (1 if self.in_training else 1 + 2 * config.num_blocks)
        beside = (config.in_channels - config.latent_channels) * PATCH**2 * self.tokens.total
        in_float32 = 7 * work.num_steps * config.width + self.tokens.total * config.head_dim
        one = (rows * config.width + beside) * work.itemsize + in_float32 * FLOAT32
        return one * work.batch * work.num_prepared

    def prepare_bytes(self, work: Work) -> int:
        """At its worst moment: at its end, or while a part of the largest layer of times is made float32."""
        ready = self.prepared_bytes(work) // work.num_prepared
        width = self.config.width
        part = 0 if work.itemsize == FLOAT32 else min(MAX_ROWS, 6 * width) * width * FLOAT32
        return ready * (work.num_prepared - 1) + max(part, ready) + work.unpacked

    def step_bytes(self, work: Work) -> int:
        """What one step allocates on top of what is prepared, without gradients.

        While the MLP computes: the tokens before the block and before the MLP, their norm, the MLP before and after
        its activation. While keys are rotated: tokens, their norm, query, key, rotated query; then a copy of the key
        in float32, and twice as much of parts of the result; or instead rotated key, value, and attention's result.
        """
        wide = FLOAT32 / work.itemsize
        mlp = 3 + 2 * self._mlp_ratio
        rotating = 2 * wide + (wide if wide > 1 else 0)
        rows = max(mlp, 5 + max(3, rotating))
        return self._bytes(rows * self.tokens.total, work) + work.unpacked

    def kept_bytes(self, work: Work, kept: Kept) -> int:
        """What a forward pass keeps for the backward pass when every linear layer of the blocks has an adapter.

        Of the three sub-layers each keeps a norm's input in float32 and its result; of attention the query before and
        after its norm and the result (3), of self-attention the key before and after its norm and the value (3), of the
        MLP what is before and after its activation. A picture's context has a result of its own, which is added to the
        text's (2). Of the context itself there are keys before and after their norm, and values. Low ranks and
        statistics make about a tenth of a row. The head keeps a norm's input, too; that of the first block is not
        needed again.
        """
        wide, total, block = FLOAT32 / work.itemsize, self.tokens.total, self._block_rows(work)
        rows = wide * total * (1 if 0 in kept.checkpointed else 0)
        for number in range(self.num_blocks):
            if number not in kept.checkpointed:
                rows += block
            elif not kept.in_ram:
                rows += total
        return self._bytes(rows, work)

    def backward_bytes(self, work: Work, kept: Kept) -> int:
        """What the backward pass takes at its worst moment beside what is kept: at its beginning the head's norm, or
        gradients inside the MLP; and a block's activations where they are computed again."""
        rows = max(5, 2 * self._mlp_ratio - 1) * self.tokens.total
        if kept.checkpointed and kept.in_ram:
            rows += 2 * self.tokens.total  # inputs on their way
        if len(kept.checkpointed) == self.num_blocks:
            rows += self._block_rows(work)
        return self._bytes(rows, work) + work.unpacked

    def _block_rows(self, work: Work) -> float:
        """That a block keeps for its gradients."""
        every = 3 * FLOAT32 / work.itemsize + 12.1 + 2 * self._mlp_ratio
        every += 2 if num_features(self.config) else 0
        return every * self.tokens.total + 3 * self._num_context

    @property
    def _num_context(self) -> int:
        """Rows of text and picture."""
        return self.config.text_length + num_features(self.config)

    @property
    def _mlp_ratio(self) -> float:
        return self.config.mlp_width / self.config.width

    def _bytes(self, rows: float, work: Work) -> int:
        """Of rows as wide as the model."""
        return round(rows * work.batch * self.config.width * work.itemsize)
