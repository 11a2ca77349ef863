"""Rebuilds a network from tensors: kinds, ranks and alphas are what the tensors say."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from networks.deltas import ALPHA, DOWN, KIND_OF_PART, UP, FactorError, Factors, as_tensors
from networks.loha import LohaLayer
from networks.lokr import LokrLayer
from networks.lora import LoraLayer
from networks.lora_formats import LoraFile
from networks.lora_matching import Matched, expect_factors, match
from networks.module_names import native_name
from networks.network import Network
from networks.targets import adaptable_layers
from options.errors import UserError

logger = logging.getLogger(__name__)

KINDS = {"lora": LoraLayer, "loha": LohaLayer, "lokr": LokrLayer}
SHOWN = 5
REMEDY = "merge the file into the model with --lora_weight"


def network_for(transformer: nn.Module, lora: LoraFile) -> Network:
    """A network that does what a file of any format says, not applied yet; no dropout, in eval mode.

    What `transformer` does not have is left out; `match` has reported it when the file was checked.

    Raises:
        UserError: as `match` and `check_can_be_applied`.
    """
    layers = {f"{path}.weight": (path, layer) for path, layer in adaptable_layers(transformer).items()}
    shapes = {weight: _weight_shape(layer) for weight, (_, layer) in layers.items()}
    matched = match(lora, shapes)
    check_can_be_applied(matched, shapes)
    modules = {
        native_name(layers[weight][0]): _in_shape(factors, shapes[weight])
        for weight, factors in matched.factors.items()
    }
    return network_from_tensors(transformer, as_tensors(modules), where=lora.where)


def check_can_be_applied(matched: Matched, shapes: Mapping[str, Sequence[int]]) -> None:
    """Makes sure that every module can be laid over its layer; some can only be added to its weight.

    Args:
        shapes: of the weights, as `match` was given them.

    Raises:
        UserError: rows of a LoKr, LoHa or LoKr for a convolution, or whole differences.
    """
    lora = matched.lora
    expect_factors(lora, REMEDY)
    for weight, factors in matched.factors.items():
        if obstacle := _obstacle(factors, weight, shapes[weight]):
            key = next(lora.key_of(name) for name, candidate in lora.modules.items() if candidate is factors)
            raise UserError(lora.where, f"{key}, {obstacle}", "modules that can be laid over a layer", REMEDY)


def _obstacle(factors: Factors, weight: str, shape: Sequence[int]) -> str | None:
    if factors.rows:
        return f"a LoKr of a fused layer whose rows for {weight} have no factors of their own"
    if factors.kind != "lora" and len(shape) > 2:
        return f"a {KINDS[factors.kind].kind} for {weight}, a convolution"
    return None


def _weight_shape(layer: nn.Module) -> tuple[int, ...]:
    """From its sizes where it has them: the weight itself may be packed."""
    return (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else tuple(layer.weight.shape)


def _in_shape(factors: Factors, shape: Sequence[int]) -> Factors:
    """A LoRA's factors as a layer of this weight has them: with a kernel, or without one of size 1."""
    if factors.kind != "lora":
        return factors
    down, up = factors.tensors[DOWN], factors.tensors[UP]
    tensors = {DOWN: down.reshape(-1, *shape[1:]), UP: up.reshape(*up.shape[:2], *[1] * (len(shape) - 2))}
    return replace(factors, tensors=tensors)


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
    modules = {name: _factors(name, parts, where) for name, parts in grouped.items() if name in layers}
    adapters = {}
    for name, factors in modules.items():
        path, layer = layers[name]
        adapters[path] = KINDS[factors.kind].for_factors(layer, path, factors, where)
    network = Network(adapters).eval()
    network.load_tensors(as_tensors(modules), where=where)
    return network


def _factors(name: str, parts: Mapping[str, Tensor], where: str) -> Factors:
    tensors = {part: tensor for part, tensor in parts.items() if part != ALPHA}
    if not tensors:
        raise UserError(where, f"{name}.alpha alone", "the tensors that it belongs to", "the file is damaged")
    if strange := [part for part in tensors if KIND_OF_PART.get(part) not in KINDS]:
        raise UserError(where, f"{name}.{strange[0]}", "LoRA, LoHa or LoKr tensors", "this form cannot be trained on")
    try:
        # The layers have the first factor of a LoKr as one matrix.
        return Factors(tensors=tensors, alpha=parts.get(ALPHA)).with_whole_first()
    except FactorError as error:
        remedy = "the file is damaged or another model's"
        raise UserError(where, f"{name}.{error.part}: {error.got}", error.expected, remedy) from error
