"""Where and in which types a family's transformer runs, as flags ask for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from common.device import pick_device, pick_dtype
from modules.attention import AttentionOptions
from modules.execution import Execution
from modules.swapping import SwapWish
from options.flags_compile import CompileFlags
from options.flags_generate import ComputeFlags
from options.fp8 import Fp8Mode


@dataclass(frozen=True, kw_only=True)
class TransformerCompute:
    """What both families have; each adds its encoders and its VAE."""

    device: torch.device
    transformer_dtype: torch.dtype
    fp8: Fp8Mode = "off"
    """What becomes of the transformer's weights."""
    swap: SwapWish = SwapWish()
    """What of the transformer lies in RAM."""
    execution: Execution = Execution()
    """How the transformer's blocks are run."""

    def check_execution(self) -> None:
        """Raises UserError where the transformer's blocks cannot be run as they are asked to be."""
        self.execution.check(device=self.device, dtype=self.transformer_dtype)

    def recorded(self) -> dict[str, object]:
        """What changes the bits of a result, as JSON values under the names of flags."""
        return {
            "device": self.device.type,
            "dit_dtype": dtype_name(self.transformer_dtype),
            "attn_mode": self.execution.attention.backend,
            "compile": self.execution.compiling is not None,
            "fp8": self.fp8 == "plain",
            "fp8_scaled": self.fp8 == "scaled",
        }


def transformer_compute(flags: ComputeFlags, speed: CompileFlags | None = None) -> dict[str, Any]:
    """The fields of `TransformerCompute`: bfloat16 on a GPU, float32 on a CPU, unless `--dit_dtype` says otherwise.

    Raises:
        UserError: a device that torch cannot use.
    """
    device = pick_device(flags.device)
    return {
        "device": device,
        "transformer_dtype": pick_dtype(flags.dit_dtype, on_gpu="bfloat16", device=device),
        "fp8": flags.fp8_mode,
        "swap": SwapWish(
            blocks=flags.blocks_to_swap,
            offload_invariant=flags.offload_invariant,
            pinned=flags.use_pinned_memory_for_block_swap,
        ),
        "execution": Execution(
            attention=AttentionOptions(backend=flags.attention), compiling=speed.choice if speed else None
        ),
    }


def planned_device(flags: ComputeFlags, device: torch.device) -> torch.device:
    """Whose number types a plan is made with: a GPU's on a machine without one, unless `--device` asks for this one."""
    return device if flags.device is not None or device.type != "cpu" else torch.device("cuda")


def dtype_name(dtype: torch.dtype) -> str:
    """`bfloat16`"""
    return str(dtype).removeprefix("torch.")
