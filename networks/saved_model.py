"""The transformer with its LoRAs as a file, in its own types or in fp8."""

from __future__ import annotations

from collections.abc import Callable

from common.device import pick_device
from common.weights import Checkpoint
from networks.lora_merge import merge_into_file
from options.generate_checks import SavingFlags
from options.lora import lora_choices


def save_model(flags: SavingFlags, open_transformer: Callable[[], Checkpoint], save_fp8: Callable[..., None]) -> None:
    """What `--save_merged_model` or `--save_fp8_model` asks for; no other model is needed.

    Args:
        save_fp8: the family's `save_fp8_transformer`.

    Raises:
        UserError: as `merge_into_file` or `save_fp8`.
    """
    choices, output, mode = lora_choices(flags.lora), flags.lora.saved_model, flags.compute.fp8_mode
    how = {"device": pick_device(flags.compute.device), "flag": flags.lora.saving_flag}
    checkpoint = open_transformer()
    if flags.lora.save_fp8_model is None:
        merge_into_file(checkpoint, choices, output, **how)
    else:
        save_fp8(checkpoint, choices, output, mode="scaled" if mode == "off" else mode, **how)
