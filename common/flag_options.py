"""What the fields of flag dataclasses say: names, types, choices and numbers of values, for everything that reads them.

An annotation is `bool`, `str`, `int`, `float`, a `Literal` of texts, or a class whose `parse` reads a text or raises
ValueError, whose `expected` is the rule, and whose `str` is such a text again. `| None` may follow. A tuple of one of
these takes several values.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from options.errors import UserError, did_you_mean

TYPE_NAMES = {int: "an integer", float: "a number", str: "a text"}
METAVARS = {int: "N", float: "X", str: "TEXT"}
NOT_YET = "not available yet in this version"


@dataclass(frozen=True, kw_only=True)
class Option:
    """One flag."""

    name: str
    """Without dashes."""
    group: str
    """The field that holds its dataclass; `options` for the outermost class."""
    kind: type
    """The type of one value."""
    choices: tuple[str, ...]
    """The texts that it may be; empty for any."""
    num_values: int | Literal["*"] | None
    """None: exactly one, which stands by itself; else the number of values of a tuple."""
    default: Any
    """`dataclasses.MISSING` for an option that must be given."""
    metadata: Mapping[str, Any]
    """See `options.flag_fields.flag`."""

    @classmethod
    def of(cls, field: Field, annotation: Any, group: str) -> Option:
        kind, num_values, choices = _without_none(annotation), None, ()
        if get_origin(kind) is tuple:
            parts = get_args(kind)
            num_values = "*" if parts[-1] is Ellipsis else len(parts)
            kind = parts[0]
        if get_origin(kind) is Literal:
            kind, choices = str, get_args(kind)
        shape = {"kind": kind, "choices": choices, "num_values": num_values}
        return cls(name=field.name, group=group, default=field.default, metadata=field.metadata, **shape)

    @property
    def names(self) -> list[str]:
        """Its name and, if it has one, its alias."""
        alias = self.metadata.get("alias")
        return [self.name, alias] if alias else [self.name]

    @property
    def flag(self) -> str:
        """As it stands on a command line; a positional one has no dashes."""
        return self.name if self.is_positional else f"--{self.name}"

    @property
    def is_positional(self) -> bool:
        return bool(self.metadata.get("positional"))

    @property
    def is_refused(self) -> bool:
        return "refusal" in self.metadata

    @property
    def is_required(self) -> bool:
        return self.default is MISSING

    @property
    def metavar(self) -> str:
        return "{" + ",".join(self.choices) + "}" if self.choices else METAVARS.get(self.kind, "VALUE")

    @property
    def expected(self) -> str:
        """What a value must be, for messages."""
        return TYPE_NAMES.get(self.kind) or self.kind.expected

    @property
    def help(self) -> str:
        """The line of `--help`."""
        shown = "" if self.default in (MISSING, None, False, ()) else f" (default: {_shown(self.default)})"
        return f"{self.metadata['help']}{shown}"

    def refuse(self, where: str, got: object) -> UserError:
        """The answer to an option that is known, and not there."""
        return UserError(where, got, "this option to be left out", self.metadata["refusal"])

    def convert(self, text: str, where: str) -> Any:
        """One value.

        Args:
            where: the place that the text stands in, for messages.

        Raises:
            UserError: the text is none, or it is not available yet.
        """
        if self.is_refused:
            raise self.refuse(where, text)
        if self.choices:
            return self._choose(text, where)
        try:
            return getattr(self.kind, "parse", self.kind)(text)
        except ValueError:
            raise UserError(where, text, self.expected, "see --help") from None

    def _choose(self, text: str, where: str) -> str:
        if text not in self.choices:
            remedy = did_you_mean(text, self.choices, "see --help")
            raise UserError(where, text, f"one of {', '.join(self.choices)}", remedy)
        not_yet = self.metadata.get("not_yet", ())
        if text in not_yet:
            available = [choice for choice in self.choices if choice not in not_yet]
            raise UserError(where, text, f"one of {', '.join(available)}", f"{text} is {NOT_YET}")
        return text


def options_of(flags_class: type, group: str = "options") -> list[Option]:
    """The options of a dataclass and, after its own, of the dataclasses nested in it."""
    own, nested = [], []
    for field, annotation in fields_of(flags_class):
        if is_group(annotation):
            nested += options_of(annotation, field.name)
        else:
            own.append(Option.of(field, annotation, group))
    return own + nested


def values_of(flags: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of every option."""
    for field, annotation in fields_of(type(flags)):
        value = getattr(flags, field.name)
        if is_group(annotation):
            yield from values_of(value)
        else:
            yield field.name, value


def fields_of(flags_class: type) -> list[tuple[Field, Any]]:
    """The fields with their resolved annotations."""
    hints = get_type_hints(flags_class)
    return [(field, hints[field.name]) for field in fields(flags_class)]


def is_group(annotation: Any) -> bool:
    """Whether a field holds a dataclass of options; the value of an option may be a dataclass, too."""
    return is_dataclass(annotation) and not hasattr(annotation, "parse")


def _without_none(annotation: Any) -> Any:
    """`X | None` → `X`."""
    if get_origin(annotation) in (Union, types.UnionType):
        return next(part for part in get_args(annotation) if part is not type(None))
    return annotation


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
