"""The one kind of error that a user sees: one line that names the place, the value, the rule and the remedy."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Iterable, Sequence


class UserError(Exception):
    """Something that the user wrote or gave cannot work. Scripts print it as one line on stderr and exit with code 2.

    Args:
        where: the flag, file or line that the value came from.
        got: the value, or what was found there.
        expected: the rule.
        remedy: what to do about it.
    """

    def __init__(self, where: str, got: object, expected: str, remedy: str) -> None:
        self.where = where
        self.complaint = one_line(f"got {got}; expected {expected}; {remedy}")
        super().__init__(f"{one_line(where)}: {self.complaint}")

    @classmethod
    def within(cls, place: str, error: UserError) -> UserError:
        """The same complaint with the line or cell that it is about in front: `prompts.txt line 3, --seed: got …`."""
        return error.reworded(lambda text: text if text.startswith(place) else f"{place}, {text}", lambda text: text)

    def reworded(self, where: Callable[[str], str], complaint: Callable[[str], str]) -> UserError:
        """The same with its place and its complaint in other words."""
        other = UserError.__new__(UserError)
        other.where, other.complaint = where(self.where), complaint(self.complaint)
        Exception.__init__(other, f"{one_line(other.where)}: {other.complaint}")
        return other


class UserErrors(UserError):
    """Several of them at once, one line each: all bad lines of a file, say."""

    def __init__(self, errors: Sequence[UserError | str]) -> None:
        self.errors = errors
        Exception.__init__(self, "\n".join(map(str, errors)))

    def reworded(self, where: Callable[[str], str], complaint: Callable[[str], str]) -> UserErrors:
        return UserErrors([e if isinstance(e, str) else e.reworded(where, complaint) for e in self.errors])


def one_line(text: str) -> str:
    """`text` with every run of white space, line breaks too, as one space."""
    return " ".join(text.split())


def shown(value: object) -> str:
    """A value of a TOML or JSON file about as it stands there, and not longer than a line of a message can be."""
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):  # an integer of thousands of digits, lists in lists without end
        return "a value that is too long to show"
    return text if len(text) <= 80 else f"{text[:77]}..."


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that is most like `name`, or None when nothing comes close."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return matches[0] if matches else None


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """The remedy for an unknown name: the nearest known one, else `otherwise`."""
    match = nearest(name, known)
    return f"did you mean {match}?" if match else otherwise
