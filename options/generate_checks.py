"""Rules between the options of a generating script."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Protocol

from options.errors import UserError
from options.flags_generate import ComputeFlags, RequestFlags, SeriesFlags
from options.flags_lora import LoraFlags

logger = logging.getLogger(__name__)


class SavingFlags(Protocol):
    """What of a script's flags matters to writing its transformer as a file."""

    request: RequestFlags
    compute: ComputeFlags
    lora: LoraFlags
    series: SeriesFlags


def log_hints(hints: Iterable[str | None]) -> None:
    """Advice about options that have no effect or may not be meant, when everything is known to work."""
    for hint in filter(None, hints):
        logger.warning(hint)


def check_saved_model(flags: SavingFlags, dit: str | None) -> None:
    """Raises UserError for flags that do not go with writing the transformer as a file, and without `--dit`."""
    if flags.lora.save_fp8_model is not None and flags.lora.save_merged_model is not None:
        got = "--save_merged_model beside --save_fp8_model"
        raise UserError("--save_merged_model", got, "one of them", "run twice for both")
    if flags.series.plan is not None:
        raise UserError("--plan", f"--plan beside {flags.lora.saving_flag}", "something to generate", "leave one out")
    if dit is None:
        raise UserError("--dit", "nothing", "a checkpoint file or folder", "give --dit")
    if flags.request.lora:
        raise UserError("--lora", " ".join(flags.request.lora), "--lora_weight, which is merged", "use that instead")
    if flags.lora.save_merged_model is not None and flags.compute.fp8_mode != "off":
        given = "--fp8_scaled" if flags.compute.fp8_scaled else "--fp8"
        got = f"{given} beside --save_merged_model"
        raise UserError(given, got, "a file in the model's own types", "use --save_fp8_model, or leave it out")
