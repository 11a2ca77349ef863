"""Merges LoRAs into a model, or into one LoRA. LoRA, LoHa and LoKr of any format that can be read will do.

Into a model, whose file then loads as --dit:

    python merge_lora.py --dit FramePackI2V_HY --lora_weight style.safetensors face.safetensors
        --lora_multiplier 0.8 1.0 --save_merged_model merged.safetensors

Into one LoRA that does the same (the ranks add up; --rank makes the closest one of that rank, and says how close):

    python merge_lora.py --lora_weight style.safetensors face.safetensors --lora_multiplier 0.8 1.0
        --save_merged_lora both.safetensors --rank 32
"""

import logging
import sys
from collections.abc import Sequence

from common.flags import run_script
from options.flags_merge_lora import MergeLoraFlags, check_merge_lora_flags, unused_flags
from options.lora import LoraChoice, lora_choices


def merge(flags: MergeLoraFlags) -> None:
    check_merge_lora_flags(flags)
    choices = lora_choices(flags.lora)
    for name in unused_flags(flags):
        logging.getLogger("merge_lora").warning("%s has no effect here", name)
    if flags.save_merged_model is not None:
        merge_into_model(flags, choices)
    else:
        merge_into_lora(flags, choices)


def merge_into_model(flags: MergeLoraFlags, choices: Sequence[LoraChoice]) -> None:
    from common.device import pick_device
    from common.weights import open_checkpoint
    from networks.lora_merge import merge_into_file

    checkpoint = open_checkpoint(flags.dit, flag="--dit", subfolder="transformer")
    device, flag = pick_device(flags.device), "--save_merged_model"
    merge_into_file(checkpoint, choices, flags.save_merged_model, device=device, flag=flag)


def merge_into_lora(flags: MergeLoraFlags, choices: Sequence[LoraChoice]) -> None:
    from common.device import pick_device, pick_dtype
    from networks.lora_combine import combine_files

    device, output = pick_device(flags.device), flags.save_merged_lora
    dtype = pick_dtype(flags.save_precision, on_gpu=flags.save_precision, device=device)
    # Other devices than these two lack float64 or decompositions.
    device = device if device.type == "cuda" else "cpu"
    combine_files(choices, output, rank=flags.rank, dtype=dtype, device=device, flag="--save_merged_lora")


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(MergeLoraFlags, merge, description=__doc__, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
