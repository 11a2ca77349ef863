"""LoRA for FramePack: `--network_module networks.lora_framepack`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from networks.arguments import NetworkArguments
from networks.creation import build_network
from networks.lora import LoraLayer
from networks.network import Network
from networks.targets import FRAMEPACK


def create_network(
    transformer: nn.Module,
    *,
    dim: int | None = None,
    alpha: float | None = None,
    neuron_dropout: float | None = None,
    args: Mapping[str, str],
    seed: int = 0,
) -> Network:
    """LoRA on the double and single blocks: 440 layers at full size, the norms' excluded.

    Raises:
        UserError: an argument that cannot be, or another family's transformer.
    """
    arguments = NetworkArguments.parse("LoRA", dim=dim, alpha=alpha, neuron_dropout=neuron_dropout, args=args)
    return build_network(transformer, LoraLayer, arguments, (FRAMEPACK,), network_module=__name__, seed=seed)
