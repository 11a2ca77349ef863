"""The network that is trained: made as the command line says, or like the file that it goes on from."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Mapping
from functools import partial
from importlib.util import find_spec
from types import ModuleType

from torch import nn

from networks.arguments import DEFAULT_DIM, NetworkArguments
from networks.lora_convert import to_native
from networks.lora_formats import read_lora
from networks.network import Network
from networks.rebuild import network_from_tensors
from options.errors import UserError, did_you_mean
from options.flags_train import NetworkFlags
from options.key_values import split_pairs
from options.lora import LoraChoice
from training.classes import attempt

MODULES = ("networks.lora_framepack", "networks.lora_wan", "networks.loha", "networks.lokr")
WEIGHTS_FLAG = "--network_weights"


def network_arguments(flags: NetworkFlags) -> dict[str, str]:
    """`--network_args`; raises UserError when they cannot be read."""
    return split_pairs(flags.network_args, "--network_args")


def open_network(flags: NetworkFlags, transformer: nn.Module, *, seed: int) -> Network:
    """The network, on the CPU in float32, not applied yet.

    Args:
        transformer: may be on the meta device.
        seed: of new weights.

    Raises:
        UserError: an unknown module or argument, or weights that do not fit.
    """
    module = _import(flags.network_module)
    if flags.dim_from_weights:
        if flags.network_weights is None:
            raise UserError("--dim_from_weights", "no file", f"{WEIGHTS_FLAG} beside it", f"add {WEIGHTS_FLAG}")
        return _as_asked(network_from_tensors(transformer, _weights(flags), where=_where(flags)), flags)
    create = partial(
        module.create_network,
        transformer,
        dim=flags.network_dim,
        alpha=flags.network_alpha,
        neuron_dropout=flags.network_dropout,
        args=network_arguments(flags),
        seed=seed,
    )
    network = attempt("--network_module", flags.network_module, create)
    if flags.network_weights is not None:
        network.load_tensors(_weights(flags), where=_where(flags))
    return network


def shape_of(network: Network, flags: NetworkFlags) -> tuple[int, float]:
    """Rank and alpha as files record them; of a network with several, the most frequent."""
    if not flags.dim_from_weights:
        dim = flags.network_dim or DEFAULT_DIM
        return dim, flags.network_alpha or float(dim)
    shapes = Counter((adapter.rank or 0, float(adapter.alpha)) for adapter in network.adapters.values())
    return shapes.most_common(1)[0][0]


def base_choices(flags: NetworkFlags) -> tuple[LoraChoice, ...]:
    """`--base_weights` with their multipliers, 1.0 where none is given.

    Raises:
        UserError: more multipliers than files.
    """
    files, multipliers = flags.base_weights, flags.base_weights_multiplier
    if len(multipliers) > len(files):
        got, expected = f"{len(multipliers)} values for {len(files)} files", "no more values than --base_weights"
        raise UserError("--base_weights_multiplier", got, expected, "add a file or drop a value")
    padded = (*multipliers, *[1.0] * (len(files) - len(multipliers)))
    return tuple(LoraChoice(path=path, multiplier=value) for path, value in zip(files, padded, strict=True))


def _as_asked(network: Network, flags: NetworkFlags) -> Network:
    """A file gives layers, ranks and alphas; how to train them is up to the command line all the same."""
    kind = next(iter(network.adapters.values())).kind
    arguments = NetworkArguments.parse(
        kind, dim=None, alpha=None, neuron_dropout=flags.network_dropout, args=network_arguments(flags)
    )
    network.loraplus_lr_ratio = arguments.loraplus_lr_ratio
    for adapter in network.adapters.values():
        adapter.dropout = arguments.dropout
    return network.train()


def _import(name: str) -> ModuleType:
    try:
        module = importlib.import_module(name)
    except Exception as error:  # what a module does when it is imported is its own affair
        known = [module for module in MODULES if find_spec(module)]
        remedy = f"use one of {', '.join(known)} ({error})"
        remedy = remedy if name in MODULES else did_you_mean(name, known, remedy)
        raise UserError("--network_module", name, "a module that can be imported", remedy) from error
    if not hasattr(module, "create_network"):
        raise UserError(
            "--network_module", name, "a module with create_network", did_you_mean(name, MODULES, "see --help")
        )
    return module


def _weights(flags: NetworkFlags) -> Mapping[str, object]:
    """Any format that can be read, under native names."""
    return to_native(read_lora(flags.network_weights, flag=WEIGHTS_FLAG))[0]


def _where(flags: NetworkFlags) -> str:
    return f"{WEIGHTS_FLAG} {flags.network_weights}"
