"""FramePack's transformer (HunyuanVideo blocks with packed, progressively coarser history).

The forward has two faces: `prepare` computes everything that does not depend on the noisy latents, for all steps at
once; `step` does the rest. `forward` is the two in a row. Module attributes match the published checkpoints.

Shapes: B batch, S steps, C latent channels, T target frames, H W latent size, L tokens, D width.
Token order: [4x history, 2x history, clean (1x) frames, target | image embedding, text].

Sources: Zhang & Agrawala, "Packing Input Frame Context in Next-Frame Prediction Models for Video Generation" (2025);
HunyuanVideo (2024); diffusers' `HunyuanVideoFramepackTransformer3DModel`, with which this model agrees numerically.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn

from frame_pack.config import FramePackConfig
from frame_pack.context import PackedContext
from frame_pack.layers import (
    CleanEmbedding,
    DoubleBlock,
    ImageProjection,
    Modulation,
    SingleBlock,
    TextRefiner,
    TimeTextEmbedding,
)
from frame_pack.rope import RopeScaling, concatenate, group_rope, unrotated
from modules.attention import AttentionLayout, AttentionOptions
from modules.block_swap import Swapping
from modules.checkpointing import Checkpointing
from modules.flow_matching import NUM_TIMESTEPS
from modules.layers import Float32Linear, embed_patches, modulate
from modules.rope import Rope

PATCH = 2  # rows and columns of a target token, in latent pixels


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What the transformer is told besides the noisy latents and the timestep."""

    context: PackedContext
    text: Tensor
    """(B, L, text_width) LLaMA states; rows past a sample's length are ignored."""
    text_mask: Tensor
    """(B, L) bool, True for valid rows, which come first."""
    pooled: Tensor
    """(B, pooled_width) CLIP-L pooler output."""
    image: Tensor
    """(B, 729, image_width) SigLIP states."""
    guidance: Tensor
    """(B,) distilled guidance scale times 1000."""


def guidance_input(scale: float, batch: int) -> Tensor:
    """(batch,) what the transformer is told about a distilled guidance scale.

    The published pipeline rounds it to bfloat16 before it is embedded: a scale of 10 becomes 9984.
    """
    return torch.full((batch,), scale * NUM_TIMESTEPS).bfloat16().float()


class StepInputs(NamedTuple):
    """What one step's blocks receive, already selected for that step."""

    text: Tensor
    rope: Rope
    double_image: tuple[Tensor, ...]
    double_text: tuple[Tensor, ...]
    single: tuple[Tensor, ...]
    final: Tensor


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Everything of a denoising loop that does not depend on the noisy latents."""

    clean_tokens: Tensor
    """(B, L_clean, D) embedded history and control frames."""
    layout: AttentionLayout
    """Which of all tokens are valid where texts are of unequal length, and what attends them."""
    steps: tuple[StepInputs, ...]


class FramePackTransformer(nn.Module):
    """Predicts the flow velocity of target frames among clean frames. See the module's docstring."""

    def __init__(self, config: FramePackConfig) -> None:
        super().__init__()
        self.config = config
        self.x_embedder = nn.Module()
        self.x_embedder.proj = nn.Conv3d(
            config.latent_channels, config.width, kernel_size=(1, PATCH, PATCH), stride=(1, PATCH, PATCH)
        )
        self.clean_x_embedder = CleanEmbedding(config.latent_channels, config.width)
        self.context_embedder = TextRefiner(config)
        self.image_projection = ImageProjection(config.image_width, config.width)
        self.time_text_embed = TimeTextEmbedding(config.pooled_width, config.width, guidance=True)
        self.transformer_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.num_double_blocks))
        self.single_transformer_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.num_single_blocks))
        self.norm_out = Modulation(config.width, 2)
        # The published model projects its result in float32, also when everything before is bfloat16.
        self.proj_out = Float32Linear(config.width, PATCH * PATCH * config.latent_channels)
        self.checkpointing = Checkpointing()
        """What is computed again when gradients are taken; nothing unless a trainer asks for it."""
        self.attention = AttentionOptions()
        self.swapping = Swapping()
        """Which weights lie in RAM; none unless `modules.block_swap.attach` puts some there."""

    @property
    def num_blocks(self) -> int:
        return len(self.transformer_blocks) + len(self.single_transformer_blocks)

    @property
    def block_lists(self) -> tuple[nn.ModuleList, nn.ModuleList]:
        return self.transformer_blocks, self.single_transformer_blocks

    @property
    def prepare_layers(self) -> list[nn.Module]:
        """The large layers that only `prepare` calls, in its order."""
        text, (doubles, singles) = self.context_embedder, self.block_lists
        return [
            *(text.time_text_embed, text.proj_in, *text.token_refiner.refiner_blocks),
            *(self.image_projection, self.time_text_embed),
            *(block.norm1 for block in doubles),
            *(block.norm1_context for block in doubles),
            *(block.norm for block in singles),
            self.norm_out,
        ]

    @property
    def dtype(self) -> torch.dtype:
        return self.x_embedder.proj.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.x_embedder.proj.weight.device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FramePackTransformer:
        """What `to`, `cpu` and `cuda` come down to: swapped weights stay in RAM, wherever the model goes."""
        with self.swapping.staying():
            return super()._apply(fn, recurse)

    def forward(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """latents (B, C, T, H, W), timesteps (B,) on the 0..1000 scale → velocity (B, C, T, H, W), float32."""
        return self.step(latents, self.prepare(conditioning, timesteps[None]), 0)

    def prepare(
        self, conditioning: Conditioning, timesteps: Tensor, *, rope_scaling: RopeScaling | None = None
    ) -> Prepared:
        """Computes all that the noisy latents do not change, for `timesteps` (S, B), S = 1 in training."""
        context = conditioning.context.to(self.device, self.dtype)
        text, image, pooled = (
            x.to(self.device, self.dtype) for x in (conditioning.text, conditioning.image, conditioning.pooled)
        )
        timesteps, guidance = timesteps.to(self.device), conditioning.guidance.to(self.device)
        lengths = conditioning.text_mask.to(self.device).sum(dim=1)
        text = text[:, : int(lengths.max())]

        clean_tokens = self._embed_clean(context)
        refined = self.context_embedder(text, lengths, timesteps)
        image_tokens = self.image_projection(image).expand(len(timesteps), -1, -1, -1)
        text_tokens = torch.cat([image_tokens, refined], dim=2)

        image_length = clean_tokens.shape[1] + context.num_target_tokens
        num_text = text_tokens.shape[2]
        ropes = self._ropes(context, timesteps, num_text, rope_scaling)
        embedding = self.time_text_embed(timesteps, pooled, guidance)
        return Prepared(
            clean_tokens=clean_tokens,
            layout=self.attention.layout(lengths + image_length + image.shape[1], image_length + num_text),
            steps=tuple(
                StepInputs(*step) for step in zip(text_tokens, ropes, *self._modulations(embedding), strict=True)
            ),
        )

    def step(self, latents: Tensor, prepared: Prepared, index: int) -> Tensor:
        """latents (B, C, T, H, W) at step `index` → velocity of the same shape, float32."""
        inputs, layout = prepared.steps[index], prepared.layout
        target = embed_patches(latents.to(self.device, self.dtype), self.x_embedder.proj)
        image, text = torch.cat([prepared.clean_tokens, target], dim=1), inputs.text
        image_length, image_rope = image.shape[1], inputs.rope.first(image.shape[1])

        doubles = zip(self._visit(self.transformer_blocks, 0), inputs.double_image, inputs.double_text, strict=True)
        for block, image_mod, text_mod in doubles:
            image, text = block(image, text, image_mod, text_mod, image_rope, layout)
        joined = torch.cat([image, text], dim=1)
        singles = self._visit(self.single_transformer_blocks, len(self.transformer_blocks))
        for block, modulation in zip(singles, inputs.single, strict=True):
            joined = block(joined, modulation, inputs.rope, layout)

        scale, shift = inputs.final.chunk(2, dim=-1)
        tokens = modulate(joined[:, image_length - target.shape[1] : image_length], scale, shift)
        patches = self.proj_out(tokens)
        _, channels, frames, height, width = latents.shape
        grid = {"t": frames, "h": height // PATCH, "w": width // PATCH, "c": channels, "p": PATCH, "q": PATCH}
        return rearrange(patches, "b (t h w) (c p q) -> b c t (h p) (w q)", **grid)

    def _visit(self, blocks: nn.ModuleList, start: int) -> Iterator[Callable[..., Any]]:
        """The one place where a block becomes the current one. `start`: the first one's number in the model."""
        for number, block in enumerate(blocks, start):
            yield self.checkpointing.of(block, number, self.swapping.berth(number))

    def _embed_clean(self, context: PackedContext) -> Tensor:
        """(B, L_clean, D): coarse to fine, absent groups left out."""
        embedder = self.clean_x_embedder
        convs = (embedder.proj_4x, embedder.proj_2x, embedder.proj)
        groups = (context.clean_4x, context.clean_2x, context.clean)
        tokens = [embed_patches(g.latents, conv) for g, conv in zip(groups, convs, strict=True) if g is not None]
        return torch.cat(tokens, dim=1)

    def _ropes(
        self, context: PackedContext, timesteps: Tensor, num_text: int, scaling: RopeScaling | None
    ) -> list[Rope]:
        """One table per step; steps of equal scale share theirs."""
        # Reading the timesteps would wait for the device; without scaling nobody needs them.
        scales = [scaling.at(t) for t in timesteps[:, 0].tolist()] if scaling else [1.0] * len(timesteps)
        tables = {scale: self._rope(context, num_text, scale) for scale in set(scales)}
        return [tables[scale] for scale in scales]

    def _rope(self, context: PackedContext, num_text: int, scale: float) -> Rope:
        """Angles for the whole sequence, in token order."""
        frames_and_pools = [(g.indices, pool) for g, pool in context.coarse_to_fine()] + [(context.indices, 1)]
        config, (height, width) = self.config, context.token_grid
        ropes = [
            group_rope(frames, height, width, axes=config.rope_axes, theta=config.rope_theta, scale=scale, pool=pool)
            for frames, pool in frames_and_pools
        ]
        text = unrotated(len(context.indices), num_text, config.head_dim // 2, context.indices.device)
        return concatenate([*ropes, text])

    def _modulations(self, embedding: Tensor) -> tuple[list, ...]:
        """What every block makes of `embedding` (S, B, D): per step one tuple over the blocks."""
        doubles, singles = self.transformer_blocks, self.single_transformer_blocks
        return (
            list(zip(*(block.norm1(embedding) for block in doubles), strict=True)),
            list(zip(*(block.norm1_context(embedding) for block in doubles), strict=True)),
            list(zip(*(block.norm(embedding) for block in singles), strict=True)),
            list(self.norm_out(embedding)),
        )
