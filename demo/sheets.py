"""The demo's sheets: pictures of the toy world side by side, enlarged so that their pixels are seen as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from common.sheets import BACKGROUND, MARGIN, contact_sheet, tiled

TIMES = 2
"""How much larger pictures are shown."""
FRAME = 128
NUM_COLOURS = 256
"""In the pictures of the documents, so that they stay small."""

Row = Sequence[tuple[str, np.ndarray]]
"""Labels, and pictures (H, W, 3) or masks (H, W), uint8."""


def enlarged(picture: np.ndarray, times: int = TIMES) -> Image.Image:
    """Without smoothing; a mask gets a frame, because its white is that of the sheet."""
    height, width = picture.shape[:2]
    large = Image.fromarray(picture).resize((width * times, height * times), Image.Resampling.NEAREST)
    if picture.ndim == 2:
        ImageDraw.Draw(large).rectangle((0, 0, large.width - 1, large.height - 1), outline=FRAME)
    return large


def row_sheet(row: Row, *, title: str | None = None, times: int = TIMES) -> Image.Image:
    """One row of pictures of one size."""
    cells = [(label, enlarged(picture, times)) for label, picture in row]
    return contact_sheet(cells, columns=len(cells), cell_width=cells[0][1].width, title=title)


def table_sheet(rows: Mapping[str, Sequence[np.ndarray]], *, title: str | None = None) -> Image.Image:
    """Rows of equally many pictures; only the first picture of a row bears its label."""
    cells = [
        (label if number == 0 else "", enlarged(picture))
        for label, pictures in rows.items()
        for number, picture in enumerate(pictures)
    ]
    columns = len(next(iter(rows.values())))
    return contact_sheet(cells, columns=columns, cell_width=cells[0][1].width, title=title)


def opened(*paths: Path) -> Image.Image:
    """Sheets that the scripts drew, one below the other."""
    sheets = []
    for path in paths:
        with Image.open(path) as sheet:
            sheets.append([sheet.convert("RGB")])
    return tiled(sheets)


def in_two_columns(sheets: Sequence[Image.Image]) -> Image.Image:
    """All in one, downwards and then to the right, in columns as equal as their order allows."""
    heights = [sheet.height for sheet in sheets]
    split = min(range(1, len(sheets) + 1), key=lambda number: max(sum(heights[:number]), sum(heights[number:])))
    columns = [tiled([[sheet] for sheet in part]) for part in (sheets[:split], sheets[split:]) if part]
    return tiled([columns])


def heading(title: str, width: int) -> Image.Image:
    """A title alone, as wide as the sheets below it."""
    nothing = Image.new("RGB", (width - 2 * MARGIN, 1), BACKGROUND)
    return contact_sheet([("", nothing)], columns=1, cell_width=nothing.width, title=title)


def save_sheets(made: Mapping[str, Image.Image], folder: Path) -> list[Path]:
    """Writes the pictures of the documents, with few colours."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.png" for name in made]
    for path, sheet in zip(paths, made.values(), strict=True):
        sheet.quantize(NUM_COLOURS).save(path, optimize=True)
    return paths
