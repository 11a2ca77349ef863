"""Pictures with their control images as a user would list them, one JSON line each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from demo.toy.trials import saved


@dataclass(frozen=True, kw_only=True)
class Row:
    """One item of a data set."""

    name: str
    """Of its files."""
    caption: str
    controls: tuple[np.ndarray, ...]
    """(H, W, 3) uint8 each."""
    target: np.ndarray
    """(H, W, 3) uint8: what is to come out."""


def write_rows(rows: Sequence[Row], folder: Path) -> Path:
    """Writes the pictures and the list of them into `folder` (made if need be), and returns the list's file."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in rows:
        target = saved(row.target, pictures / f"{row.name}.png")
        controls = [saved(c, pictures / f"{row.name}_control_{i}.png") for i, c in enumerate(row.controls)]
        paths = {f"control_path_{i}": str(path) for i, path in enumerate(controls)}
        lines.append(json.dumps({"image_path": str(target), "caption": row.caption, **paths}, ensure_ascii=False))
    jsonl = folder / "pictures.jsonl"
    jsonl.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return jsonl
