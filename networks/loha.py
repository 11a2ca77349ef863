"""LoHa: ΔW = alpha / r · (w1_a @ w1_b) * (w2_a @ w2_b), of rank up to r² with the parameters of two LoRAs.

Source: Hyeon-Woo et al., "FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning", 2021.
"""

from __future__ import annotations

from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from networks.adapter import Adapter, alpha_of, fill_normal
from networks.arguments import Dropout, NetworkArguments
from networks.creation import build_network
from networks.deltas import Factors
from networks.targets import FRAMEPACK, WAN, linear_only


class LohaLayer(Adapter):
    """`hada_w1_a`, `hada_w2_a` (out, r) and `hada_w1_b`, `hada_w2_b` (r, in)."""

    kind = "LoHa"

    def __init__(self, layer: nn.Linear, *, rank: int, alpha: float, dropout: Dropout) -> None:
        super().__init__(rank=rank, alpha=alpha, dropout=dropout)
        self.hada_w1_a = nn.Parameter(torch.empty(layer.out_features, rank))
        self.hada_w1_b = nn.Parameter(torch.empty(rank, layer.in_features))
        self.hada_w2_a = nn.Parameter(torch.empty(layer.out_features, rank))
        self.hada_w2_b = nn.Parameter(torch.empty(rank, layer.in_features))

    @classmethod
    def for_layer(cls, layer: nn.Module, path: str, arguments: NetworkArguments) -> Self:
        layer = linear_only(layer, path, cls.kind)
        return cls(layer, rank=arguments.dim, alpha=arguments.alpha, dropout=arguments.dropout)

    @classmethod
    def for_factors(cls, layer: nn.Module, path: str, factors: Factors, where: str) -> Self:
        layer = linear_only(layer, path, cls.kind)
        return cls(layer, rank=factors.rank, alpha=alpha_of(factors), dropout=Dropout())

    def initialise(self, generator: torch.Generator) -> None:
        fill_normal(self.hada_w1_a, 0.1, generator)
        fill_normal(self.hada_w1_b, 1.0, generator)
        nn.init.zeros_(self.hada_w2_a)
        fill_normal(self.hada_w2_b, 1.0, generator)

    def change(self, x: Tensor, scale: float | Tensor) -> Tensor:
        delta = (self.hada_w1_a * scale @ self.hada_w1_b) * (self.hada_w2_a @ self.hada_w2_b)
        change = F.linear(x, delta)
        return self.thinned(change, change.shape[-1])


create_network = partial(build_network, kind=LohaLayer, families=(FRAMEPACK, WAN), network_module=__name__)
"""LoHa on the same layers as LoRA; the transformer tells whether they are FramePack's or Wan's."""
