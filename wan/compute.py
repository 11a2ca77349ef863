"""Where and in which types Wan's models run, and how its VAE saves memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from common.device import pick_dtype
from modules.compute import TransformerCompute, dtype_name, planned_device, transformer_compute
from options.flags_compile import CompileFlags
from options.flags_wan_generate import WanComputeFlags


@dataclass(frozen=True, kw_only=True)
class Compute(TransformerCompute):
    """See `TransformerCompute`."""

    t5_dtype: torch.dtype
    clip_dtype: torch.dtype
    vae_dtype: torch.dtype
    fp8_t5: bool = False
    vae_cache_cpu: bool = False

    @classmethod
    def from_flags(cls, flags: WanComputeFlags, speed: CompileFlags | None = None) -> Compute:
        """bfloat16 on a GPU, CLIP in float16; float32 on a CPU; unless `--dit_dtype` or `--vae_dtype` say otherwise.

        Raises:
            UserError: a device that torch cannot use.
        """
        settings = transformer_compute(flags, speed)
        types = encoder_types(settings["device"], vae_dtype=flags.vae_dtype)
        return cls(**settings, **types, fp8_t5=flags.fp8_t5, vae_cache_cpu=flags.vae_cache_cpu)

    def planned(self, flags: WanComputeFlags) -> Compute:
        """With the types that a GPU would get, on a machine without one, unless `--device` asks for this machine."""
        device = planned_device(flags, self.device)
        transformer = pick_dtype(flags.dit_dtype, on_gpu="bfloat16", device=device)
        return replace(self, transformer_dtype=transformer, **encoder_types(device, vae_dtype=flags.vae_dtype))

    def recorded(self) -> dict[str, object]:
        return super().recorded() | {"vae_dtype": dtype_name(self.vae_dtype), "fp8_t5": self.fp8_t5}


def encoder_types(device: torch.device, *, vae_dtype: str | None = None) -> dict[str, torch.dtype]:
    """The number types of UMT5, CLIP and VAE, by the names of `Compute`'s fields."""
    return {
        "t5_dtype": pick_dtype(None, on_gpu="bfloat16", device=device),
        "clip_dtype": pick_dtype(None, on_gpu="float16", device=device),
        "vae_dtype": pick_dtype(vae_dtype, on_gpu="bfloat16", device=device),
    }
