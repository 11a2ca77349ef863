"""The parts of Wan's transformer. Attributes match the official checkpoints.

Shapes: B batch, S steps, L tokens, D width, N heads, T text rows, I rows of CLIP features.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.attention import AttentionLayout, attend
from modules.layers import NORM_EPS, Float32Linear, Shift, modulate
from modules.rope import Rope, apply_rope
from wan.config import WanConfig

IMAGE_NORM_EPS = 1e-5


class Context(NamedTuple):
    """What the blocks attend to, embedded."""

    text: Tensor
    """(B, T, D)."""
    image: Tensor | None
    """(B, I, D)."""


class KeysValues(NamedTuple):
    """What one block makes of the context, (B, T or I, N, head_dim) each."""

    text_key: Tensor
    text_value: Tensor
    image_key: Tensor | None
    image_value: Tensor | None


class Float32LayerNorm(nn.LayerNorm):
    """Computes in float32, and gives back its input's type."""

    def forward(self, x: Tensor) -> Tensor:
        normed = F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
        return normed.to(x.dtype)


class ImageEmbedding(nn.Module):
    """CLIP's features to the model's width; of two pictures, each row learns which one it belongs to."""

    def __init__(self, image_width: int, width: int, num_positions: int | None) -> None:
        super().__init__()
        self.proj = nn.Sequential(
            Float32LayerNorm(image_width, eps=IMAGE_NORM_EPS),
            nn.Linear(image_width, image_width),
            nn.GELU(),
            nn.Linear(image_width, width),
            Float32LayerNorm(width, eps=IMAGE_NORM_EPS),
        )
        self.emb_pos = None if num_positions is None else nn.Parameter(torch.zeros(1, num_positions, image_width))

    def forward(self, image: Tensor) -> Tensor:
        """(B, I, image_width) → (B, I, D)."""
        return self.proj(image if self.emb_pos is None else image + self.emb_pos)


class Attention(nn.Module):
    """Queries of the tokens; what they attend to is up to subclasses. Norms see all heads at once."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        width, self.head_dim = config.width, config.head_dim
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = (nn.RMSNorm(width, eps=NORM_EPS) for _ in range(2))

    def heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


class SelfAttention(Attention):
    """Of the tokens among themselves."""

    def forward(self, x: Tensor, rope: Rope, layout: AttentionLayout) -> Tensor:
        query, key = self.heads(self.norm_q(self.q(x))), self.heads(self.norm_k(self.k(x)))
        return self.o(attend(apply_rope(query, rope), apply_rope(key, rope), self.heads(self.v(x)), layout))


class CrossAttention(Attention):
    """Of the tokens to the text and, apart from it, to the picture."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__(config)
        if config.image_width is not None:
            self.k_img, self.v_img = (nn.Linear(config.width, config.width) for _ in range(2))
            self.norm_k_img = nn.RMSNorm(config.width, eps=NORM_EPS)

    @property
    def context_layers(self) -> list[nn.Linear]:
        """Those that see the context only, in the order in which they are called."""
        return [self.k, self.v, *([self.k_img, self.v_img] if hasattr(self, "k_img") else [])]

    def keys_values(self, context: Context) -> KeysValues:
        """The same for every step."""
        text, image = context
        return KeysValues(
            text_key=self.heads(self.norm_k(self.k(text))),
            text_value=self.heads(self.v(text)),
            image_key=None if image is None else self.heads(self.norm_k_img(self.k_img(image))),
            image_value=None if image is None else self.heads(self.v_img(image)),
        )

    def forward(self, x: Tensor, known: KeysValues, layout: AttentionLayout) -> Tensor:
        query = self.heads(self.norm_q(self.q(x)))
        attended = attend(query, known.text_key, known.text_value, layout)
        if known.image_key is not None:
            attended = attended + attend(query, known.image_key, known.image_value, layout)
        return self.o(attended)


class Block(nn.Module):
    """Self-attention, cross-attention and an MLP; the first and the last know the timestep."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 6, config.width) / config.width**0.5)
        self.self_attn = SelfAttention(config)
        self.norm3 = Float32LayerNorm(config.width, eps=NORM_EPS)
        self.cross_attn = CrossAttention(config)
        self.ffn = nn.Sequential(
            nn.Linear(config.width, config.mlp_width),
            nn.GELU(approximate="tanh"),
            nn.Linear(config.mlp_width, config.width),
        )

    def forward(
        self, x: Tensor, time: Tensor, context: Context | KeysValues, rope: Rope, layout: AttentionLayout
    ) -> Tensor:
        """x (B, L, D), time (B, 6, D) float32, the context or what this block has made of it → (B, L, D)."""
        parts = (self.modulation.float() + time).chunk(6, dim=1)
        attn, mlp = Shift(*parts[:3]), Shift(*parts[3:])
        # Tokens stay in the weights' type; what timesteps do to them is computed in float32.
        normed = modulate(x.float(), attn.scale, attn.shift).to(x.dtype)
        x = (x + self.self_attn(normed, rope, layout) * attn.gate).to(x.dtype)
        known = context if isinstance(context, KeysValues) else self.cross_attn.keys_values(context)
        # Everybody sees the whole context, whatever the layout of the tokens is.
        x = x + self.cross_attn(self.norm3(x), known, AttentionLayout(backend=layout.backend))
        normed = modulate(x.float(), mlp.scale, mlp.shift).to(x.dtype)
        return (x + self.ffn(normed) * mlp.gate).to(x.dtype)


class Head(nn.Module):
    """Tokens to patches of velocity, in float32."""

    def __init__(self, config: WanConfig, patch_area: int) -> None:
        super().__init__()
        self.modulation = nn.Parameter(torch.randn(1, 2, config.width) / config.width**0.5)
        self.head = Float32Linear(config.width, patch_area * config.latent_channels)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """x (B, L, D), time (B, D) float32 → (B, L, patch_area · C)."""
        shift, scale = (self.modulation.float() + time[:, None]).chunk(2, dim=1)
        return self.head(modulate(x.float(), scale, shift))
