"""Rotary position embedding on the three axes frame, row and column.

The frame axis is where one-frame inference happens: a token's frame position is the index that the user gave to its
picture, so `target_index=5` rotates the target's tokens to frame 5 and leaves everything else where it is.

Shapes: B batch, F frames of one group, h w token rows and columns, L tokens, N heads, P = head_dim / 2 rotated pairs.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Rope(NamedTuple):
    """cos and sin of every token's rotation angles, float32, (B, L, 1, P)."""

    cos: Tensor
    sin: Tensor

    def first(self, length: int) -> "Rope":
        return Rope(self.cos[:, :length], self.sin[:, :length])


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Squeezes rows and columns together while the timestep is high, for pictures larger than the model was trained on.

    Source: the `--rope_scaling_*` options; positions on both axes are multiplied by `factor`, frames are untouched.
    """

    factor: float
    timestep_threshold: float
    """On the 0..1000 scale; steps at or above it are scaled."""

    def at(self, timestep: float) -> float:
        return self.factor if timestep >= self.timestep_threshold else 1.0


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Rotates adjacent channel pairs of x (B, L, N, head_dim) in float32 and returns x's type."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    rotated = torch.stack((even * rope.cos - odd * rope.sin, odd * rope.cos + even * rope.sin), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def group_rope(
    frames: Tensor, height: int, width: int, *, axes: tuple[int, int, int], theta: float, scale: float, pool: int
) -> Rope:
    """Angles of one group of frames that are `pool` times coarser than the target in time, rows and columns.

    A coarse token's cos and sin are the means over the fine positions that it covers, the volume being padded at its
    end by repetition. As each channel depends on one axis only, the mean over a cube is a mean along that axis.

    Args:
        frames: (B, F) frame indices of the fine grid.
        height, width: token rows and columns of the target grid.
        axes: head channels for frame, row and column.
        scale: multiplies row and column positions (see `RopeScaling`).
    """
    device = frames.device
    rows = torch.arange(height, device=device, dtype=torch.float32)[None] * scale
    columns = torch.arange(width, device=device, dtype=torch.float32)[None] * scale
    positions = (frames.float(), rows, columns)
    tables = [_axis(p, channels, theta, pool) for p, channels in zip(positions, axes, strict=True)]
    return Rope(*(_spread(*(table[part] for table in tables)) for part in (0, 1)))


def concatenate(ropes: list[Rope]) -> Rope:
    """Puts groups of tokens one behind the other."""
    return Rope(torch.cat([r.cos for r in ropes], dim=1), torch.cat([r.sin for r in ropes], dim=1))


def unrotated(batch: int, length: int, pairs: int, device: torch.device) -> Rope:
    """Angle zero, for text tokens that stand behind the image tokens."""
    shape = (batch, length, 1, pairs)
    return Rope(torch.ones(shape, device=device), torch.zeros(shape, device=device))


def _axis(positions: Tensor, channels: int, theta: float, pool: int) -> tuple[Tensor, Tensor]:
    """cos and sin (B, ceil(n / pool), channels / 2) of the angles at `positions` (B, n)."""
    frequencies = theta ** -(torch.arange(0, channels, 2, device=positions.device, dtype=torch.float32) / channels)
    angles = positions[..., None] * frequencies
    return _pool(angles.cos(), pool), _pool(angles.sin(), pool)


def _pool(table: Tensor, pool: int) -> Tensor:
    """Means over runs of `pool` entries along dim 1, the last entry repeated to fill the last run."""
    missing = -table.shape[1] % pool
    padded = torch.cat([table, table[:, -1:].expand(-1, missing, -1)], dim=1) if missing else table
    return padded.unflatten(1, (-1, pool)).mean(dim=2) if pool > 1 else padded


def _spread(frames: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Combines the three axis tables into one entry per token, in (frame, row, column) order: (B, L, 1, P)."""
    batch, count = max(len(frames), 1), (frames.shape[1], rows.shape[1], columns.shape[1])
    parts = (frames[:, :, None, None], rows[:, None, :, None], columns[:, None, None, :])
    table = torch.cat([part.expand(batch, *count, part.shape[-1]) for part in parts], dim=-1)
    return table.flatten(1, 3)[:, :, None]
