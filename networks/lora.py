"""LoRA: ΔW = alpha / r · up @ down. As `--network_module`, the one for HunyuanVideo itself.

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021.
"""

from __future__ import annotations

from functools import partial
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import skip_init

from networks.adapter import Adapter, alpha_of, fill_kaiming
from networks.arguments import Dropout, NetworkArguments
from networks.creation import build_network
from networks.deltas import Factors
from networks.targets import HUNYUAN_VIDEO, is_large_convolution
from options.errors import UserError


class LoraLayer(Adapter):
    """`lora_down` (r, in), or (r, in, *kernel) for a convolution; `lora_up` (out, r), or (out, r, 1, …)."""

    kind = "LoRA"

    def __init__(self, layer: nn.Module, *, rank: int, alpha: float, dropout: Dropout) -> None:
        super().__init__(rank=rank, alpha=alpha, dropout=dropout)
        if isinstance(layer, nn.Linear):
            self.lora_down = skip_init(nn.Linear, layer.in_features, rank, bias=False)
            self.lora_up = skip_init(nn.Linear, rank, layer.out_features, bias=False)
            return
        conv = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Conv3d
        same = {name: getattr(layer, name) for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode")}
        self.lora_down = skip_init(conv, layer.in_channels, rank, bias=False, **same)
        self.lora_up = skip_init(conv, rank, layer.out_channels, kernel_size=1, bias=False)

    @classmethod
    def for_layer(cls, layer: nn.Module, path: str, arguments: NetworkArguments) -> Self:
        _check_groups(layer, path)
        rank, alpha = arguments.dim, arguments.alpha
        if is_large_convolution(layer):
            rank, alpha = arguments.conv_dim, arguments.conv_alpha
        return cls(layer, rank=rank, alpha=alpha, dropout=arguments.dropout)

    @classmethod
    def for_factors(cls, layer: nn.Module, path: str, factors: Factors, where: str) -> Self:
        _check_groups(layer, path)
        return cls(layer, rank=factors.rank, alpha=alpha_of(factors), dropout=Dropout())

    def initialise(self, generator: torch.Generator) -> None:
        fill_kaiming(self.lora_down.weight, generator)
        nn.init.zeros_(self.lora_up.weight)

    def change(self, x: Tensor, scale: float | Tensor) -> Tensor:
        hidden = self.lora_down(x)
        if self.training and self.dropout.neuron:
            hidden = F.dropout(hidden, self.dropout.neuron)
        places = [1] * (hidden.ndim - 2)
        is_linear = isinstance(self.lora_down, nn.Linear)
        mask_shape = (len(hidden), *places, self.rank) if is_linear else (len(hidden), self.rank, *places)
        return self.lora_up(self.thinned(hidden, *mask_shape) * scale)

    def squared_norm(self) -> Tensor:
        # ‖up @ down‖² = Σ (upᵀup) * (down·downᵀ): two r×r matrices instead of one as large as the layer's weight.
        up, down = self.lora_up.weight.detach().flatten(1), self.lora_down.weight.detach().flatten(1)
        return ((up.T @ up) * (down @ down.T)).sum().clamp(min=0) * self.scale**2

    def shrink(self, factor: Tensor) -> None:
        self.lora_up.weight.data.mul_(factor.sqrt())
        self.lora_down.weight.data.mul_(factor.sqrt())


def _check_groups(layer: nn.Module, path: str) -> None:
    if getattr(layer, "groups", 1) != 1:
        got = f"{path}, a convolution in {layer.groups} groups"
        raise UserError("--network_args", got, "layers that LoRA can be added to", "add an exclude pattern for it")


create_network = partial(build_network, kind=LoraLayer, families=(HUNYUAN_VIDEO,), network_module=__name__)
"""LoRA on HunyuanVideo's blocks in the original layout."""
