"""What a training step of a transformer's network will cost: operations, bytes, and which options make it fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from modules.plan import (
    NOT_COUNTED,
    Change,
    Flops,
    Rung,
    RunPlan,
    Stage,
    linear_flops,
    report_for,
    shown_bytes,
    training_flops,
)
from modules.swapping import SwapLimits, SwapWish
from modules.transformer_plan import Costs, EmptyTransformers, Kept, Work, fp8_rung, swap_rung
from options.flags_train import MemoryFlags
from options.fp8 import Fp8Mode
from options.geometry import VAE_STRIDE
from options.memory_size import MemorySize


@dataclass(frozen=True, kw_only=True)
class TrainedBatch:
    """The largest batch of a data set."""

    costs: Costs
    """Of one item, with the longest text that there can be."""
    size: int
    """Items."""
    latents: tuple[int, ...]
    """(C, F, h, w) of one item's target."""

    @property
    def num_tokens(self) -> int:
        return sum(self.costs.by_group().values()) * self.size

    def __str__(self) -> str:
        _, num_frames, height, width = self.latents
        size = f"{width * VAE_STRIDE}x{height * VAE_STRIDE}, {_counted(num_frames, 'latent frame')}"
        return f"{_counted(self.size, 'item')} of {size}"


@dataclass(frozen=True, kw_only=True)
class TrainedNumbers:
    """What is trained."""

    by_layer: Mapping[str, int]
    """How many numbers the adapter of a layer has, by the layer's dotted path."""
    state_bytes: float
    """Of the optimizer's state, for one number."""

    @classmethod
    def of(cls, adapters: Mapping[str, nn.Module], state_bytes: float) -> TrainedNumbers:
        by_layer = {path: sum(p.numel() for p in adapter.parameters()) for path, adapter in adapters.items()}
        return cls(by_layer=by_layer, state_bytes=state_bytes)

    @property
    def total(self) -> int:
        return sum(self.by_layer.values())


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """What users can choose about a training's memory."""

    fp8: Fp8Mode = "off"
    num_blocks: int = 0
    """Of `--blocks_to_swap`."""
    num_checkpointed: int = 0
    in_ram: bool = False
    """`--gradient_checkpointing_cpu_offload`."""

    @classmethod
    def of(cls, flags: MemoryFlags, *, num_blocks: int) -> TrainOptions:
        """Where `--blocks_to_swap` leaves it open, nothing is swapped.

        Args:
            num_blocks: that the model has.
        """
        return cls(
            fp8=flags.fp8_mode,
            num_blocks=(flags.blocks_to_swap.value or 0) if flags.blocks_to_swap else 0,
            num_checkpointed=flags.num_checkpointed(num_blocks),
            in_ram=flags.gradient_checkpointing_cpu_offload,
        )

    def kept(self, limits: SwapLimits) -> Kept:
        """Swapped blocks are checkpointed in any case."""
        checkpointed = frozenset({*range(self.num_checkpointed), *limits.numbers(self.num_blocks)})
        return Kept(checkpointed=checkpointed, in_ram=self.in_ram)


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingPlan:
    """One data set and one network on one device."""

    transformers: EmptyTransformers
    batch: TrainedBatch
    numbers: TrainedNumbers
    swap: SwapWish
    options: TrainOptions
    num_steps: int = 1
    """Optimizer steps of the run."""
    batches_per_step: int = 1
    """Of one process."""

    def text(self, size: MemorySize) -> str:
        """The whole report."""
        options = self.options
        plan = RunPlan(
            title=self._title(),
            tokens=self.batch.costs.by_group(),
            compute=self._compute(),
            stages=self.stages(options),
            notes=self._notes(),
        )
        return report_for(size, plan, options, self.ladder, self.stages)

    # ---- operations ----

    def _compute(self) -> list[tuple[str, Flops]]:
        batch, kept = self.batch, self.options.kept(self.transformers.limits)
        recomputed = len(kept.checkpointed) / batch.costs.num_blocks
        blocks = training_flops(batch.costs.step_flops(batch=batch.size), recomputed=recomputed)
        # Three products of a layer's size with each trained matrix: forward, and both gradients.
        adapters = self._adapter_flops().linear * (3 + recomputed)
        one = blocks + batch.costs.prepare_flops(batch=batch.size) + Flops(linear=round(adapters))
        step = one * self.batches_per_step
        steps = [("a step", step), ("in all", step * self.num_steps)]
        return [("a batch", one), *steps] if self.batches_per_step > 1 else steps

    def _adapter_flops(self) -> Flops:
        total = Flops()
        for path, count in self.numbers.by_layer.items():
            total += linear_flops(self.batch.costs.num_rows(path) * self.batch.size, count)
        return total

    # ---- bytes ----

    def stages(self, options: TrainOptions) -> list[Stage]:
        """A single one: nothing but the transformer and what is trained is on the device."""
        limits, costs, total = self.transformers.limits, self.batch.costs, self.numbers.total
        swap = self.swap.options(limits, options.num_blocks, offload=False)
        placed = self.transformers.placed(options.fp8, swap)
        work, kept = self._work(options.fp8), options.kept(limits)
        parts = (
            ("weights", placed.stays),
            ("swap", placed.block_slots + placed.prepare_slots),
            ("network", 4 * total),
            ("gradients", 4 * total),
            ("optimizer", round(self.numbers.state_bytes * total)),
            ("kept", self._kept(options.fp8, kept)),
            ("work", costs.prepared_bytes(work) + costs.backward_bytes(work, kept)),
        )
        return [Stage(name="training", parts=parts)]

    def needed(self, num_blocks: int, offload: bool) -> int:
        """What `choose_swap` asks; in training nothing is offloaded."""
        (stage,) = self.stages(replace(self.options, num_blocks=num_blocks))
        return stage.num_bytes

    def _work(self, fp8: Fp8Mode) -> Work:
        itemsize, unpacked = self.transformers.dtype.itemsize, self.transformers.unpacked(fp8)
        return Work(itemsize=itemsize, batch=self.batch.size, unpacked=unpacked)

    def _kept(self, fp8: Fp8Mode, kept: Kept) -> int:
        """Activations, and trained numbers in half precision, which autograd keeps with them."""
        costs, itemsize = self.batch.costs, self.transformers.dtype.itemsize
        share = 1 - len(kept.checkpointed) / costs.num_blocks
        copies = round(share * itemsize * self.numbers.total) if itemsize < 4 else 0
        return costs.kept_bytes(self._work(fp8), kept) + copies

    # ---- what can be done ----

    def ladder(self) -> list[Rung[TrainOptions]]:
        """The cheapest first: what costs time only, then precision, then much time."""
        options, total = self.options, self.batch.costs.num_blocks
        flag = "--gradient_checkpointing_cpu_offload"
        in_ram = Change(flag=flag, apply=lambda o: replace(o, in_ram=True))
        return [
            [_checkpoint(number, total) for number in range(options.num_checkpointed + 1, total + 1)],
            [] if options.in_ram else [in_ram],
            fp8_rung(self.transformers, options.fp8),
            swap_rung(self.swap, self.transformers.limits, options.num_blocks),
        ]

    # ---- words ----

    def _title(self) -> str:
        dtype = str(self.transformers.dtype).removeprefix("torch.")
        return f"the largest batch: {self.batch}; {_counted(self.num_steps, 'step')}; transformer in {dtype}"

    def _notes(self) -> list[str]:
        every = Kept(checkpointed=frozenset(range(self.batch.costs.num_blocks)))
        none, all_of_them = (self._kept(self.options.fp8, kept) for kept in (Kept(), every))
        each = f"kept with no block checkpointed: {shown_bytes(none)}, with all: {shown_bytes(all_of_them)}"
        trained = f"{self.numbers.total / 1e6:.1f} million numbers are trained"
        return [each, trained, f"not in it: samples, {NOT_COUNTED}"]


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _checkpoint(number: int, total: int) -> Change[TrainOptions]:
    flag = "--gradient_checkpointing" if number == total else f"--checkpoint_blocks {number}"
    return Change(flag=flag, apply=lambda o: replace(o, num_checkpointed=number))
