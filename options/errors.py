"""The one kind of error that a user sees: one line that names the place, the value, the rule and the remedy."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Something that the user wrote or gave cannot work. Scripts print it as one line on stderr and exit with code 2.

    Args:
        where: the flag, file or line that the value came from.
        got: the value, or what was found there.
        expected: the rule.
        remedy: what to do about it.
    """

    def __init__(self, where: str, got: object, expected: str, remedy: str) -> None:
        super().__init__(one_line(f"{where}: got {got}; expected {expected}; {remedy}"))


def one_line(text: str) -> str:
    """`text` with every run of white space, line breaks too, as one space."""
    return " ".join(text.split())


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like `name`, or None when nothing comes close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """The remedy for an unknown name: the nearest known one, else `otherwise`."""
    match = nearest(name, known)
    return f"did you mean {match}?" if match else otherwise
