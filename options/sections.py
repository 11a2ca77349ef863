"""The section syntax of FramePack's `--prompt` and `--image_path`: `0:first;;;-1:last;;;1-2:between`."""

import re
from collections.abc import Mapping
from typing import TypeVar

from options.errors import UserError

SEPARATOR = ";;;"
SPEC = re.compile(r"(?P<first>-?[0-9]{1,6})(?:-(?P<last>[0-9]{1,6}))?")
Value = TypeVar("Value")


def parse_sections(text: str, where: str) -> dict[int, str]:
    """Text by section index; negative indices count from the last section, and section 0 is always there.

    Without `;;;` the whole text is section 0. A piece whose part before the first colon is not an index is a text for
    section 0 (`a dog: running`, `C:/picture.png`). When nothing names section 0, it takes the first section's text.

    Raises:
        UserError: a section given twice, a range that runs backwards or mixes both ways of counting.
    """
    if SEPARATOR not in text:
        return {0: text}
    sections: dict[int, str] = {}
    for piece in text.split(SEPARATOR):
        if not piece.strip():
            raise UserError(where, f"an empty piece in {text}", "a text between two ;;;", "remove a ;;;")
        indices, value = _piece(piece, where)
        for index in indices:
            if index in sections:
                raise UserError(where, f"section {index} twice", "each section once", f"drop one: {piece.strip()}")
            sections[index] = value
    if 0 not in sections:
        sections[0] = sections[min((i for i in sections if i > 0), default=min(sections))]
    return sections


def _piece(piece: str, where: str) -> tuple[range, str]:
    spec, colon, value = piece.partition(":")
    match = SPEC.fullmatch(spec.strip()) if colon else None
    if not match:
        return range(0, 1), piece.strip()
    first = int(match["first"])
    last = first if match["last"] is None else int(match["last"])
    if last < first or first < 0 <= last:
        expected = "first-last, both counted from the start"
        raise UserError(where, f"section range {spec.strip()}", expected, "write 0-2, or list them with ;;;")
    return range(first, last + 1), value.strip()


def check_sections(sections: Mapping[int, object], num_sections: int, where: str) -> None:
    """Raises UserError for a section that the video does not have."""
    for index in sections:
        if not -num_sections <= index < num_sections:
            expected = f"sections {-num_sections} to {num_sections - 1} ({num_sections} in all)"
            remedy = "change the index, --video_sections or --video_seconds"
            raise UserError(where, f"section {index}", expected, remedy)


def lookup(sections: Mapping[int, Value], index: int, num_sections: int) -> Value:
    """What counts for section `index` (≥ 0): its entry counted from the end, else from the start, else section 0's."""
    return next(sections[key] for key in (index - num_sections, index, 0) if key in sections)
