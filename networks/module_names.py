"""Names of an architecture's modules: its own, and what other tools and relatives call the same thing.

A name is *dotted* (`transformer_blocks.0.attn.to_out.0`, a path in the model), *flat* (dots as underscores, as in LoRA
files), or *native* (flat behind `lora_unet_`). Dots cannot be guessed back from underscores, so tables hold them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

NATIVE_PREFIX = "lora_unet_"
FLAT_BIAS = "_bias"
Patterns = list[tuple[re.Pattern[str], tuple[str, ...]]]
"""A flat name -> the dotted names that it means."""


class Renaming:
    """From one spelling of dotted names to another.

    Args:
        names: old name -> new name; `{}` in both stands for the number of a block. Others stay as they are.
    """

    def __init__(self, names: Mapping[str, str]) -> None:
        self._rules = [(re.compile(re.escape(old).replace(r"\{\}", r"(\d+)")), new) for old, new in names.items()]

    def __call__(self, dotted: str) -> str:
        found = ((pattern.fullmatch(dotted), new) for pattern, new in self._rules)
        return next((new.format(*match.groups()) for match, new in found if match), dotted)


@dataclass(frozen=True, kw_only=True)
class NameTable:
    """One architecture."""

    architecture: str
    takes: tuple[str, ...]
    """Whose LoRAs it takes, for messages."""
    modules: tuple[str, ...]
    """Dotted names of all modules that have a matrix; `{}` stands for the number of a block."""
    aliases: Mapping[str, tuple[str, ...]]
    """Another spelling -> the module that it means; or the modules that it fuses, in the order of their rows."""
    aliases_of: str
    """Whose spelling that is, for messages: `HunyuanVideo's`."""
    others: Mapping[str, str] = field(default_factory=dict)
    """Norms, and tensors that belong to no layer: another spelling -> dotted name. They take whole differences only."""
    to_diffusers: Renaming = Renaming({})
    """From a module's dotted name to that in diffusers' model, which may be the same."""
    from_diffusers: Renaming = Renaming({})
    """The other way round, and from the names of `others` too."""

    def find(self, flat: str) -> tuple[str, ...]:
        """Dotted names of the module or modules that `flat` means; empty when it is not known."""
        return _found(flat, self._patterns)

    def find_tensor(self, flat: str) -> tuple[str, ...]:
        """The same for whatever a whole difference may be of: a module stands for its weight, a bias for itself."""
        if flat.endswith(FLAT_BIAS):
            return tuple(f"{name}.bias" for name in self.find_tensor(flat.removesuffix(FLAT_BIAS)))
        return self.find(flat) or _found(flat, self._other_patterns)

    @cached_property
    def _patterns(self) -> Patterns:
        return _patterns({module: (module,) for module in self.modules} | dict(self.aliases))

    @cached_property
    def _other_patterns(self) -> Patterns:
        return _patterns({spelling: (ours,) for theirs, ours in self.others.items() for spelling in (ours, theirs)})


def _patterns(names: Mapping[str, tuple[str, ...]]) -> Patterns:
    return [(re.compile(flat_name(name).replace("{}", r"(\d+)")), meant) for name, meant in names.items()]


def _found(flat: str, patterns: Patterns) -> tuple[str, ...]:
    for pattern, names in patterns:
        if found := pattern.fullmatch(flat):
            return tuple(name.format(*found.groups()) for name in names)
    return ()


def flat_name(dotted: str) -> str:
    return dotted.replace(".", "_")


def native_name(dotted: str) -> str:
    return NATIVE_PREFIX + flat_name(dotted)


def expand(prefix: str, *leaves: str) -> Iterator[str]:
    """`prefix.leaf` for every leaf."""
    return (f"{prefix}.{leaf}" for leaf in leaves)
