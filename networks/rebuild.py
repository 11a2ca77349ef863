"""Rebuilds a network from the tensors of a native file: kinds, ranks and alphas are what the tensors say."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping

from torch import Tensor, nn

from networks.deltas import KIND_OF_PART, FactorError, Factors
from networks.loha import LohaLayer
from networks.lokr import LokrLayer
from networks.lora import LoraLayer
from networks.module_names import native_name
from networks.network import Network
from networks.targets import adaptable_layers
from options.errors import UserError

logger = logging.getLogger(__name__)

KINDS = {"lora": LoraLayer, "loha": LohaLayer, "lokr": LokrLayer}
SHOWN = 5


def network_from_tensors(transformer: nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> Network:
    """A network for those layers of `transformer` that the file knows, not applied yet; no dropout, in eval mode.

    Any linear layer or convolution may have one, whatever a new network would leave out.

    Args:
        tensors: under native names; other formats are converted before.
        where: the flag and the file, for messages.

    Raises:
        UserError: no layer is known, or tensors are missing, unexpected or do not fit; the first offender is named.
    """
    layers = {native_name(path): (path, layer) for path, layer in adaptable_layers(transformer).items()}
    grouped: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for key, tensor in tensors.items():
        name, _, part = key.partition(".")
        grouped[name][part] = tensor
    unknown = [name for name in grouped if name not in layers]
    if len(unknown) == len(grouped):
        got = f"{len(grouped)} modules, {next(iter(grouped), 'none')} first, none of which the transformer has"
        raise UserError(where, got, f"names such as {next(iter(layers))}", "the file is another model's or format's")
    if unknown:
        shown = ", ".join(unknown[:SHOWN]) + (", …" if len(unknown) > SHOWN else "")
        logger.warning("%s: %d of %d modules are not the transformer's: %s", where, len(unknown), len(grouped), shown)
    adapters = {}
    for name, parts in grouped.items():
        if name in layers:
            path, layer = layers[name]
            factors = _factors(name, parts, where)
            adapters[path] = KINDS[factors.kind].for_factors(layer, path, factors, where)
    network = Network(adapters).eval()
    network.load_tensors({k: t for k, t in tensors.items() if k.partition(".")[0] in network.paths}, where=where)
    return network


def _factors(name: str, parts: Mapping[str, Tensor], where: str) -> Factors:
    tensors = {part: tensor for part, tensor in parts.items() if part != "alpha"}
    if not tensors:
        raise UserError(where, f"{name}.alpha alone", "the tensors that it belongs to", "the file is damaged")
    if strange := [part for part in tensors if part not in KIND_OF_PART]:
        raise UserError(where, f"{name}.{strange[0]}", "LoRA, LoHa or LoKr tensors", "this form cannot be trained on")
    try:
        return Factors(tensors=tensors, alpha=parts.get("alpha"))
    except FactorError as error:
        remedy = "the file is damaged or another model's"
        raise UserError(where, f"{name}.{error.part}: {error.got}", error.expected, remedy) from error
