"""Builds new networks from what a user asks for."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from torch import nn

from networks.adapter import Adapter, generator_for
from networks.arguments import NetworkArguments
from networks.module_names import native_name
from networks.network import Network
from networks.targets import Targets, choose_layers

logger = logging.getLogger(__name__)


def build_network(
    transformer: nn.Module,
    *,
    kind: type[Adapter],
    families: Sequence[Targets],
    network_module: str,
    dim: int | None = None,
    alpha: float | None = None,
    neuron_dropout: float | None = None,
    args: Mapping[str, str],
    seed: int = 0,
) -> Network:
    """A new network for `transformer`, which may be on the meta device; its output is zero until it is trained.

    Args:
        families: see `choose_layers`.
        dim, alpha, neuron_dropout, args: see `NetworkArguments.parse`.
        seed: the same one gives the same values to a layer of the same path and shape, in any network.

    Raises:
        UserError: an argument that cannot be, another family's transformer, or a layer that `kind` cannot adapt.
    """
    arguments = NetworkArguments.parse(kind.kind, dim=dim, alpha=alpha, neuron_dropout=neuron_dropout, args=args)
    layers = choose_layers(transformer, families, arguments, network_module=network_module)
    adapters = {path: kind.for_layer(layer, path, arguments) for path, layer in layers.items()}
    for path, adapter in adapters.items():
        adapter.initialise(generator_for(seed, native_name(path)))
        if arguments.verbose:
            logger.info("%s on %s", kind.kind, path)
    if arguments.dropout.neuron and kind.kind != "LoRA":
        logger.warning("--network_dropout has no effect on %s: use rank_dropout in --network_args", kind.kind)
    network = Network(adapters, loraplus_lr_ratio=arguments.loraplus_lr_ratio)
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    scales = " and ".join(f"{scale:g}" for scale in sorted({adapter.scale for adapter in adapters.values()}))
    logger.info(
        "%s: %d layers, %s parameters, rank %d, alpha %g; scale alpha/rank: %s",
        *(kind.kind, len(adapters), f"{num_parameters:,}", arguments.dim, arguments.alpha, scales),
    )
    return network
