"""Rules for requests of both families: numbers, texts, and how one-frame flags go together."""

from __future__ import annotations

import secrets
from collections.abc import Mapping

from options.errors import UserError
from options.flags_generate import RequestFlags
from options.geometry import check_size
from options.one_frame import OneFrameOptions

COMMON_LIMITS: dict[str, tuple[float, float]] = {
    "infer_steps": (1, 10_000),
    "seed": (0, 2**63 - 1),
    "guidance_scale": (-1_000, 1_000),
    "flow_shift": (0.001, 1_000),
    "fps": (1, 1_000),
}
"""See `RequestFlags.limits`."""


def check_numbers(flags: RequestFlags) -> None:
    """Raises UserError for a number that no combination makes valid."""
    for name, (low, high) in flags.limits.items():
        value = getattr(flags, name)
        if value is not None and not low <= value <= high:  # also false for nan
            kind = "an integer" if isinstance(value, int) else "a number"
            raise UserError(f"--{name}", value, f"{kind} from {low} to {high}", "change it")


def check_single_flags(flags: RequestFlags, *, texts: tuple[str, ...] = ("prompt", "negative_prompt")) -> None:
    """Raises UserError for a bad number, size, one-frame option, or text."""
    check_numbers(flags)
    check_size(*flags.video_size)
    parse_one_frame(flags.one_frame_inference)
    for name in texts:
        text = getattr(flags, name) or ""
        if any("\ud800" <= character <= "\udfff" for character in text):
            got = text.encode("utf-8", "backslashreplace").decode()
            raise UserError(f"--{name}", got, "a text in UTF-8", "the console or file is in another encoding")


def check_whole(values: Mapping[str, object]) -> None:
    """Raises TypeError for a number of a file that is not whole."""
    if wrong := [name for name, value in values.items() if type(value) is not int]:
        raise TypeError(f"{wrong[0]} is not whole")


def needed_prompt(flags: RequestFlags) -> str:
    """Raises UserError when there is none."""
    if flags.prompt is None:
        raise UserError("--prompt", "nothing", "a prompt", 'give --prompt "…"')
    return flags.prompt


def chosen_seed(flags: RequestFlags) -> int:
    """A seed that was left open is drawn."""
    return secrets.randbits(32) if flags.seed is None else flags.seed


def parse_one_frame(text: str | None) -> OneFrameOptions | None:
    return None if text is None else OneFrameOptions.parse(text)


def check_masks(
    masks: tuple[str, ...], controls: tuple[str, ...], where: str = "--control_image_mask_path"
) -> tuple[str, ...]:
    """The masks.

    Raises:
        UserError: more masks than control images.
    """
    if len(masks) > len(controls):
        got = f"{len(masks)} masks for {len(controls)} control images"
        raise UserError(where, got, "no more masks than control images", "drop a mask or add --control_image_path")
    return masks


def check_no_one_frame_flags(only_one_frame: Mapping[str, object], remedy: str) -> None:
    """Raises UserError for flags of one-frame mode where that mode is not on.

    Args:
        only_one_frame: their values by name.
    """
    for name, value in only_one_frame.items():
        if value:
            got = " ".join(value) if isinstance(value, tuple) else name
            raise UserError(name, got, "--one_frame_inference beside it", remedy)
