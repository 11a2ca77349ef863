"""Names of an architecture's modules: its own, and what other tools and relatives call the same thing.

A name is *dotted* (`transformer_blocks.0.attn.to_out.0`, a path in the model), *flat* (dots as underscores, as in LoRA
files), or *native* (flat behind `lora_unet_`). Dots cannot be guessed back from underscores, so tables hold them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

NATIVE_PREFIX = "lora_unet_"


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
    to_diffusers: Renaming = Renaming({})
    """From a module's dotted name to that in diffusers' model, which may be the same."""
    from_diffusers: Renaming = Renaming({})

    def find(self, flat: str) -> tuple[str, ...]:
        """Dotted names of the module or modules that `flat` means; empty when it is not known."""
        for pattern, modules in self._patterns:
            if found := pattern.fullmatch(flat):
                return tuple(module.format(*found.groups()) for module in modules)
        return ()

    @cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], tuple[str, ...]]]:
        names = {module: (module,) for module in self.modules} | dict(self.aliases)
        return [(re.compile(flat_name(name).replace("{}", r"(\d+)")), modules) for name, modules in names.items()]


def flat_name(dotted: str) -> str:
    return dotted.replace(".", "_")


def native_name(dotted: str) -> str:
    return NATIVE_PREFIX + flat_name(dotted)


def expand(prefix: str, *leaves: str) -> Iterator[str]:
    """`prefix.leaf` for every leaf."""
    return (f"{prefix}.{leaf}" for leaf in leaves)
