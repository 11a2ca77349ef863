"""Flag dataclasses ↔ command lines, and the frame that every script runs in.

A script's options are nested, frozen, keyword-only dataclasses; their fields become flags of the same names. After
`parse` nobody sees an argparse namespace.

Where they have a `config_file`, options may also come from that file; where they have an `output_config`, all of them
are written to that file instead of running.
"""

from __future__ import annotations

import argparse
import atexit
import logging
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any, NoReturn, TypeVar

from common.config_file import read_config, write_config
from common.flag_options import Option, fields_of, is_group, options_of, values_of
from common.processes import end_process, note_exit_code
from options.errors import UserError, did_you_mean, one_line

Flags = TypeVar("Flags")


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
    if os.environ.get("WORLD_SIZE", "1") != "1":
        atexit.register(end_process)
    code = _run(flags_class, run, description=description, argv=argv)
    note_exit_code(code)
    return code


def _run(
    flags_class: type[Flags], run: Callable[[Flags], int | None], *, description: str, argv: Sequence[str] | None
) -> int:
    try:
        flags = parse(flags_class, description=description, argv=argv)
        path = dict(values_of(flags)).get("output_config")
        if path is not None:
            if os.environ.get("RANK", "0") == "0":  # a launcher may have started several of us
                write_config(path, flags)
            return 0
        return run(flags) or 0
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130


def parse(flags_class: type[Flags], *, description: str, argv: Sequence[str] | None = None) -> Flags:
    """Builds `flags_class` from a command line (`sys.argv` when None).

    Raises:
        UserError: an unknown flag, a malformed value, a missing required flag, or one that is not available yet; the
            same of a configuration file.
    """
    parser = _Parser(
        usage="%(prog)s [options]", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # Values such as "-1:last.png;;;0:first.png" begin with a minus and a digit; no option does.
    parser._negative_number_matcher = re.compile(r"-\.?\d")
    options = options_of(flags_class)
    for title, members in groupby(options, key=lambda option: option.group):
        group = parser.add_argument_group(title.replace("_", " "))
        for option in members:
            _add(group, option)
    parser.usage += "".join(f" {name} [{name} ...]" for name in parser.positionals)
    values = vars(parser.parse(sys.argv[1:] if argv is None else argv))
    if "config_file" in values:
        values = {**read_config(values["config_file"], options), **values}
    _check_required(options, values)
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
        if about := re.fullmatch(r"argument ([^:]+): (.*)", message, re.DOTALL):
            name, complaint = about[1].split("/")[0], about[2]
            if complaint.startswith("expected "):
                expected = complaint.removeprefix("expected ")
                raise UserError(name, "another number of values", expected, "see --help")
            raise UserError(name, complaint, "a valid value", "see --help")
        raise UserError("command line", one_line(message), "options as in --help", "see --help")


def _add(group: argparse._ArgumentGroup, option: Option) -> None:
    """Adds one flag. Absent flags stay absent, so that a file's values and the dataclass's defaults can come after."""
    names = [f"--{name}" for name in option.names]
    common = {"dest": option.name, "help": option.help.replace("%", "%%"), "default": argparse.SUPPRESS}
    if option.kind is bool:
        group.add_argument(*names, action=_switch(option), nargs=0, **common)
        return
    action = "extend" if option.metadata.get("repeats") else "store"
    convert = partial(option.convert, where=option.flag)
    if option.is_positional:
        # Optional to argparse, which has its own way of complaining.
        del common["dest"]
        group.add_argument(option.name, action=action, type=convert, nargs="*", **common)
        return
    count: dict[str, Any] = {"nargs": option.num_values}
    if option.metadata.get("alone") is not None:
        count = {"nargs": "?", "const": convert(option.metadata["alone"])}
    group.add_argument(*names, action=action, type=convert, metavar=option.metavar, **count, **common)


def _switch(option: Option) -> type[argparse.Action]:
    """The action of a flag without a value."""

    class Switch(argparse.Action):
        def __call__(self, parser, namespace, values, option_string=None) -> None:
            if option.is_refused:
                raise option.refuse(f"--{option.name}", option_string)
            setattr(namespace, self.dest, True)

    return Switch


def _check_required(options: Sequence[Option], values: Mapping[str, Any]) -> None:
    missing = ", ".join(option.flag for option in options if option.is_required and option.name not in values)
    if missing:
        raise UserError(missing, "nothing", "a value", f"give {missing}")


def _build(flags_class: type[Flags], values: Mapping[str, Any]) -> Flags:
    """The dataclass, nested ones included, from the flat values of the command line."""
    arguments = {}
    for field, annotation in fields_of(flags_class):
        if is_group(annotation):
            arguments[field.name] = _build(annotation, values)
        elif field.name in values:
            value = values[field.name]
            arguments[field.name] = tuple(value) if isinstance(value, list) else value
    return flags_class(**arguments)
