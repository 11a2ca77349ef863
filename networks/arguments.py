"""What a user can ask of a network: `--network_dim`, `--network_alpha`, `--network_dropout` and `--network_args`."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from options.errors import UserError, did_you_mean

FLAG = "--network_args"
DEFAULT_DIM, DEFAULT_ALPHA = 4, 1.0
Patterns = tuple[re.Pattern[str], ...]


@dataclass(frozen=True, kw_only=True)
class Dropout:
    """Chances to drop a part of an adapter in a training step; what is kept of the first two grows by 1 / (1 - p)."""

    neuron: float = 0.0
    """One number of the low-rank activations."""
    rank: float = 0.0
    """LoRA: one rank of one sample. LoHa and LoKr: one output of the layer, for all samples."""
    module: float = 0.0
    """One layer's whole adapter."""


@dataclass(frozen=True, kw_only=True)
class NetworkArguments:
    """The shape of a network, resolved: what was not given has its default."""

    dim: int = DEFAULT_DIM
    """The rank for linear layers and 1x1 convolutions."""
    alpha: float = DEFAULT_ALPHA
    """What an adapter computes is multiplied by alpha / rank."""
    conv_dim: int | None = None
    """The rank for larger convolutions; None leaves them alone."""
    conv_alpha: float = DEFAULT_ALPHA
    factor: int = -1
    """LoKr: the size of the first Kronecker factor; -1 splits as evenly as possible."""
    dropout: Dropout = field(default_factory=Dropout)
    exclude_patterns: Patterns = ()
    """Layers whose whole dotted path matches one of these are left out, besides those that are left out by default."""
    include_patterns: Patterns = ()
    """Layers whose whole dotted path matches one of these are taken although they are excluded."""
    loraplus_lr_ratio: float | None = None
    """LoRA+: how much faster the up-projections learn."""
    verbose: bool = False
    """Whether every layer is logged."""

    @classmethod
    def parse(
        cls, kind: str, *, dim: int | None, alpha: float | None, neuron_dropout: float | None, args: Mapping[str, str]
    ) -> NetworkArguments:
        """Reads what the user gave for a network of `kind`: `LoRA`, `LoHa` or `LoKr`.

        Raises:
            UserError: an unknown key, a key of another kind of network, or a value that its key cannot have.
        """
        for key in args:
            _check_key(key, kind)
        values = {key: _read(f"{FLAG} {key}", text, KEYS[key].read) for key, text in args.items()}
        dim = DEFAULT_DIM if dim is None else _read("--network_dim", str(dim), _positive_integer)
        alpha = DEFAULT_ALPHA if alpha is None else _read("--network_alpha", str(alpha), _not_negative)
        neuron = 0.0 if neuron_dropout is None else _read("--network_dropout", str(neuron_dropout), _chance)
        if "conv_alpha" in values and "conv_dim" not in values:
            got = f"conv_alpha={args['conv_alpha']} without conv_dim"
            raise UserError(FLAG, got, "conv_dim beside it", "add conv_dim, or leave conv_alpha out")
        chances = {name: values.pop(f"{name}_dropout", 0.0) for name in ("rank", "module")}
        conv_alpha = values.pop("conv_alpha", DEFAULT_ALPHA) or values.get("conv_dim", DEFAULT_ALPHA)
        dropout = Dropout(neuron=neuron, **chances)
        return cls(dim=dim, alpha=alpha or dim, conv_alpha=conv_alpha, dropout=dropout, **values)


class _Rejected(Exception):
    """A value breaks its key's rule, which is the message."""


@dataclass(frozen=True)
class _Key:
    read: Callable[[str], object]
    kinds: tuple[str, ...] = ("LoRA", "LoHa", "LoKr")


def _number(convert: Callable[[str], float], holds: Callable[[float], bool], rule: str) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            number = convert(text)
        except ValueError:
            raise _Rejected(rule) from None
        if not (math.isfinite(number) and holds(number)):
            raise _Rejected(rule)
        return number

    return read


def _switch(text: str) -> bool:
    if text not in ("True", "False"):
        raise _Rejected("True or False")
    return text == "True"


def _patterns(text: str) -> Patterns:
    rule = "a Python list of regular expressions, as in ['.*attn.*', '.*ff.*']"
    try:
        patterns = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        raise _Rejected(rule) from None
    if not isinstance(patterns, list | tuple) or not all(isinstance(pattern, str) for pattern in patterns):
        raise _Rejected(rule)
    return tuple(map(_compiled, patterns))


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise _Rejected(f"valid regular expressions ({pattern!r}: {error})") from None


_positive_integer = _number(int, lambda number: number > 0, "an integer above 0")
_not_negative = _number(float, lambda number: number >= 0, "a number from 0 (0: the same as the rank)")
_chance = _number(float, lambda number: 0 <= number < 1, "a chance from 0 to less than 1")

KEYS: Mapping[str, _Key] = {
    "conv_dim": _Key(_positive_integer, ("LoRA",)),
    "conv_alpha": _Key(_not_negative, ("LoRA",)),
    "rank_dropout": _Key(_chance),
    "module_dropout": _Key(_chance),
    "verbose": _Key(_switch),
    "exclude_patterns": _Key(_patterns),
    "include_patterns": _Key(_patterns),
    "loraplus_lr_ratio": _Key(_number(float, lambda number: number > 0, "a number above 0")),
    "factor": _Key(_number(int, lambda number: number == -1 or number > 0, "an integer above 0, or -1"), ("LoKr",)),
}


def _check_key(key: str, kind: str) -> None:
    known = [name for name, entry in KEYS.items() if kind in entry.kinds]
    if key in known:
        return
    expected = f"one of {', '.join(known)}"
    if key in KEYS:
        raise UserError(
            FLAG, f"{key} for {kind}", expected, f"{key} is for {', '.join(KEYS[key].kinds)} only: remove it"
        )
    raise UserError(FLAG, key, expected, did_you_mean(key, known, "remove it"))


def _read(where: str, text: str, read: Callable[[str], object]) -> object:
    try:
        return read(text)
    except _Rejected as rule:
        raise UserError(where, text, str(rule), "change it") from None
