"""A size of memory as users write it: `12GB`, `11.5GiB`, or `12`, which is 12GB."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

UNITS = {"mb": 10**6, "mib": 2**20, "gb": 10**9, "gib": 2**30}
ANY = "any"
PLAN = "print what it computes, what memory each stage takes, and with a size (12GB) how it fits; then exit"
"""What `--plan` does."""


@dataclass(frozen=True, kw_only=True)
class MemorySize:
    """So many bytes, or no limit at all."""

    num_bytes: int | None = None
    """None: any size."""
    text: str = ANY
    """As it was written."""

    expected: ClassVar[str] = "a size of memory such as 12GB, 11.5GiB or 12"
    """The rule, for messages."""

    @classmethod
    def parse(cls, text: str) -> MemorySize:
        """Raises ValueError: it is no size."""
        text = text.strip()
        if text.lower() == ANY:
            return cls()
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(mb|mib|gb|gib|)", text.lower())
        num_bytes = round(float(found[1]) * UNITS[found[2] or "gb"]) if found else 0
        if num_bytes < 1:
            raise ValueError(text)
        return cls(num_bytes=num_bytes, text=text if found[2] else f"{text}GB")

    def __str__(self) -> str:
        return self.text
