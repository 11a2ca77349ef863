"""Contact sheets: labels stay off the pictures, and nothing a user names a file crashes them."""

import numpy as np
import pytest
from PIL import Image

from common import sheets
from common.sheets import BACKGROUND, contact_sheet

RED = (200, 0, 0)


def red(width, height):
    return Image.new("RGB", (width, height), RED)


def red_boxes(sheet):
    """Bounding boxes (left, top, right, bottom) of solid red rectangles, left to right, top to bottom."""
    mask = np.all(np.asarray(sheet) == RED, axis=2)
    boxes = []
    while mask.any():
        top, left = np.argwhere(mask)[0]
        right = left + np.argmin(np.append(mask[top, left:], False))
        bottom = top + np.argmin(np.append(mask[top:, left], False))
        assert mask[top:bottom, left:right].all(), "something is drawn over a picture"
        mask[top:bottom, left:right] = False
        boxes.append((left, top, right, bottom))
    return boxes


def test_pictures_keep_their_aspect_and_fill_the_cell():
    sizes = [(400, 200), (50, 50), (100, 1000), (256, 256), (30, 20)]
    sheet = contact_sheet([(f"{w}x{h}", red(w, h)) for w, h in sizes], columns=2, cell_width=120, title="sizes")
    boxes = red_boxes(sheet)
    assert len(boxes) == len(sizes)
    for (width, height), (left, top, right, bottom) in zip(sizes, boxes, strict=True):
        assert right - left <= 120 and bottom - top <= 120 * sheets.MAX_ASPECT
        assert (right - left == 120) or (bottom - top == 120 * sheets.MAX_ASPECT)
        assert (right - left) / (bottom - top) == pytest.approx(width / height, rel=0.03)


@pytest.mark.parametrize(
    "label",
    [
        "a sentence with many words that does not fit in one line at all " * 4,
        "/a/path/without/spaces/" * 8,
        "猫の写真" * 20,
        "gjpqy_ÅÄ|\nsecond line\nthird\nfourth",
        "🐈 عربى \x01 \uffff кошка",
        "",
    ],
)
def test_labels_never_touch_pictures_or_the_next_cell(label):
    cells = [(label, red(64, 40)), ("", red(64, 40)), (label, red(40, 64)), ("short", red(64, 64))]
    sheet = contact_sheet(cells, columns=2, cell_width=100)
    boxes = red_boxes(sheet)
    assert len(boxes) == 4
    left, top, _, _ = boxes[1]
    gap = np.asarray(sheet)[:top, left - sheets.MARGIN + 2 :]
    assert np.all(gap == BACKGROUND), "a label ran into the cell beside it"


def test_long_label_is_cut_after_three_lines():
    tall = contact_sheet([("word " * 200, red(50, 50))], columns=1, cell_width=100)
    three = contact_sheet([("a\nb\nc", red(50, 50))], columns=1, cell_width=100)
    assert tall.height == three.height


def test_text_is_drawn():
    sheet = contact_sheet([("猫 label", red(50, 50))], columns=1, title="タイトル title")
    (_, top, _, _), *_ = red_boxes(sheet)
    above = np.asarray(sheet.convert("L"))[:top]
    assert (above < 100).sum() > 100


def test_long_title_is_wrapped_into_the_sheet():
    one = contact_sheet([("a", red(50, 50))], columns=1, cell_width=120, title="title")
    many = contact_sheet([("a", red(50, 50))], columns=1, cell_width=120, title="title " * 20)
    assert many.width == one.width and many.height > one.height
    assert np.all(np.asarray(many)[:, -5:] == BACKGROUND)


def test_transparency_shows_a_checkerboard():
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    sheet = np.asarray(contact_sheet([("", clear)], columns=1, cell_width=64))
    colours = {tuple(colour) for colour in sheet[-60:-20, 20:60].reshape(-1, 3)}
    assert colours == set(sheets.CHECKS)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_mode_is_drawn(mode):
    grey = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1))
    image = Image.fromarray(grey.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(grey).convert(mode)
    sheet = np.asarray(contact_sheet([("", image)], columns=1, cell_width=64).convert("L")).astype(int)
    picture = sheet[-10 - 64 : -10, 10:74]
    assert picture[:, :8].mean() < 40 and picture[:, -8:].mean() > 210


def test_sheet_without_any_system_font_still_works(monkeypatch):
    monkeypatch.setattr(sheets, "_system_font", lambda name, size: None)
    assert len(red_boxes(contact_sheet([("猫 кошка 🐈", red(50, 50))], columns=1))) == 1


def test_font_that_covers_the_labels_is_taken_when_there_is_one():
    if sheets._system_font("DejaVuSans.ttf", 14) is None:
        pytest.skip("no such font here")
    assert sheets.font_for("Кошка", 14).getname()[0] == "DejaVu Sans"
    assert sheets.font_for("cat", 14) is sheets._built_in(14)


def test_same_cells_give_the_same_sheet():
    cells = [("猫", red(50, 70)), ("b", red(70, 50))]
    assert contact_sheet(cells, columns=2).tobytes() == contact_sheet(cells, columns=2).tobytes()


def test_sheet_needs_cells_and_columns():
    with pytest.raises(ValueError, match="0 cells"):
        contact_sheet([], columns=2)
    with pytest.raises(ValueError, match="0 columns"):
        contact_sheet([("a", red(8, 8))], columns=0)
