"""Wan2.1's transformer, for text, pictures, first and last frames, and control videos.

The forward has two faces: `prepare` computes everything that does not depend on the noisy latents, for all steps at
once; `step` does the rest. `forward` is the two in a row. Module attributes match the official checkpoints.

Shapes: B batch, S steps, C latent channels, F latent frames, h w latent size, L tokens, D width.

Sources: Wan Team, "Wan: Open and Advanced Large-Scale Video Generative Models" (2025); diffusers'
`WanTransformer3DModel`, with which this model agrees numerically.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from modules.attention import AttentionLayout, AttentionOptions
from modules.block_swap import Swapping
from modules.checkpointing import Checkpointing
from modules.layers import Float32Linear, embed_patches, sinusoid
from wan.config import WanConfig
from wan.layers import Block, Context, Head, ImageEmbedding, KeysValues
from wan.rope import ClipRope

PATCH = 2  # rows and columns of a token, in latent pixels


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """What the transformer is told besides the noisy latents and the timestep."""

    text: Tensor
    """(B, L, text_width) UMT5 states; rows past a sample's length count as zeros."""
    text_lengths: Tensor
    """(B,) int64."""
    image: Tensor | None = None
    """(B, 257, image_width) CLIP features, twice as many rows for first and last frame; for models that take them."""
    latents: Tensor | None = None
    """(B, C_y, F, h, w) what lies beside the noisy latents: masks, pictures, control videos."""
    indices: Tensor
    """(B, F) int64, each frame's place on the time axis."""


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """Everything of a denoising loop that does not depend on the noisy latents."""

    beside: Tensor | None
    """(B, C_y, F, h, w), see `Conditioning.latents`."""
    rope: ClipRope
    context: Context
    known: tuple[KeysValues | None, ...]
    """What each block has made of the context; None where it does so itself, in every step."""
    time: Tensor
    """(S, B, D) float32."""
    modulations: Tensor
    """(S, B, 6, D) float32; each block adds its own."""

    def sample(self, number: int) -> Prepared:
        """Of one sample of the batch; nothing is copied."""
        here = slice(number, number + 1)

        def own(tensors: tuple[Tensor | None, ...]) -> list[Tensor | None]:
            return [None if tensor is None else tensor[here] for tensor in tensors]

        return Prepared(
            beside=own((self.beside,))[0],
            rope=self.rope.sample(number),
            context=Context(*own(self.context)),
            known=tuple(known and KeysValues(*own(known)) for known in self.known),
            time=self.time[:, here],
            modulations=self.modulations[:, here],
        )


class WanTransformer(nn.Module):
    """Predicts the flow velocity of a clip. See the module's docstring."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.config, width = config, config.width
        kernel = (1, PATCH, PATCH)
        self.patch_embedding = nn.Conv3d(config.in_channels, width, kernel_size=kernel, stride=kernel)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.text_width, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )
        # The published model computes all that timesteps tell in float32, also when the rest is bfloat16.
        self.time_embedding = nn.Sequential(
            Float32Linear(config.time_width, width), nn.SiLU(), Float32Linear(width, width)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), Float32Linear(width, 6 * width))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        self.head = Head(config, PATCH * PATCH)
        if config.image_width is not None:
            self.img_emb = ImageEmbedding(config.image_width, width, config.num_image_positions)
        self.checkpointing = Checkpointing()
        """What is computed again when gradients are taken; nothing unless a trainer asks for it."""
        self.attention = AttentionOptions()
        self.swapping = Swapping()
        """Which weights lie in RAM; none unless `modules.block_swap.attach` puts some there."""

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @property
    def block_lists(self) -> tuple[nn.ModuleList]:
        return (self.blocks,)

    @property
    def prepare_layers(self) -> list[nn.Module]:
        """The large layers that only `prepare` calls, in its order."""
        image = [] if self.config.image_width is None else [self.img_emb]
        own = (layer for block in self.blocks for layer in block.cross_attn.context_layers)
        return [self.time_embedding, self.time_projection, self.text_embedding, *image, *own]

    @property
    def dtype(self) -> torch.dtype:
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.patch_embedding.weight.device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WanTransformer:
        """What `to`, `cpu` and `cuda` come down to: swapped weights stay in RAM, wherever the model goes."""
        with self.swapping.staying():
            return super()._apply(fn, recurse)

    def forward(self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning) -> Tensor:
        """latents (B, C, F, h, w), timesteps (B,) on the 0..1000 scale → velocity (B, C, F, h, w), float32."""
        return self.step(latents, self.prepare(conditioning, timesteps[None]), 0)

    def prepare(self, conditioning: Conditioning, timesteps: Tensor) -> Prepared:
        """Computes all that the noisy latents do not change, for `timesteps` (S, B), S = 1 in training.

        Raises:
            ValueError: CLIP features for a model that takes none, or none for one that does.
        """
        time = self.time_embedding(sinusoid(timesteps.to(self.device), self.config.time_width))
        modulations = self.time_projection(time).unflatten(-1, (6, -1))
        context = Context(text=self._embed_text(conditioning), image=self._embed_image(conditioning.image))
        beside = conditioning.latents
        return Prepared(
            beside=None if beside is None else beside.to(self.device, self.dtype),
            rope=ClipRope(conditioning.indices.to(self.device), self.config.rope_axes),
            context=context,
            known=tuple(self._known(block, number, context) for number, block in enumerate(self.blocks)),
            time=time,
            modulations=modulations,
        )

    def step(
        self, latents: Tensor, prepared: Prepared, index: int, *, skip_blocks: frozenset[int] = frozenset()
    ) -> Tensor:
        """latents (B, C, F, h, w) at step `index` → velocity of the same shape, float32.

        Args:
            skip_blocks: numbers of those that are left out, for skip-layer guidance.
        """
        latents, modulation = latents.to(self.device, self.dtype), prepared.modulations[index]
        beside = [] if prepared.beside is None else [prepared.beside]
        # As blocks give it on to one another: a view would be compiled for on its own.
        x = embed_patches(torch.cat([latents, *beside], dim=1), self.patch_embedding).contiguous()
        batch, _, frames, height, width = latents.shape
        rows, columns = height // PATCH, width // PATCH
        rope, layout = prepared.rope.of(rows, columns), self._layout(batch, x.shape[1])
        for number, block in self._visit(skip_blocks):
            x = block(x, modulation, prepared.known[number] or prepared.context, rope, layout)
        patches = self.head(x, prepared.time[index])
        grid = {"f": frames, "h": rows, "w": columns, "p": PATCH, "q": PATCH}
        return rearrange(patches, "b (f h w) (p q c) -> b c f (h p) (w q)", **grid)

    def _visit(self, skipped: frozenset[int]) -> Iterator[tuple[int, Callable[..., Any]]]:
        """The one place where a block becomes the current one, with its number."""
        for number, block in enumerate(self.blocks):
            if number not in skipped:
                yield number, self.checkpointing.of(block, number, self.swapping.berth(number))

    def _layout(self, batch: int, length: int) -> AttentionLayout:
        """Clips of a batch are of one size, so that all tokens are valid."""
        return self.attention.layout(torch.full((batch,), length), length)

    def _known(self, block: Block, number: int, context: Context) -> KeysValues | None:
        """None in training, where gradients go through it, and for a block that brings the weights for it along."""
        if torch.is_grad_enabled() or self.swapping.brings(number, block.cross_attn.k):
            return None
        return block.cross_attn.keys_values(context)

    def _embed_text(self, conditioning: Conditioning) -> Tensor:
        """(B, text_length, D)."""
        text = conditioning.text[:, : self.config.text_length].to(self.device, self.dtype)
        places = torch.arange(text.shape[1], device=self.device)
        valid = places < conditioning.text_lengths.to(self.device)[:, None]
        text = torch.where(valid[..., None], text, 0)
        return self.text_embedding(F.pad(text, (0, 0, 0, self.config.text_length - text.shape[1])))

    def _embed_image(self, image: Tensor | None) -> Tensor | None:
        if (image is None) != (self.config.image_width is None):
            raise ValueError(f"a model of kind {self.config.kind} got {'no' if image is None else 'unwanted'} features")
        return None if image is None else self.img_emb(image.to(self.device, self.dtype))
