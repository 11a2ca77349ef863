"""Layers that the video transformers share. None has a name of its own in a checkpoint.

Shapes: B batch, C channels, T H W latent frames, rows and columns, L tokens, D width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

NORM_EPS = 1e-6
MAX_ROWS = 8192


class Shift(NamedTuple):
    """How a timestep modulates one sub-layer: x·(1 + scale) + shift going in, times gate coming out. (B, 1, D) each."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


def modulate(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=NORM_EPS) * (1 + scale) + shift


def sinusoid(positions: Tensor, channels: int) -> Tensor:
    """(...,) → (..., channels): cosines, then sines, of geometric frequencies down to 1 / 10000. In float32."""
    half = channels // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, device=positions.device, dtype=torch.float32) / half)
    angles = positions.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32, whatever the type of its weights and its input."""

    def forward(self, x: Tensor) -> Tensor:
        # A few rows at a time: a large weight would need twice its own memory once more.
        parts = zip(self.weight.split(MAX_ROWS), self.bias.split(MAX_ROWS), strict=True)
        return torch.cat([F.linear(x.float(), weight.float(), bias.float()) for weight, bias in parts], dim=-1)


def embed_patches(latents: Tensor, conv: nn.Conv3d) -> Tensor:
    """(B, C, T, H, W) → (B, L, D), the end of each axis repeated up to a multiple of the kernel."""
    time, height, width = (-size % kernel for size, kernel in zip(latents.shape[2:], conv.kernel_size, strict=True))
    if time or height or width:
        latents = F.pad(latents, (0, width, 0, height, 0, time), mode="replicate")
    return rearrange(conv(latents), "b d t h w -> b (t h w) d")
