"""How many blocks of a transformer are kept in RAM, as users write it: `20`, or `auto`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

AUTO = "auto"
PINNED = "keep them in page-locked RAM: faster than through buffers, but no other program can use that RAM"
"""What `--use_pinned_memory_for_block_swap` does."""


@dataclass(frozen=True, kw_only=True)
class SwapCount:
    """So many blocks, or as many as the memory of the device asks for."""

    value: int | None = 0
    """None: that is to be found out."""

    expected: ClassVar[str] = "a number of blocks from 0, or auto"
    """The rule, for messages."""

    @classmethod
    def parse(cls, text: str) -> SwapCount:
        """Raises ValueError: it is neither."""
        if text.strip().lower() == AUTO:
            return cls(value=None)
        value = int(text)
        if value < 0:
            raise ValueError(text)
        return cls(value=value)

    @property
    def is_auto(self) -> bool:
        return self.value is None

    def __bool__(self) -> bool:
        """Whether anything may be swapped."""
        return self.value != 0

    def __str__(self) -> str:
        return AUTO if self.is_auto else str(self.value)
