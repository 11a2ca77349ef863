"""Prompt lines: `a cat --w 832 --h 480 --d 42 --i start.png`, in batch files, in the interactive loop and in training.

An option begins at white space and two dashes and ends at the next one, so values may hold spaces but not ` --`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import StringIO

from options.errors import UserError, did_you_mean
from options.flags_generate import RequestFlags


@dataclass(frozen=True, kw_only=True)
class LineOption:
    """One inline option."""

    field: str | None
    """The request flag that it overrides; None for options of later versions."""
    convert: Callable[[str], object]
    help: str
    repeats: bool = False
    """Whether repeated options make a list; otherwise the last one wins."""
    key: str | None = None
    """What it is called in TOML and JSON; None where there are only lines."""

    def read(self, text: str, shown: str, where: str) -> object:
        """The value that `text` means.

        Args:
            shown: the option as it was written, for messages.

        Raises:
            UserError: no value, a malformed one, or an option of later versions.
        """
        if self.field is None:
            raise UserError(where, shown, "this option to be left out", "not available yet in this version")
        if not text and self.field != "negative_prompt":
            raise UserError(where, f"{shown} without a value", self.help, f"give {shown} a value, or leave it out")
        try:
            return self.convert(text)
        except ValueError as error:
            raise UserError(where, f"{shown} {text}", str(error), "change it") from None


def _number(kind: type, name: str) -> Callable[[str], object]:
    def convert(text: str) -> object:
        try:
            return kind(text)
        except ValueError:
            raise ValueError(name) from None

    return convert


INTEGER, NUMBER = _number(int, "an integer"), _number(float, "a number")

GENERATION_OPTIONS = {
    "w": LineOption(field="video_size", convert=INTEGER, help="width"),
    "h": LineOption(field="video_size", convert=INTEGER, help="height"),
    "f": LineOption(field="video_seconds", convert=NUMBER, help="video seconds"),
    "vs": LineOption(field="video_sections", convert=INTEGER, help="video sections, instead of seconds"),
    "d": LineOption(field="seed", convert=INTEGER, help="seed"),
    "s": LineOption(field="infer_steps", convert=INTEGER, help="denoising steps"),
    "g": LineOption(field="guidance_scale", convert=NUMBER, help="classifier-free guidance"),
    "l": LineOption(field="guidance_scale", convert=NUMBER, help="the same"),
    "fs": LineOption(field="flow_shift", convert=NUMBER, help="flow shift"),
    "i": LineOption(field="image_path", convert=str, help="start image"),
    "im": LineOption(field="image_mask_path", convert=str, help="its mask"),
    "ei": LineOption(field="end_image_path", convert=str, help="end image"),
    "n": LineOption(field="negative_prompt", convert=str, help="negative prompt"),
    "ci": LineOption(field="control_image_path", convert=str, help="control image, repeatable", repeats=True),
    "cim": LineOption(field="control_image_mask_path", convert=str, help="its mask, repeatable", repeats=True),
    "of": LineOption(field="one_frame_inference", convert=str, help="one-frame options, as --one_frame_inference"),
    "lora": LineOption(field="lora", convert=str, help="LoRA of this prompt, PATH or PATH:0.8", repeats=True),
    "mcrr": LineOption(field=None, convert=str, help="MagCache retention ratio (not available yet)"),
    "mct": LineOption(field=None, convert=str, help="MagCache threshold (not available yet)"),
    "mck": LineOption(field=None, convert=str, help="MagCache skips in a row (not available yet)"),
}
"""FramePack's options in prompts for generation; `options.sample_prompts` has those of training samples."""

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
    def parse(cls, line: str, where: str, options: Mapping[str, LineOption] = GENERATION_OPTIONS) -> PromptLine:
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
            key = name if name in SIDES else option.field
            overrides[key] = (*overrides.get(key, ()), converted) if option.repeats else converted
        return cls(prompt=prompt.strip() or None, overrides=overrides)

    def over(self, flags: RequestFlags) -> RequestFlags:
        """`flags` with what the line says in their place. Lists given in the line replace the command line's."""
        values = {name: value for name, value in self.overrides.items() if name not in SIDES}
        size = [self.overrides.get(name, flags.video_size[axis]) for name, axis in SIDES.items()]
        if "video_seconds" in values:
            values.setdefault("video_sections", None)  # the line's length counts, not the command line's sections
        if self.prompt is not None:
            values["prompt"] = self.prompt
        return replace(flags, video_size=tuple(size), **values)


def _unknown(name: str, where: str, options: Mapping[str, LineOption]) -> UserError:
    """Names the nearest option; for a flag of the command line or a key, the inline option that means the same."""
    means = ((key, option.key or option.field) for key, option in options.items())
    short = next((f"here it is --{key}" for key, meaning in means if meaning == name), None)
    known = [f"--{key}" for key in options]
    remedy = short or did_you_mean(f"--{name}", known, f"choose one of {' '.join(known)}")
    return UserError(where, f"--{name}" if name else "-- without a name", "a known option", remedy)


def options_help() -> str:
    """The table of inline options for the console."""
    return "\n".join(f"  --{name:5} {option.help}" for name, option in GENERATION_OPTIONS.items())


def numbered_lines(text: str) -> Sequence[tuple[int, str]]:
    """(line number from 1, line) of a prompt file, without blank lines and lines that begin with `#`."""
    # Not splitlines: the line separators of Unicode, which no editor counts, come along with copied text.
    lines = ((number, line.strip()) for number, line in enumerate(StringIO(text, newline=None), 1))
    return [(number, line) for number, line in lines if line and not line.startswith("#")]
