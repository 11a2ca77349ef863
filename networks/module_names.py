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
