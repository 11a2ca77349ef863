"""How a flag dataclass declares a field; `common.flags` turns such a dataclass into a command line."""

from dataclasses import MISSING, field
from typing import Any


def flag(
    help: str,
    *,
    default: Any = None,
    required: bool = False,
    not_yet: tuple[str, ...] = (),
    alias: str | None = None,
    repeats: bool = False,
    secret: bool = False,
    alone: str | None = None,
    positional: bool = False,
) -> Any:
    """A field that is a flag of the same name; the annotation gives type, choices (`Literal`) and number of values.

    Args:
        help: one line for `--help`.
        not_yet: choices that are known, but not available yet.
        alias: an older name of the flag, without dashes.
        repeats: a list that goes on when the flag is given again; otherwise the last one wins.
        alone: what the flag means when no value follows it; else there has to be one.
        secret: a password or token, which is written nowhere.
        positional: given without a flag in front, before, after or between the options.
    """
    metadata = {"help": help, "not_yet": not_yet, "alias": alias, "repeats": repeats}
    metadata |= {"secret": secret, "positional": positional, "alone": alone}
    return field(default=MISSING if required else default, metadata=metadata)


def later(help: str, *, default: Any = None, alias: str | None = None) -> Any:
    """A flag that users know and that this version answers with "not available yet"."""
    metadata = {"help": f"{help} (not available yet)", "refusal": "not available yet in this version", "alias": alias}
    return field(default=default, metadata=metadata)


def refused(help: str, *, why: str, default: Any = None) -> Any:
    """A flag that users know and that is answered with `why`."""
    return field(default=default, metadata={"help": f"{help} ({why})", "refusal": why})
