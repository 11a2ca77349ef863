"""Prompt lines: `a cat --w 832 --h 480 --d 42 --i start.png`, in batch files, in the interactive loop and in training.

An option begins at white space and two dashes and ends at the next one, so values may hold spaces but not ` --`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import StringIO

from options.errors import UserError, did_you_mean
from options.flags_generate import Flags
from options.line_options import LineOption

SIDES = {"h": 0, "w": 1}
OPTION_START = re.compile(r"(?:^|\s)--")
"""Any white space in front counts, the full-width space of Japanese keyboards too: an option shall not become text."""


@dataclass(frozen=True, kw_only=True)
class PromptLine:
    """A parsed line: only what it says, nothing resolved."""

    prompt: str | None
    """None when the line holds options only; the command line's prompt then counts."""
    overrides: dict[str, object]
    """Values by request flag; `w` and `h` stay apart, because a line may give one of them."""

    @classmethod
    def parse(cls, line: str, where: str, options: Mapping[str, LineOption]) -> PromptLine:
        """Parses a line of a file or of the console.

        Args:
            options: which there are, by name.

        Raises:
            UserError: an unknown option, a missing or malformed value.
        """
        prompt, *pieces = OPTION_START.split(line.strip())
        overrides: dict[str, object] = {}
        for piece in pieces:
            name, value = [*piece.strip().split(maxsplit=1), "", ""][:2]
            option = options.get(name)
            if option is None:
                raise _unknown(name, where, options)
            converted = option.read(value.strip(), f"--{name}", where)
            if not option.has_effect:
                continue
            key = name if name in SIDES else option.field
            overrides[key] = (*overrides.get(key, ()), converted) if option.repeats else converted
        return cls(prompt=prompt.strip() or None, overrides=overrides)

    def over(self, flags: Flags) -> Flags:
        """`flags` with what the line says in their place. Lists given in the line replace the command line's."""
        values = {name: value for name, value in self.overrides.items() if name not in SIDES}
        size = [self.overrides.get(name, flags.video_size[axis]) for name, axis in SIDES.items()]
        if self.prompt is not None:
            values["prompt"] = self.prompt
        return flags.with_values({"video_size": tuple(size), **values})


def _unknown(name: str, where: str, options: Mapping[str, LineOption]) -> UserError:
    """Names the nearest option; for a flag of the command line or a key, the inline option that means the same."""
    means = ((key, option.key or option.field) for key, option in options.items())
    short = next((f"here it is --{key}" for key, meaning in means if meaning == name), None)
    known = [f"--{key}" for key in options]
    remedy = short or did_you_mean(f"--{name}", known, f"choose one of {' '.join(known)}")
    return UserError(where, f"--{name}" if name else "-- without a name", "a known option", remedy)


def numbered_lines(text: str) -> Sequence[tuple[int, str]]:
    """(line number from 1, line) of a prompt file, without blank lines and lines that begin with `#`."""
    # Not splitlines: the line separators of Unicode, which no editor counts, come along with copied text.
    lines = ((number, line.strip()) for number, line in enumerate(StringIO(text, newline=None), 1))
    return [(number, line) for number, line in lines if line and not line.startswith("#")]
