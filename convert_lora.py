"""Converts a LoRA, LoHa or LoKr for another program, and back. Any format that can be read will do as input.

For ComfyUI:

    python convert_lora.py --input mine.safetensors --output mine_comfyui.safetensors --target other

For diffusers:

    python convert_lora.py --input mine.safetensors --output mine_diffusers.safetensors --target other
        --diffusers_prefix transformer

For this suite, from either of them, from PEFT, or from a HunyuanVideo LoRA:

    python convert_lora.py --input theirs.safetensors --output mine.safetensors --target default
"""

import sys
from collections.abc import Sequence

from common.flags import run_script
from options.flags_convert_lora import ConvertLoraFlags


def convert(flags: ConvertLoraFlags) -> None:
    from networks.lora_convert import convert_file

    convert_file(flags)


def main(argv: Sequence[str] | None = None) -> int:
    return run_script(ConvertLoraFlags, convert, description=__doc__, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
