"""Inline options of prompt lines: what each overrides, and how its value is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from options.errors import UserError


@dataclass(frozen=True, kw_only=True)
class LineOption:
    """One inline option."""

    field: str | None
    """The request flag that it overrides; None for options that are known, and not there."""
    convert: Callable[[str], object]
    help: str
    repeats: bool = False
    """Whether repeated options make a list; otherwise the last one wins."""
    key: str | None = None
    """What it is called in TOML and JSON; None where there are only lines."""
    refusal: str = "not available yet in this version"
    """The answer to an option that overrides nothing."""
    has_effect: bool = True
    """False for what another family's files may say; it is read and left out."""

    def read(self, text: str, shown: str, where: str) -> object:
        """The value that `text` means.

        Args:
            shown: the option as it was written, for messages.

        Raises:
            UserError: no value, a malformed one, or an option that is not there.
        """
        if self.field is None and self.has_effect:
            raise UserError(where, shown, "this option to be left out", self.refusal)
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
    "d": LineOption(field="seed", convert=INTEGER, help="seed"),
    "s": LineOption(field="infer_steps", convert=INTEGER, help="denoising steps"),
    "g": LineOption(field="guidance_scale", convert=NUMBER, help="classifier-free guidance"),
    "l": LineOption(field="guidance_scale", convert=NUMBER, help="the same"),
    "fs": LineOption(field="flow_shift", convert=NUMBER, help="flow shift"),
    "i": LineOption(field="image_path", convert=str, help="start image"),
    "ei": LineOption(field="end_image_path", convert=str, help="end image"),
    "n": LineOption(field="negative_prompt", convert=str, help="negative prompt"),
    "ci": LineOption(field="control_image_path", convert=str, help="control image, repeatable", repeats=True),
    "cim": LineOption(field="control_image_mask_path", convert=str, help="its mask, repeatable", repeats=True),
    "of": LineOption(field="one_frame_inference", convert=str, help="one-frame options, as --one_frame_inference"),
    "lora": LineOption(field="lora", convert=str, help="LoRA of this prompt, PATH or PATH:0.8", repeats=True),
}
"""What prompts for generation with either family may say; each family adds its own."""


def sample_option(
    key: str, field: str | None, convert: Callable[[str], object], help: str, **named: object
) -> LineOption:
    """An inline option of prompts for training samples."""
    return LineOption(field=field, convert=convert, help=help, key=key, **named)


SAMPLE_OPTIONS = {
    "w": sample_option("width", "video_size", INTEGER, "a width"),
    "h": sample_option("height", "video_size", INTEGER, "a height"),
    "d": sample_option("seed", "seed", INTEGER, "a seed"),
    "s": sample_option("sample_steps", "infer_steps", INTEGER, "denoising steps"),
    "l": sample_option("cfg_scale", "guidance_scale", NUMBER, "classifier-free guidance"),
    "fs": sample_option("discrete_flow_shift", "flow_shift", NUMBER, "a flow shift"),
    "n": sample_option("negative_prompt", "negative_prompt", str, "a negative prompt"),
    "i": sample_option("image_path", "image_path", str, "a start image"),
    "ei": sample_option("end_image_path", "end_image_path", str, "an end image"),
    "ci": sample_option("control_image_path", "control_image_path", str, "a control image", repeats=True),
    "cim": sample_option("control_image_mask_path", "control_image_mask_path", str, "its mask", repeats=True),
    "of": sample_option("one_frame", "one_frame_inference", str, "one-frame options, or default"),
}
"""The same for training samples."""


def options_help(options: Mapping[str, LineOption]) -> str:
    """The table of inline options for the console."""
    return "\n".join(f"  --{name:5} {option.help}" for name, option in options.items())
