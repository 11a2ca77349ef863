"""Where and in which types FramePack's models run, and how its VAE saves memory."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from common.device import pick_dtype
from common.weights import Checkpoint
from hunyuan_model import vae as hunyuan_vae
from modules.compute import TransformerCompute, planned_device, transformer_compute
from options.flags_compile import CompileFlags
from options.flags_fpack_generate import FramePackComputeFlags

if TYPE_CHECKING:
    from diffusers import AutoencoderKLHunyuanVideo


@dataclass(frozen=True, kw_only=True)
class Compute(TransformerCompute):
    """See `TransformerCompute`."""

    encoder_dtype: torch.dtype
    """For both text encoders, SigLIP and the VAE."""
    fp8_llm: bool = False
    vae_tile_size: int | None = None
    vae_chunk_size: int | None = None
    bulk_decode: bool = False

    @classmethod
    def from_flags(cls, flags: FramePackComputeFlags, speed: CompileFlags | None = None) -> Compute:
        """bfloat16 transformer and float16 encoders on a GPU, float32 on a CPU, unless `--dit_dtype` says otherwise.

        Raises:
            UserError: a device that torch cannot use.
        """
        settings = transformer_compute(flags, speed)
        return cls(
            **settings,
            encoder_dtype=pick_dtype(None, on_gpu="float16", device=settings["device"]),
            fp8_llm=flags.fp8_llm,
            vae_tile_size=flags.tile_size,
            vae_chunk_size=flags.vae_chunk_size,
            bulk_decode=flags.bulk_decode,
        )

    def planned(self, flags: FramePackComputeFlags) -> Compute:
        """With the types that a GPU would get, on a machine without one, unless `--device` asks for this machine."""
        device = planned_device(flags, self.device)
        return replace(
            self,
            transformer_dtype=pick_dtype(flags.dit_dtype, on_gpu="bfloat16", device=device),
            encoder_dtype=pick_dtype(None, on_gpu="float16", device=device),
        )

    def recorded(self) -> dict[str, object]:
        return super().recorded() | {
            "fp8_llm": self.fp8_llm,
            "vae_spatial_tile_sample_min_size": self.vae_tile_size,
            "vae_chunk_size": self.vae_chunk_size,
            "bulk_decode": self.bulk_decode,
        }

    def load_vae(self, checkpoint: Checkpoint) -> AutoencoderKLHunyuanVideo:
        place = {"dtype": self.encoder_dtype, "device": self.device}
        return hunyuan_vae.load_vae(checkpoint, chunk_size=self.vae_chunk_size, tile_size=self.vae_tile_size, **place)
