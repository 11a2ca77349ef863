"""Rotary position embedding on the axes frame, row and column: what all video transformers share.

Shapes: B batch, L tokens, N heads, P = head_dim / 2 rotated pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Rope(NamedTuple):
    """cos and sin of every token's rotation angles, float32, (B, L, 1, P)."""

    cos: Tensor
    sin: Tensor

    def first(self, length: int) -> Rope:
        return Rope(self.cos[:, :length], self.sin[:, :length])


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Rotates adjacent channel pairs of x (B, L, N, head_dim) in float32 and returns x's type."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * rope.cos - odd * rope.sin, odd * rope.cos + even * rope.sin), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def axis_angles(positions: Tensor, channels: int, theta: float) -> Tensor:
    """(..., channels / 2) rotation angles at `positions` (...), in their floating-point type."""
    steps = torch.arange(0, channels, 2, device=positions.device, dtype=positions.dtype)
    return positions[..., None] * theta ** -(steps / channels)


def spread(frames: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Combines the three axes' tables into one entry per token, in (frame, row, column) order: (B, L, 1, P).

    Args:
        frames: (B, F, channels / 2); `rows` and `columns` likewise, with B = 1 where they are the same for all.
    """
    batch, count = max(len(frames), 1), (frames.shape[1], rows.shape[1], columns.shape[1])
    parts = (frames[:, :, None, None], rows[:, None, :, None], columns[:, None, None, :])
    table = torch.cat([part.expand(batch, *count, part.shape[-1]) for part in parts], dim=-1)
    return table.flatten(1, 3)[:, :, None]
