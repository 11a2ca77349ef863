"""Rotary position embedding of a clip whose frames have indices of their own.

The frame axis is where one-frame inference happens: a token's frame position is the index that the user gave to its
picture. Angles are computed in float64, as in the published model, and their cos and sin are kept in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from modules.rope import Rope, axis_angles, spread

THETA = 10000.0


class ClipRope:
    """The tokens' angles, computed once the size of a frame is known.

    Args:
        indices: (B, F) frame indices.
        axes: head channels for frame, row and column.
    """

    def __init__(self, indices: Tensor, axes: tuple[int, int, int]) -> None:
        self._indices, self._axes = indices, axes
        self._tables: dict[tuple[int, int], Rope] = {}

    def sample(self, number: int) -> ClipRope:
        """Of one sample of the batch."""
        return ClipRope(self._indices[number : number + 1], self._axes)

    def of(self, height: int, width: int) -> Rope:
        """For so many token rows and columns."""
        size = (height, width)
        if size not in self._tables:
            self._tables = {size: self._table(height, width)}
        return self._tables[size]

    def _table(self, height: int, width: int) -> Rope:
        rows, columns = (torch.arange(size, device=self._indices.device)[None] for size in (height, width))
        positions = zip((self._indices, rows, columns), self._axes, strict=True)
        angles = [axis_angles(places.double(), channels, THETA) for places, channels in positions]
        cos, sin = ([getattr(axis, part)().float() for axis in angles] for part in ("cos", "sin"))
        return Rope(spread(*cos), spread(*sin))
