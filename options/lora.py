"""Which LoRAs a command line or a prompt line asks for, and how much of each."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from options.errors import UserError
from options.flags_lora import LoraSourceFlags


@dataclass(frozen=True, kw_only=True)
class LoraChoice:
    """One LoRA of `--lora_weight`."""

    path: str
    multiplier: float = 1.0
    include: str | None = None
    """Regular expression: only modules in whose name it is found."""
    exclude: str | None = None
    """Of these, all but those in whose name this one is found."""


@dataclass(frozen=True, kw_only=True)
class PromptLora:
    """One LoRA of a prompt line, which the model has for this prompt only."""

    path: str
    multiplier: float


def lora_choices(flags: LoraSourceFlags) -> tuple[LoraChoice, ...]:
    """Pairs files with multipliers and patterns by position. What is not given is 1.0, or no pattern.

    Raises:
        UserError: more of one than there are files, or a multiplier that is no number.
    """
    num_files = len(flags.lora_weight)
    for name in ("lora_multiplier", "include_patterns", "exclude_patterns"):
        if (num := len(getattr(flags, name))) > num_files:
            got = f"{num} values for {num_files} LoRA files"
            raise UserError(
                f"--{name}", got, "no more values than --lora_weight has files", "add a file or drop a value"
            )
    for multiplier in flags.lora_multiplier:
        _check_multiplier(multiplier, "--lora_multiplier")

    def at(values: tuple, position: int, default: object) -> object:
        return values[position] if position < len(values) else default

    return tuple(
        LoraChoice(
            path=path,
            multiplier=at(flags.lora_multiplier, position, 1.0),
            # An empty text keeps the place of a file that needs no pattern.
            include=at(flags.include_patterns, position, None) or None,
            exclude=at(flags.exclude_patterns, position, None) or None,
        )
        for position, path in enumerate(flags.lora_weight)
    )


def parse_prompt_lora(text: str) -> PromptLora:
    """`style.safetensors`, or `style.safetensors:0.8`. A file of exactly that name wins, so a name may hold colons.

    Raises:
        UserError: a multiplier that is no number.
    """
    path, colon, number = text.rpartition(":")
    if not colon or os.path.isfile(text):
        return PromptLora(path=text, multiplier=1.0)
    try:
        multiplier = float(number)
    except ValueError:
        if os.path.isfile(path):
            raise UserError("--lora", text, "FILE or FILE:0.8", f"{number or 'nothing'} is no multiplier") from None
        return PromptLora(path=text, multiplier=1.0)  # the colon of a drive
    _check_multiplier(multiplier, "--lora")
    return PromptLora(path=path.rstrip(), multiplier=multiplier)


def _check_multiplier(multiplier: float, flag: str) -> None:
    if not math.isfinite(multiplier):
        raise UserError(flag, multiplier, "a number", "change the multiplier")
