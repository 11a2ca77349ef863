"""What tests read out of the guides: commands, tables, prompts and links."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parent.parent
NAMES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
ARRAY = re.compile(r"^(\w+)=\((.*?)\)$", re.MULTILINE | re.DOTALL)


def text_of(name: str) -> str:
    """Of a guide by its path from the repository's root."""
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str, kind: str) -> list[str]:
    """The fenced blocks of one kind (`bash`, `toml`)."""
    return [block for found, block in FENCED.findall(text) if found == kind]


def commands(text: str, scripts: Iterable[str]) -> list[list[str]]:
    """The words of every command that starts one of the scripts; arrays of the shell are put in."""
    fenced = [block for _, block in FENCED.findall(text)]
    arrays = {name: " ".join(words.split()) for block in fenced for name, words in ARRAY.findall(block)}
    lines = [line for block in fenced for line in block.replace("\\\n", " ").splitlines()]
    for name, words in arrays.items():
        lines = [line.replace(f'"${{{name}[@]}}"', words) for line in lines]
    return [words for line in lines if (words := shlex.split(line, comments=True)) and set(words) & set(scripts)]


def script_and_arguments(words: list[str]) -> tuple[str, list[str]]:
    """What accelerate, or Python, would start."""
    if words[:2] != ["accelerate", "launch"]:
        assert words[0] == "python"
        return words[1], words[2:]
    from accelerate.commands.launch import launch_command_parser

    launched = launch_command_parser().parse_args(words[2:])
    return launched.training_script, launched.training_script_args


def rows(text: str, *headers: str) -> list[list[str]]:
    """The cells of the table whose first headers these are, without its head."""
    head = "".join(rf" *{re.escape(header)} *\|" for header in headers)
    (table,) = re.findall(rf"^\|{head}.*\n *\|-.*\n((?: *\|.*\n)+)", text, re.MULTILINE)
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


def in_backticks(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def options_named(text: str) -> set[str]:
    """With their dashes."""
    return set(re.findall(r"(?<![\w-])--\w+\b(?!…)", text))


def broken_links(name: str) -> list[str]:
    """Links of a guide within the repository that lead to no file or no heading."""
    found = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", text_of(name))
    return [f"{file}#{anchor}" for file, anchor in found if not _leads_somewhere(ROOT / name, file, anchor)]


def _leads_somewhere(here: Path, file: str, anchor: str) -> bool:
    target = here.parent / file if file else here
    return target.exists() and (not anchor or anchor in _anchors(target.read_text(encoding="utf-8")))


def _anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
