"""The flags of `convert_lora.py`."""

from dataclasses import dataclass
from typing import Literal

from options.flag_fields import flag


@dataclass(frozen=True, kw_only=True)
class ConvertLoraFlags:
    """What to convert, and into what."""

    input: str = flag("LoRA, LoHa or LoKr in any known format", required=True)
    output: str = flag("file to write, .safetensors", required=True)
    target: Literal["other", "default"] = flag(
        "default: names as our trainer writes them; other: names for diffusers and ComfyUI", required=True
    )
    diffusers_prefix: str | None = flag(
        "what stands before names with --target other: transformer for diffusers, diffusion_model for ComfyUI "
        "(default: diffusion_model)"
    )
