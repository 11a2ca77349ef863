"""What every act of the demo gets, and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from demo.encoders import ModelPaths
from demo.toy.trials import Call


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Where an act takes place."""

    models: ModelPaths
    """Those of the toy world."""
    folder: Path
    """For everything that the act makes."""
    call: Call


@dataclass(frozen=True, kw_only=True)
class Played:
    """What came of an act."""

    sheets: Mapping[str, Image.Image]
    """By the names that the documents' pictures have."""
    made: tuple[Path, ...]
    """Files, and folders of files."""
