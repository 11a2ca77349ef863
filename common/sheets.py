"""Contact sheets: pictures in a grid, each with its label above it, to be looked at side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache

from PIL import Image, ImageDraw, ImageFont

from common.media import eight_bit

BACKGROUND, INK = (250, 250, 250), (20, 20, 20)
CHECKS = (255, 255, 255), (204, 204, 204)
CHECK_SIZE = 8
MARGIN, LABEL_GAP = 10, 4
LABEL_SIZE, TITLE_SIZE = 14, 20
MAX_LABEL_LINES = 3
MAX_ASPECT = 1.75
"""A picture is at most this many times as high as its cell is wide; beyond, it is scaled down."""

SYSTEM_FONTS = (
    "DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "NotoSansCJKjp-Regular.otf", "NotoSans-Regular.ttf", "ipag.ttf",
    "YuGothM.ttc", "meiryo.ttc", "msgothic.ttc", "malgun.ttf", "msyh.ttc", "seguisym.ttf", "arial.ttf",
    "ヒラギノ角ゴシック W3.ttc", "Hiragino Sans GB.ttc", "AppleSDGothicNeo.ttc", "Arial Unicode.ttf",
)  # fmt: skip
"""Fonts of Linux, Windows and macOS that cover what Pillow's own (Latin) does not, Japanese above all."""

Font = ImageFont.FreeTypeFont


def contact_sheet(
    cells: Sequence[tuple[str, Image.Image]], *, columns: int, cell_width: int = 256, title: str | None = None
) -> Image.Image:
    """Draws (label, picture) cells row by row.

    Pictures of any size and mode keep their aspect; transparency shows a checkerboard. A label stands above its
    picture, broken into at most three lines and then cut off with "...".

    Args:
        columns: cells per row; fewer cells make a narrower sheet.
        cell_width: in pixels.

    Raises:
        ValueError: no cells, or no columns.
    """
    if not cells or columns < 1 or cell_width < 1:
        raise ValueError(f"a sheet needs cells and columns, got {len(cells)} cells, {columns} columns of {cell_width}")
    columns = min(columns, len(cells))
    written = "".join([title or "", *(label for label, _ in cells)])
    label_font, title_font = font_for(written, LABEL_SIZE), font_for(written, TITLE_SIZE)
    rows = [_Row(cells[start : start + columns], cell_width, label_font) for start in range(0, len(cells), columns)]
    width = MARGIN + columns * (cell_width + MARGIN)
    heading = _Text(title, title_font, width - 2 * MARGIN) if title else None
    top = MARGIN + (heading.height + MARGIN if heading else 0)
    sheet = Image.new("RGB", (width, top + sum(row.height + MARGIN for row in rows)), BACKGROUND)
    if heading:
        heading.draw(sheet, MARGIN, MARGIN)
    for row in rows:
        row.draw(sheet, top)
        top += row.height + MARGIN
    return sheet


def tiled(rows: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Rows of sheets of any size; neighbours share their margin."""
    width = max(sum(sheet.width - MARGIN for sheet in row) for row in rows) + MARGIN
    whole = Image.new("RGB", (width, sum(max(sheet.height for sheet in row) for row in rows)), BACKGROUND)
    top = 0
    for row in rows:
        left = 0
        for sheet in row:
            whole.paste(sheet, (left, top))
            left += sheet.width - MARGIN
        top += max(sheet.height for sheet in row)
    return whole


class _Row:
    """One row of cells: labels end on one line, pictures begin on the next."""

    def __init__(self, cells: Sequence[tuple[str, Image.Image]], cell_width: int, font: Font) -> None:
        self.cell_width = cell_width
        self.labels = [_Text(label, font, cell_width, MAX_LABEL_LINES) for label, _ in cells]
        self.pictures = [_scaled(picture, cell_width) for _, picture in cells]
        self.label_height = max(label.height for label in self.labels)
        self.height = self.label_height + LABEL_GAP + max(picture.height for picture in self.pictures)

    def draw(self, sheet: Image.Image, top: int) -> None:
        for column, (label, picture) in enumerate(zip(self.labels, self.pictures, strict=True)):
            left = MARGIN + column * (self.cell_width + MARGIN)
            label.draw(sheet, left, top + self.label_height - label.height)
            sheet.paste(picture, (left, top + self.label_height + LABEL_GAP))


class _Text:
    """A text broken into lines that fit `width` pixels."""

    def __init__(self, text: str, font: Font, width: int, max_lines: int | None = None) -> None:
        self.font = font
        self.lines = _shortened(list(_lines(text, self.font, width)), max_lines, self.font, width)
        ascent, descent = self.font.getmetrics()
        self.line_height = ascent + descent
        self.height = self.line_height * len(self.lines)

    def draw(self, sheet: Image.Image, left: int, top: int) -> None:
        pen = ImageDraw.Draw(sheet)
        for number, line in enumerate(self.lines):
            pen.text((left, top + number * self.line_height), line, fill=INK, font=self.font)


def _lines(text: str, font: Font, width: int) -> Iterator[str]:
    """Breaks at the last space that fits, or within a word (a path, Japanese) where there is none."""
    for paragraph in text.splitlines():
        rest = paragraph.replace("\t", " ").strip()
        while rest:
            fitting = _fitting(rest, lambda part: part, font, width)
            space = rest.rfind(" ", 0, fitting + 1)
            end = space if fitting < len(rest) and space > 0 else fitting
            yield rest[:end].rstrip()
            rest = rest[end:].lstrip()


def _shortened(lines: list[str], max_lines: int | None, font: Font, width: int) -> list[str]:
    if max_lines is None or len(lines) <= max_lines:
        return lines
    last = lines[max_lines - 1]
    kept = last[: _fitting(last, lambda part: part + "...", font, width)]
    return [*lines[: max_lines - 1], kept + "..."]


def _fitting(text: str, written: Callable[[str], str], font: Font, width: int) -> int:
    """How many characters of `text` fit in `width` pixels when `written` is what is drawn of them; at least one."""
    count = 1
    while count < len(text) and font.getlength(written(text[: count + 1])) <= width:
        count += 1
    return count


def font_for(text: str, size: int) -> Font:
    """Pillow's own font if it covers `text`, else the font here that covers most of it."""
    characters = {character for character in text if not character.isspace()}
    best, most = None, -1
    for font in _fonts(size):
        covered = sum(_covers(font, character) for character in characters)
        if covered > most:
            best, most = font, covered
        if covered == len(characters):
            break
    return best


def _fonts(size: int) -> Iterator[Font]:
    yield _built_in(size)
    for name in SYSTEM_FONTS:
        if font := _system_font(name, size):
            yield font


@cache
def _built_in(size: int) -> Font:
    return ImageFont.load_default(size)


@cache
def _system_font(name: str, size: int) -> Font | None:
    """A font that Pillow finds by name in the system's folders."""
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


@cache
def _covers(font: Font, character: str) -> bool:
    """Whether the font draws something else than its box for unknown characters (U+FFFF is never a character)."""
    return bytes(font.getmask(character)) != bytes(font.getmask("\uffff"))


def _scaled(picture: Image.Image, cell_width: int) -> Image.Image:
    """RGB, as large as fits in a cell."""
    scale = min(cell_width / picture.width, cell_width * MAX_ASPECT / picture.height)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    rgba = eight_bit(picture).convert("RGBA").resize(size, Image.Resampling.LANCZOS)
    return Image.alpha_composite(_checkerboard(size), rgba).convert("RGB")


def _checkerboard(size: tuple[int, int]) -> Image.Image:
    board = Image.new("RGBA", size, CHECKS[0])
    pen = ImageDraw.Draw(board)
    for top in range(0, size[1], CHECK_SIZE):
        for left in range(top % (2 * CHECK_SIZE), size[0], 2 * CHECK_SIZE):
            pen.rectangle((left, top, left + CHECK_SIZE - 1, top + CHECK_SIZE - 1), fill=CHECKS[1])
    return board
