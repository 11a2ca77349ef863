"""The interactive loop: prompts from the console, one after the other, with the models kept in RAM."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable

from options.errors import UserError, one_line

logger = logging.getLogger(__name__)

END_CHARACTERS = {"\x04", "\x1a"}  # Ctrl+D and Ctrl+Z where the console hands them over as text
WELCOME = "Write a prompt and its options; help lists them, Ctrl+D (on Windows Ctrl+Z and Enter) ends.\n"


def interact(generate: Callable[[str], None], read: Callable[[], str], *, help: str) -> None:
    """Reads lines and generates until the input ends; neither an error nor Ctrl+C ends the session.

    Args:
        generate: takes a prompt line.
        read: the next line; raises EOFError at the end.
        help: what there is to write.
    """
    sys.stdout.write(WELCOME)
    while (line := _next_line(read)) is not None:
        try:
            if line == "help":
                sys.stdout.write(f"{help}\n")
            elif line:
                generate(line)
        except KeyboardInterrupt:
            sys.stderr.write("interrupted\n")
        except UserError as error:
            sys.stderr.write(f"{error}\n")
        except Exception as error:  # a model that does not fit into memory, say: the next prompt may be smaller
            sys.stderr.write(f"failed: {type(error).__name__}: {one_line(str(error))}\n")
            logger.debug("%s", line, exc_info=error)
    sys.stdout.write("\n")


def _next_line(read: Callable[[], str]) -> str | None:
    """A line without white space around it; None at the end."""
    while True:
        try:
            line = read().strip()
            return None if line in END_CHARACTERS else line
        except EOFError:
            return None
        except KeyboardInterrupt:
            sys.stderr.write("interrupted; Ctrl+D ends\n")
        except UnicodeDecodeError:
            sys.stderr.write("the line holds bytes that are no text in this console's encoding; write it again\n")


def console_reader() -> Callable[[], str]:
    """Line editing and history with prompt_toolkit where it is installed and there is a terminal, else plain input."""
    if not sys.stdin.isatty():
        return _piped_line
    try:
        from prompt_toolkit import PromptSession
    except ImportError:
        return lambda: input("> ")
    session = PromptSession()
    return lambda: session.prompt("> ")


def _piped_line() -> str:
    """A line of a pipe or file, decoded on its own: bytes that are no text spoil their line and no other."""
    line = sys.stdin.buffer.readline()
    if not line:
        raise EOFError
    return line.decode("utf-8-sig")
