"""Options in a TOML file: `--config_file` reads them, `--output_config` writes them.

A file's tables only give order to its reader: `[models]` and its kind mean nothing, options stand in any of them.
"""

from __future__ import annotations

import json
import logging
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from common.files import atomic_file, existing_file
from common.flag_options import Option, options_of, values_of
from options.errors import UserError, UserErrors, did_you_mean, shown

logger = logging.getLogger(__name__)

READ, WRITE = "--config_file", "--output_config"
ABOUT_FILES = {READ.removeprefix("--"), WRITE.removeprefix("--")}
"""These two stand on the command line only."""


def read_config(path: str, options: Sequence[Option]) -> dict[str, Any]:
    """The values in a configuration file, by option. `.toml` may be left out of `path`.

    Raises:
        UserError: no such file, no TOML, unknown options, values that the command line would not take either.
    """
    file = existing_file(_with_suffix(path), flag=READ, expected="a TOML file with options")
    by_name = {name: option for option in options if option.name not in ABOUT_FILES for name in option.names}
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    problems: list[UserError] = []
    for where, name, value in _entries(file, _tables(file)):
        try:
            option = _known(name, where, by_name)
            if option.name in places:
                logger.warning("%s overrides %s", where, places[option.name])
            places[option.name] = where
            if not (option.is_refused and _asks_for_nothing(value, option)):
                values[option.name] = _read(option, value, where)
        except UserError as problem:
            problems.append(problem)
    if problems:
        raise problems[0] if len(problems) == 1 else UserErrors(problems)
    return values


def write_config(path: str, flags: Any) -> None:
    """Writes all options of a dataclass of flags, defaults too; `.toml` may be left out of `path`.

    Secrets are left out, so are refused options; of options without a value there is a comment.

    Raises:
        UserError: there is a file already, or none can be written there.
    """
    file = _with_suffix(path)
    if file.exists():
        raise UserError(WRITE, file, "a file that is not there yet", "remove it, or give another name")
    try:
        data = config_text(flags).encode()
    except UnicodeEncodeError as error:
        raise UserError(WRITE, ascii(error.object), "values that UTF-8 can hold", "rename the file") from error
    try:
        with atomic_file(file) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise UserError(WRITE, file, "a file that can be written", error.strerror or "give another one") from error
    logger.info("options written to %s", file)


def config_text(flags: Any) -> str:
    """What `write_config` writes: a table for each group of options."""
    values = dict(values_of(flags))
    written = [option for option in options_of(type(flags)) if _is_written(option)]
    blocks = []
    for group, members in groupby(written, key=lambda option: option.group):
        lines = [_line(option, values[option.name]) for option in members]
        blocks.append("\n".join([f"[{group}]", *lines, ""]))
    return "\n".join(blocks)


def _with_suffix(path: str) -> Path:
    return Path(path if path.lower().endswith(".toml") else f"{path}.toml")


# ---- reading ----


def _tables(file: Path) -> dict[str, Any]:
    text = ""
    try:
        text = file.read_bytes().decode("utf-8-sig")
        return tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise UserError(READ, file, "text in UTF-8", f"save it as UTF-8 ({error.reason})") from error
    except OSError as error:
        raise UserError(READ, file, "a file that can be read", error.strerror or "look at it") from error
    except (ValueError, RecursionError) as error:
        hint = "; write \\ in a path as / or put the path in 'single quotes'" if "\\" in text else ""
        raise UserError(READ, file, "valid TOML", f"{error}{hint}") from error


def _entries(file: Path, tables: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(place, key, value) of everything outside and inside of tables."""
    for key, value in tables.items():
        if isinstance(value, dict):
            yield from ((f"{file} [{key}] {name}", name, inner) for name, inner in value.items())
        else:
            yield f"{file} {key}", key, value


def _known(name: str, where: str, by_name: Mapping[str, Option]) -> Option:
    if name in by_name:
        return by_name[name]
    if name in ABOUT_FILES:
        raise UserError(where, name, "options other than this", f"give --{name} on the command line")
    raise UserError(where, name, "a known option", did_you_mean(name, by_name, "see --help"))


def _asks_for_nothing(value: object, option: Option) -> bool:
    """Whether a refused option may stand in the file, because it is off there."""
    return not value or value == option.default


def _read(option: Option, value: object, where: str) -> Any:
    if option.kind is bool:
        if not isinstance(value, bool):
            raise UserError(where, shown(value), "true or false", "write it without quotes")
        if option.is_refused:
            raise option.refuse(where, shown(value))
        return value
    if option.num_values is None:
        return _one(option, value, where)
    if not isinstance(value, list):
        raise UserError(where, shown(value), "a TOML array", f"write {option.name} = [{shown(value)}]")
    if option.num_values not in ("*", len(value)):
        raise UserError(where, shown(value), f"{option.num_values} values", "write as many")
    return tuple(_one(option, item, where) for item in value)


def _one(option: Option, value: object, where: str) -> Any:
    """One value, by way of the text that the command line would hold."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if isinstance(value, str) or (is_number and not (option.kind is str and isinstance(value, float))):
        return option.convert(value if isinstance(value, str) else shown(value), where)
    remedy = f'write {option.name} = "…"' if option.kind is str else "see --help"
    raise UserError(where, shown(value), option.expected, remedy)


# ---- writing ----


def _is_written(option: Option) -> bool:
    return not (option.is_refused or option.metadata.get("secret") or option.name in ABOUT_FILES)


def _line(option: Option, value: Any) -> str:
    if value is None:
        return f"# {option.name}: {option.help}"
    return f"{option.name} = {_toml(value)}"


def _toml(value: Any) -> str:
    import toml

    encoder = toml.TomlEncoder()
    encoder.dump_funcs[str] = _quoted
    native = value if isinstance(value, bool | int | float | tuple) else str(value)
    return str(encoder.dump_value(native))


def _quoted(text: str) -> str:
    # The library writes a backslash as it is, so that no path of Windows could be read back. A JSON string is a TOML
    # string, but for DEL, which only JSON allows bare.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
