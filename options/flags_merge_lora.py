"""The flags of `merge_lora.py`."""

from dataclasses import dataclass
from typing import Literal

from options.errors import UserError
from options.flag_fields import flag
from options.flags_lora import LoraSourceFlags


@dataclass(frozen=True, kw_only=True)
class MergeLoraFlags:
    """What is merged, and into what: a model, or one LoRA."""

    lora: LoraSourceFlags
    save_merged_model: str | None = flag("write the model of --dit with the LoRAs merged, .safetensors")
    dit: str | None = flag("the transformer for --save_merged_model: safetensors, first shard, or snapshot folder")
    save_merged_lora: str | None = flag("write the LoRAs as one, .safetensors; needs no --dit")
    rank: int | None = flag("--save_merged_lora: the largest rank of a module (default: the ranks add up)")
    save_precision: Literal["float", "fp32", "fp16", "bf16"] = flag("--save_merged_lora: type to save", default="fp32")
    device: str | None = flag("torch device to merge on (default: cuda if there is one, else cpu)")
    dit_in_channels: int | None = flag("accepted: the number is in the model's file")


def check_merge_lora_flags(flags: MergeLoraFlags) -> None:
    """Raises UserError for outputs and inputs that do not go together."""
    if (flags.save_merged_model is None) == (flags.save_merged_lora is None):
        got = "both outputs" if flags.save_merged_model is not None else "no output"
        expected = "either --save_merged_model or --save_merged_lora"
        raise UserError("command line", got, expected, "run twice for both" if got.startswith("both") else "give one")
    if not flags.lora.lora_weight:
        raise UserError("--lora_weight", "nothing", "one or more LoRA files", "give --lora_weight")
    if flags.save_merged_model is not None and flags.dit is None:
        raise UserError("--dit", "nothing", "the model to merge into", "give --dit, or --save_merged_lora instead")
    if flags.rank is not None and flags.rank < 1:
        raise UserError("--rank", flags.rank, "a number from 1 up", "leave it out to add the ranks up")


def unused_flags(flags: MergeLoraFlags) -> list[str]:
    """Flags that were given and have no effect."""
    unused = {"--dit_in_channels": flags.dit_in_channels is not None}
    if flags.save_merged_lora is not None:
        unused |= {"--dit": flags.dit is not None}
    else:
        unused |= {"--rank": flags.rank is not None, "--save_precision": flags.save_precision != "fp32"}
    return [name for name, is_given in unused.items() if is_given]
