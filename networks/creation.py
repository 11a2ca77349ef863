"""Builds new networks from what a user asks for."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import nn

from networks.adapter import Adapter, generator_for
from networks.arguments import NetworkArguments
from networks.module_names import native_name
from networks.network import Network
from networks.targets import Targets, choose_layers

logger = logging.getLogger(__name__)


def build_network(
    transformer: nn.Module,
    kind: type[Adapter],
    arguments: NetworkArguments,
    families: Sequence[Targets],
    *,
    network_module: str,
    seed: int,
) -> Network:
    """A new network for `transformer`, which may be on the meta device; its output is zero until it is trained.

    Args:
        families: see `choose_layers`.
        seed: the same one gives the same values to a layer of the same path and shape, in any network.

    Raises:
        UserError: no layer to adapt, or one that `kind` cannot adapt.
    """
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
