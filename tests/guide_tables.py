"""The tables of docs/performance.md."""

from __future__ import annotations

import re
from pathlib import Path

GUIDE = (Path(__file__).parent.parent / "docs" / "performance.md").read_text(encoding="utf-8")


def rows(first_header: str, second_header: str) -> list[list[str]]:
    """Of the table with these headers."""
    head = re.escape(f"| {first_header} | {second_header} |")
    (table,) = re.findall(rf"^{head}.*\n\|-.*\n((?:\|.*\n)+)", GUIDE, re.MULTILINE)
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
