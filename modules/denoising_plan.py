"""What the transformer's part of a generation will cost: operations, bytes, and what can be done about them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from modules.plan import Change, Flops, Rung, Stage
from modules.swapping import SwapWish
from modules.transformer_plan import Costs, EmptyTransformers, Work, fp8_rung, swap_rung
from options.fp8 import Fp8Mode


@dataclass(frozen=True, kw_only=True)
class TransformerOptions:
    """What users can choose about the transformer's memory."""

    fp8: Fp8Mode = "off"
    num_blocks: int = 0
    """Of `--blocks_to_swap`."""
    offload: bool = False
    """`--offload_invariant always`."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Denoising:
    """A series of steps on one device."""

    transformers: EmptyTransformers
    costs: Costs
    swap: SwapWish
    """What the flags say about swapping."""
    num_steps: int
    num_passes: int = 1
    """Of a step; 2 with classifier-free guidance."""
    joins_passes: bool = False
    """Whether a step's passes are one of a larger batch."""
    lora_bytes: int = 0
    """Of the prompt's own LoRAs."""

    # ---- operations ----

    @property
    def step_flops(self) -> Flops:
        """Of all passes."""
        return self.costs.step_flops() * self.num_passes

    @property
    def once_flops(self) -> Flops:
        """Of preparing all steps."""
        return self.costs.prepare_flops(num_steps=self.num_steps) * self.num_passes

    # ---- bytes ----

    def stages(self, options: TransformerOptions) -> list[Stage]:
        """Those that need the transformer."""
        swap = self.swap.options(self.transformers.limits, options.num_blocks, offload=options.offload)
        placed, costs = self.transformers.placed(options.fp8, swap), self.costs
        batch = self.num_passes if self.joins_passes else 1
        work = Work(
            itemsize=self.transformers.dtype.itemsize,
            batch=batch,
            num_steps=self.num_steps,
            num_prepared=self.num_passes // batch,
            unpacked=self.transformers.unpacked(options.fp8),
        )
        weights = (("weights", placed.stays), ("swap", placed.block_slots), ("LoRAs", self.lora_bytes))
        preparing = (("its own weights", placed.prepare_slots), ("work", costs.prepare_bytes(work)))
        stepping = (("prepared", costs.prepared_bytes(work)), ("work", costs.step_bytes(work)))
        return [
            Stage(name="preparing", parts=(*weights, *preparing)),
            Stage(name="denoising", parts=(*weights, *stepping)),
        ]

    def needed(self, options: TransformerOptions, num_blocks: int, offload: bool) -> int:
        """What `choose_swap` asks."""
        stages = self.stages(replace(options, num_blocks=num_blocks, offload=offload))
        return max(stage.num_bytes for stage in stages)

    # ---- what can be done ----

    def offload_rung(self, options: TransformerOptions) -> Rung:
        """What only `prepare` needs in RAM, where it is not there yet."""
        if options.offload:
            return []
        is_automatic = self.swap.offload_invariant == "auto"
        flag = f"--offload_invariant {'auto' if is_automatic else 'always'}"
        return [Change(flag=flag, apply=lambda o: replace(o, offload=True), is_automatic=is_automatic)]

    def fp8_rung(self, options: TransformerOptions) -> Rung:
        return fp8_rung(self.transformers, options.fp8)

    def swap_rung(self, options: TransformerOptions) -> Rung:
        return swap_rung(self.swap, self.transformers.limits, options.num_blocks)
