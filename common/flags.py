"""Flag dataclasses ↔ command lines, and the frame that every script runs in.

A script's options are nested, frozen, keyword-only dataclasses; their fields become flags of the same names. After
`parse` nobody sees an argparse namespace.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from options.errors import UserError, did_you_mean, one_line

Flags = TypeVar("Flags")
TYPE_NAMES = {int: "an integer", float: "a number", str: "a text"}
METAVARS = {int: "N", float: "X", str: "TEXT"}
NOT_YET = "not available yet in this version"


def run_script(
    flags_class: type[Flags], run: Callable[[Flags], int | None], *, description: str, argv: Sequence[str] | None
) -> int:
    """Parses, configures logging, runs, and turns a `UserError` into one line on stderr.

    Returns:
        The exit code: what `run` returns, 2 for a `UserError`, 130 for Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr)
    for chatty in ("httpx", "libav", "bitsandbytes"):
        logging.getLogger(chatty).setLevel(logging.ERROR)
    for library in ("TRANSFORMERS", "DIFFUSERS"):  # they set their levels from these when they are imported
        os.environ.setdefault(f"{library}_VERBOSITY", "error")
    try:
        return run(parse(flags_class, description=description, argv=argv)) or 0
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130


def parse(flags_class: type[Flags], *, description: str, argv: Sequence[str] | None = None) -> Flags:
    """Builds `flags_class` from a command line (`sys.argv` when None).

    Raises:
        UserError: an unknown flag, a malformed value, a missing required flag, or one that is not available yet.
    """
    parser = _Parser(
        usage="%(prog)s [options]", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # Values such as "-1:last.png;;;0:first.png" begin with a minus and a digit; no option does.
    parser._negative_number_matcher = re.compile(r"-\.?\d")
    for title, group_class in _groups(flags_class):
        group = parser.add_argument_group(title)
        for name, field, annotation in _own_fields(group_class):
            _add(group, name, field, annotation)
    parser.usage += "".join(f" {name} [{name} ...]" for name in parser.positionals)
    values = vars(parser.parse(sys.argv[1:] if argv is None else argv))
    return _build(flags_class, values)


class _Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are `UserError`s."""

    @property
    def positionals(self) -> list[str]:
        return [action.dest for action in self._get_positional_actions()]

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        parse = self.parse_known_intermixed_args if self.positionals else self.parse_known_args
        namespace, unknown = parse(argv)
        if unknown:
            known = [name for name in self._option_string_actions if name.startswith("--")]
            name = unknown[0].partition("=")[0]
            expected = "a known option" if name.startswith("-") else "an option in front of it"
            raise UserError(name, unknown[0], expected, did_you_mean(name, known, "see --help"))
        return namespace

    def error(self, message: str) -> NoReturn:
        if required := re.fullmatch(r"the following arguments are required: (.*)", message):
            raise UserError(required[1], "nothing", "a value", f"give {required[1]}")
        if about := re.fullmatch(r"argument ([^:]+): (.*)", message, re.DOTALL):
            name, complaint = about[1].split("/")[0], about[2]
            if complaint.startswith("expected "):
                expected = complaint.removeprefix("expected ")
                raise UserError(name, "another number of values", expected, "see --help")
            raise UserError(name, complaint, "a valid value", "see --help")
        raise UserError("command line", one_line(message), "options as in --help", "see --help")


def _groups(flags_class: type) -> Iterator[tuple[str, type]]:
    """(title, dataclass) for the class itself and for the dataclasses nested in it."""
    yield "options", flags_class
    for field, annotation in _fields(flags_class):
        if is_dataclass(annotation):
            yield field.name.replace("_", " "), annotation


def _fields(flags_class: type) -> list[tuple[Field, Any]]:
    hints = get_type_hints(flags_class)
    return [(field, hints[field.name]) for field in fields(flags_class)]


def _own_fields(flags_class: type) -> Iterator[tuple[str, Field, Any]]:
    for field, annotation in _fields(flags_class):
        if not is_dataclass(annotation):
            yield field.name if field.metadata.get("positional") else f"--{field.name}", field, annotation


def _add(group: argparse._ArgumentGroup, name: str, field: Field, annotation: Any) -> None:
    """Adds one flag. Absent flags keep the dataclass's default, so argparse needs none of its own."""
    alias = field.metadata.get("alias")
    names = [name, f"--{alias}"] if alias else [name]
    shown = "" if field.default in (MISSING, None, False, ()) else f" (default: {_shown(field.default)})"
    common = {"dest": field.name, "help": f"{field.metadata['help']}{shown}".replace("%", "%%")}
    common |= {"default": argparse.SUPPRESS, "required": field.default is MISSING}
    value_type = _without_none(annotation)
    if value_type is bool:
        group.add_argument(*names, action=_not_yet_switch(name, field), nargs=0, **common)
        return
    nargs = None
    if get_origin(value_type) is tuple:
        parts = get_args(value_type)
        nargs = "*" if parts[-1] is Ellipsis else len(parts)
        value_type = parts[0]
    choices = get_args(value_type) if get_origin(value_type) is Literal else None
    metavar = "{" + ",".join(choices) + "}" if choices else METAVARS[value_type]
    convert = _converter(name, field, value_type, choices)
    action = "extend" if field.metadata.get("repeats") else "store"
    if field.metadata.get("positional"):  # argparse has its own ways to say these two
        del common["dest"], common["required"]
        nargs, metavar = "*" if field.default is not MISSING else "+", None
    group.add_argument(*names, action=action, type=convert, nargs=nargs, metavar=metavar, **common)


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _without_none(annotation: Any) -> Any:
    """`X | None` → `X`."""
    if get_origin(annotation) in (Union, types.UnionType):
        return next(part for part in get_args(annotation) if part is not type(None))
    return annotation


def _not_yet_switch(name: str, field: Field) -> type[argparse.Action]:
    """The action of a flag without a value."""

    class Switch(argparse.Action):
        def __call__(self, parser, namespace, values, option_string=None) -> None:
            if field.metadata.get("later"):
                raise UserError(name, name, "this option to be left out", NOT_YET)
            setattr(namespace, self.dest, True)

    return Switch


def _converter(name: str, field: Field, value_type: type, choices: tuple | None) -> Callable[[str], Any]:
    def convert(text: str) -> Any:
        if field.metadata.get("later"):
            raise UserError(name, text, "this option to be left out", NOT_YET)
        if choices:
            if text not in choices:
                raise UserError(name, text, f"one of {', '.join(choices)}", did_you_mean(text, choices, "see --help"))
            if text in field.metadata.get("not_yet", ()):
                available = [choice for choice in choices if choice not in field.metadata["not_yet"]]
                raise UserError(name, text, f"one of {', '.join(available)}", f"{text} is {NOT_YET}")
            return text
        try:
            return value_type(text)
        except ValueError:
            raise UserError(name, text, TYPE_NAMES[value_type], "see --help") from None

    return convert


def _build(flags_class: type[Flags], values: dict[str, Any]) -> Flags:
    """The dataclass, nested ones included, from the flat values of the command line."""
    arguments = {}
    for field, annotation in _fields(flags_class):
        if is_dataclass(annotation):
            arguments[field.name] = _build(annotation, values)
        elif field.name in values:
            value = values[field.name]
            arguments[field.name] = tuple(value) if isinstance(value, list) else value
    return flags_class(**arguments)
