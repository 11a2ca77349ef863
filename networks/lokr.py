"""LoKr: ΔW = alpha / r · w1 ⊗ w2 with w2 = w2_a @ w2_b, or a whole w2 and scale 1 where that is hardly larger.

Shapes: out = l·k, in = m·n; w1 (l, m), w2 (k, n).

Source: Yeh et al., "Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation", 2023.
"""

from __future__ import annotations

from functools import partial
from typing import Self

import torch
from torch import Tensor, nn

from networks.adapter import Adapter, alpha_of, fill_kaiming
from networks.arguments import Dropout, NetworkArguments
from networks.creation import build_network
from networks.deltas import Factors
from networks.targets import FRAMEPACK, WAN, linear_only
from options.errors import UserError


class LokrLayer(Adapter):
    """`lokr_w1` (l, m), and `lokr_w2` (k, n) or `lokr_w2_a` (k, r) with `lokr_w2_b` (r, n).

    Args:
        first: (l, m).
        second: (k, n).
        rank: of w2; None for a whole one.
        alpha: only written to the file when `rank` is None.
    """

    kind = "LoKr"

    def __init__(
        self, *, first: tuple[int, int], second: tuple[int, int], rank: int | None, alpha: float, dropout: Dropout
    ) -> None:
        super().__init__(rank=rank, alpha=alpha, dropout=dropout)
        self.lokr_w1 = nn.Parameter(torch.empty(first))
        if rank is None:
            self.lokr_w2 = nn.Parameter(torch.empty(second))
        else:
            self.lokr_w2_a = nn.Parameter(torch.empty(second[0], rank))
            self.lokr_w2_b = nn.Parameter(torch.empty(rank, second[1]))

    @classmethod
    def for_layer(cls, layer: nn.Module, path: str, arguments: NetworkArguments) -> Self:
        layer = linear_only(layer, path, cls.kind)
        out_l, out_k = factorization(layer.out_features, arguments.factor)
        in_m, in_n = factorization(layer.in_features, arguments.factor)
        is_whole = arguments.dim >= max(out_k, in_n) / 2
        rank, alpha = (None, arguments.dim) if is_whole else (arguments.dim, arguments.alpha)
        first, second = (out_l, in_m), (out_k, in_n)
        return cls(first=first, second=second, rank=rank, alpha=alpha, dropout=arguments.dropout)

    @classmethod
    def for_factors(cls, layer: nn.Module, path: str, factors: Factors, where: str) -> Self:
        layer = linear_only(layer, path, cls.kind)
        first, sizes = tuple(factors.tensors["lokr_w1"].shape), (layer.out_features, layer.in_features)
        if any(part == 0 or size % part for size, part in zip(sizes, first, strict=True)):
            got, expected = f"lokr_w1 of shape {first} for {path}", f"two numbers that divide {sizes}"
            raise UserError(where, got, expected, "the file is another model's")
        second = (sizes[0] // first[0], sizes[1] // first[1])
        return cls(first=first, second=second, rank=factors.rank, alpha=alpha_of(factors), dropout=Dropout())

    def initialise(self, generator: torch.Generator) -> None:
        fill_kaiming(self.lokr_w1, generator)
        if self.rank is None:
            nn.init.zeros_(self.lokr_w2)
        else:
            fill_kaiming(self.lokr_w2_a, generator)
            nn.init.zeros_(self.lokr_w2_b)

    def change(self, x: Tensor, scale: float | Tensor) -> Tensor:
        # (w1 ⊗ w2)·x without the large matrix: x as (m, n), w2 on its columns, w1 on its rows.
        w1 = self.lokr_w1 * scale
        w2 = self.lokr_w2 if self.rank is None else self.lokr_w2_a @ self.lokr_w2_b
        change = (w1 @ (x.unflatten(-1, (w1.shape[1], w2.shape[1])) @ w2.T)).flatten(-2)
        return self.thinned(change, change.shape[-1])


def factorization(size: int, factor: int) -> tuple[int, int]:
    """Two numbers, the smaller one first, whose product is `size`.

    Args:
        factor: one of them if it divides `size`, else a limit for the smaller one; -1: as near to the root as can be.
    """
    if factor > 0 and size % factor == 0:
        small, large = sorted((factor, size // factor))
        return small, large
    limit = size if factor < 0 else factor
    small, large = 1, size
    while small < large:
        divisor = next(d for d in range(small + 1, size + 1) if size % d == 0)
        if divisor > limit:
            break
        small, large = divisor, size // divisor
    return min(small, large), max(small, large)


create_network = partial(build_network, kind=LokrLayer, families=(FRAMEPACK, WAN), network_module=__name__)
"""LoKr on the same layers as LoRA; the transformer tells whether they are FramePack's or Wan's."""
