"""Lists of `key=value`, as `--optimizer_args` and its like take them."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable

from options.errors import UserError

BARE_TEXT = re.compile(r"[A-Za-z_][\w.:/+-]*|[\d.e-]+:[\d.:,e-]+")
"""What may stand without quotes although it is no Python literal: a word, and rules such as 1:10,0.1:20,0.01."""
MISSPELT = {"true": "True", "false": "False", "none": "None", "null": "None"}


def split_pairs(items: Iterable[str], where: str) -> dict[str, str]:
    """The texts by their keys; the first `=` of an item parts them.

    Args:
        where: the flag, for messages.

    Raises:
        UserError: an item without a key or `=`, or a key that comes twice.
    """
    pairs: dict[str, str] = {}
    for item in items:
        key, has_value, value = (part.strip() for part in item.partition("="))
        if not (key and has_value):
            raise UserError(where, item or "an empty text", "key=value", "write key=value without spaces around the =")
        if key in pairs:
            raise UserError(where, f"{key} twice", "each key once", "keep one of them")
        pairs[key] = value
    return pairs


def read_literals(items: Iterable[str], where: str) -> dict[str, object]:
    """The same with values that are Python literals: `betas=0.9,0.99`, `decouple=True`, `mode=linear`.

    Raises:
        UserError: as above, or a value is no literal.
    """
    return {key: _literal(key, text, where) for key, text in split_pairs(items, where).items()}


def _literal(key: str, text: str, where: str) -> object:
    expected = "a Python value: 0.01, True, (0.9, 0.99) or 'text'"
    right = MISSPELT.get(text.lower(), text)
    if right != text:
        raise UserError(where, f"{key}={text}", expected, f"write {key}={right}")
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        if BARE_TEXT.fullmatch(text):
            return text
        raise UserError(where, f"{key}={text}", expected, "change it") from None
