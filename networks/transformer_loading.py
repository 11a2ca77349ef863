"""A transformer from its file: built from the header, then filled weight by weight, LoRAs and 8 bits on the way."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import nn

from common.weights import Checkpoint, check_names_and_shapes, empty_model, fill
from modules.block_swap import SwapOptions, attach, swapped_names
from modules.fp8_weights import Fp8Plan, check_mode, expect_codes, plan_fp8
from networks.lora_merge import LoraMerge, quantise_into_file
from options.fp8 import Fp8Mode
from options.lora import LoraChoice

Config = TypeVar("Config")
Transformer = TypeVar("Transformer", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class TransformerLoader(Generic[Config, Transformer]):
    """What one family's transformers have in common. Checkpoints come with the model's own names."""

    config: Callable[[Checkpoint], Config]
    """Sizes from the header."""
    model: Callable[[Config], Transformer]
    fp8_layers: re.Pattern[str]
    """Paths of the linear layers that fp8 is for."""
    float32: re.Pattern[str] | None = None
    """Names of tensors that are kept in float32, whatever the model computes in; small ones."""

    def build(self, checkpoint: Checkpoint, *, fp8: Fp8Mode = "off", merge: LoraMerge | None = None) -> Transformer:
        """The transformer without its weights, with the sizes in the header and the layers that it is going to have.

        Raises:
            UserError: as `check_names_and_shapes`, or the file cannot be used with this `fp8`.
        """
        transformer, plan = self._planned(checkpoint, fp8, merge)
        plan.apply_to(transformer)
        return transformer

    def load(
        self,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        merge: LoraMerge | None = None,
        fp8: Fp8Mode = "off",
        swap: SwapOptions | None = None,
    ) -> Transformer:
        """Builds the transformer and fills it strictly. On the way LoRAs are merged and weights are quantised, one by
        one.

        Args:
            dtype: that it computes in; weights in fp8 keep theirs.
            fp8: what becomes of 16-bit weights; those that are in fp8 in the file stay so in any case.
            swap: which blocks' weights live in RAM and come to the device in turn.

        Raises:
            UserError: as `build`.
        """
        transformer, plan = self._planned(checkpoint, fp8, merge)
        plan.apply_to(transformer)
        in_ram = swapped_names(transformer, swap) if swap else frozenset()
        with merge.reading(device) if merge else nullcontext(None) as change:
            tensors = plan.read(dtype=dtype, float32=self.float32, device=device, change=change)
            fill(transformer, checkpoint, tensors, lambda name: "cpu" if name in in_ram else device)
        if swap:
            attach(transformer, swap, torch.device(device))
        return transformer

    def save_fp8(
        self,
        checkpoint: Checkpoint,
        choices: Sequence[LoraChoice],
        output: str | Path,
        *,
        mode: Fp8Mode,
        device: torch.device | str,
        flag: str,
    ) -> None:
        """Writes the transformer with its LoRAs in fp8, a file that loads as `--dit`; see `quantise_into_file`."""
        transformer, _ = self._planned(checkpoint, "off", None)
        how = {"mode": mode, "layers": self.fp8_layers, "device": device, "flag": flag}
        quantise_into_file(transformer, checkpoint, choices, output, **how)

    def _planned(self, checkpoint: Checkpoint, fp8: Fp8Mode, merge: LoraMerge | None) -> tuple[Transformer, Fp8Plan]:
        transformer = empty_model(checkpoint, partial(self.model, self.config(checkpoint)))
        expect_codes(transformer, checkpoint)
        check_names_and_shapes(transformer, checkpoint)
        check_mode(checkpoint, fp8, self.fp8_layers)
        merged = merge.weights if merge else ()
        return transformer, plan_fp8(transformer, checkpoint, mode=fp8, layers=self.fp8_layers, merged=merged)
