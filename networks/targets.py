"""Which layers of a transformer a network is added to, told by the published names of its modules.

Names and not classes: the same rules hold for any implementation whose attributes match the published checkpoints.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from networks.arguments import FLAG, NetworkArguments, Patterns
from options.errors import UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Targets:
    """One model family's blocks. Every linear layer and convolution inside them is a candidate."""

    family: str
    blocks: str
    """Regular expression for the dotted path of a block."""
    exclude: str
    """Regular expression for the candidates that are left out unless an include pattern matches."""
    network_module: str
    """The `--network_module` that adds plain LoRA to this family."""


FRAMEPACK = Targets(
    family="FramePack",
    blocks=r"(single_)?transformer_blocks\.\d+",
    exclude=r".*norm.*",
    network_module="networks.lora_framepack",
)
WAN = Targets(
    family="Wan",
    blocks=r"blocks\.\d+",
    exclude=r".*(patch_embedding|text_embedding|time_embedding|time_projection|norm|head).*",
    network_module="networks.lora_wan",
)
HUNYUAN_VIDEO = Targets(
    family="HunyuanVideo",
    blocks=r"(double|single)_blocks\.\d+",
    exclude=r".*(img_mod|txt_mod|modulation).*",
    network_module="networks.lora",
)
FAMILIES = (FRAMEPACK, WAN, HUNYUAN_VIDEO)


def adaptable_layers(transformer: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer and convolution by its dotted path, in the order of the model.

    A module that `torch.compile` has wrapped keeps the path that it had before.
    """
    return {
        path.replace("_orig_mod.", ""): module
        for path, module in transformer.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d)
    }


def is_large_convolution(layer: nn.Module) -> bool:
    """Whether it is a convolution that looks at more than one place."""
    return not isinstance(layer, nn.Linear) and any(size != 1 for size in layer.kernel_size)


def linear_only(layer: nn.Module, path: str, kind: str) -> nn.Linear:
    """Raises UserError for a convolution, which `kind` has no form for."""
    if isinstance(layer, nn.Linear):
        return layer
    got, expected = f"{path}, a convolution, for {kind}", "linear layers"
    raise UserError(FLAG, got, expected, f"exclude it with exclude_patterns=['{path}'], or use LoRA")


def family_of(transformer: nn.Module, families: Sequence[Targets] = FAMILIES) -> Targets | None:
    """The first family whose blocks `transformer` has."""
    paths = list(adaptable_layers(transformer))
    return next((f for f in families if any(re.fullmatch(rf"{f.blocks}\..+", path) for path in paths)), None)


def choose_layers(
    transformer: nn.Module, families: Sequence[Targets], arguments: NetworkArguments, *, network_module: str
) -> dict[str, nn.Module]:
    """The layers to adapt, by dotted path: candidates that no exclude pattern or that an include pattern matches.

    Patterns must match the whole path. Include patterns alone restrict nothing: they rescue what is excluded.

    Args:
        families: those that `network_module` is for; the first that the transformer belongs to gives the rules.

    Raises:
        UserError: the transformer belongs to none of them, or nothing is left.
    """
    targets = family_of(transformer, families)
    if targets is None:
        raise _wrong_family(transformer, families, network_module)
    candidates = {
        path: layer
        for path, layer in adaptable_layers(transformer).items()
        if re.fullmatch(rf"{targets.blocks}\..+", path)
        and (arguments.conv_dim is not None or not is_large_convolution(layer))
    }
    default = (re.compile(targets.exclude),)
    excluded = {path for path in candidates if _matches(path, default + arguments.exclude_patterns)}
    rescued = {path for path in excluded if _matches(path, arguments.include_patterns)}
    chosen = {path: layer for path, layer in candidates.items() if path not in excluded - rescued}
    if not chosen:
        got, expected = f"patterns that exclude all {len(candidates)} layers", f"layers of {targets.family} to train"
        raise UserError(FLAG, got, expected, f"patterns match whole paths such as {next(iter(candidates))}: widen them")
    _warn_about_idle_patterns(list(candidates), excluded, arguments)
    return chosen


def _matches(path: str, patterns: Patterns) -> bool:
    return any(pattern.fullmatch(path) for pattern in patterns)


def _wrong_family(transformer: nn.Module, families: Sequence[Targets], network_module: str) -> UserError:
    found = family_of(transformer)
    got = f"a {found.family} transformer" if found else f"a {type(transformer).__name__} without known blocks"
    fitting = [found] if found else [family for family in FAMILIES if family not in families]
    remedy = f"use {' or '.join(family.network_module for family in fitting)}"
    expected = f"a {' or '.join(family.family for family in families)} transformer"
    return UserError(f"--network_module {network_module}", got, expected, remedy)


def _warn_about_idle_patterns(candidates: list[str], excluded: set[str], arguments: NetworkArguments) -> None:
    """A pattern without effect is a typing error, or a belief that include patterns restrict."""
    for pattern in arguments.exclude_patterns:
        if not any(map(pattern.fullmatch, candidates)):
            logger.warning("exclude_patterns: %r matches no layer; patterns match whole paths", pattern.pattern)
    for pattern in arguments.include_patterns:
        if not any(map(pattern.fullmatch, candidates)):
            logger.warning("include_patterns: %r matches no layer; patterns match whole paths", pattern.pattern)
        elif not any(map(pattern.fullmatch, excluded)):
            logger.warning(
                "include_patterns: %r changes nothing, as what it matches is not excluded; to train these layers "
                "only, add exclude_patterns=['.*']",
                pattern.pattern,
            )
