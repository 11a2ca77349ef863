"""Rotary position embedding on the three axes frame, row and column.

The frame axis is where one-frame inference happens: a token's frame position is the index that the user gave to its
picture, so `target_index=5` rotates the target's tokens to frame 5 and leaves everything else where it is.

Shapes: B batch, F frames of one group, L tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from modules.rope import Rope, axis_angles, spread


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
    return Rope(*(spread(*(table[part] for table in tables)) for part in (0, 1)))


def concatenate(ropes: list[Rope]) -> Rope:
    """Puts groups of tokens one behind the other."""
    return Rope(torch.cat([r.cos for r in ropes], dim=1), torch.cat([r.sin for r in ropes], dim=1))


def unrotated(batch: int, length: int, pairs: int, device: torch.device) -> Rope:
    """Angle zero, for text tokens that stand behind the image tokens."""
    shape = (batch, length, 1, pairs)
    return Rope(torch.ones(shape, device=device), torch.zeros(shape, device=device))


def _axis(positions: Tensor, channels: int, theta: float, pool: int) -> tuple[Tensor, Tensor]:
    """cos and sin (B, ceil(n / pool), channels / 2) of the angles at `positions` (B, n)."""
    angles = axis_angles(positions, channels, theta)
    return _pool(angles.cos(), pool), _pool(angles.sin(), pool)


def _pool(table: Tensor, pool: int) -> Tensor:
    """Means over runs of `pool` entries along dim 1, the last entry repeated to fill the last run."""
    missing = -table.shape[1] % pool
    padded = torch.cat([table, table[:, -1:].expand(-1, missing, -1)], dim=1) if missing else table
    return padded.unflatten(1, (-1, pool)).mean(dim=2) if pool > 1 else padded
