"""What a training step of FramePack will cost: operations, bytes, and which options make it fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from dataset.cached_items import Layout
from frame_pack.cached_context import CLEAN, CLEAN_2X, CLEAN_4X, FEATURES, TARGET
from frame_pack.config import FramePackConfig
from frame_pack.costs import (
    Kept,
    Tokens,
    Work,
    backward_bytes,
    group_tokens,
    kept_bytes,
    num_blocks,
    prepare_flops,
    prepared_bytes,
    step_flops,
)
from frame_pack.model import PATCH
from frame_pack.plan import EmptyTransformers, swap_rung
from frame_pack.swapping import SwapWish, block_counts
from hunyuan_model.text_encoders import MAX_LLAMA_TOKENS
from modules.block_swap import evenly_spaced
from modules.plan import (
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
from options.fp8 import Fp8Mode
from options.geometry import VAE_STRIDE
from options.memory_size import MemorySize

TEXT = "llama_vec"
OF_TEXT = re.compile(r"transformer_blocks\.\d+\.(attn\.(add_.*|to_add_out)|ff_context\..*)")
OF_PICTURES = re.compile(r"transformer_blocks\.\d+\.(attn|ff)\..*")
OF_ALL = re.compile(r"single_transformer_blocks\.\d+\.(attn\..*|proj_mlp|proj_out)")


@dataclass(frozen=True, kw_only=True)
class TrainedBatch:
    """The largest batch of a data set."""

    tokens: Tokens
    """Of one item, with the longest text that there can be."""
    size: int
    """Items."""
    layout: Layout

    @classmethod
    def of(cls, layout: Layout, size: int) -> TrainedBatch:
        shapes = {name: shape for name, shape, _ in layout.stacked}
        _, num_frames, height, width = shapes[TARGET]
        rows, columns = height // PATCH, width // PATCH

        def group(names: tuple[str, str], pool: int) -> int:
            return group_tokens(shapes[names[1]][0], rows, columns, pool) if names[1] in shapes else 0

        tokens = Tokens(
            target=num_frames * rows * columns,
            clean=group(CLEAN, 1),
            clean_2x=group(CLEAN_2X, 2),
            clean_4x=group(CLEAN_4X, 4),
            image=shapes[FEATURES][0],
            text=min(shapes[TEXT][0], MAX_LLAMA_TOKENS),
        )
        return cls(tokens=tokens, size=size, layout=layout)

    @property
    def num_tokens(self) -> int:
        return self.tokens.total * self.size


@dataclass(frozen=True, kw_only=True)
class TrainedNumbers:
    """What is trained."""

    by_layer: Mapping[str, int]
    """How many numbers the adapter of a layer has, by the layer's dotted path."""
    state_bytes: float
    """Of the optimizer's state, for one number."""

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

    def kept(self, config: FramePackConfig) -> Kept:
        """Swapped blocks are checkpointed in any case."""
        double, single = block_counts(self.num_blocks, config)
        swapped = {*evenly_spaced(double, config.num_double_blocks)}
        swapped |= {config.num_double_blocks + i for i in evenly_spaced(single, config.num_single_blocks)}
        return Kept(checkpointed=frozenset({*range(self.num_checkpointed), *swapped}), in_ram=self.in_ram)


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainingPlan:
    """One data set and one network on one device."""

    transformers: EmptyTransformers
    batch: TrainedBatch
    numbers: TrainedNumbers
    dtype: torch.dtype
    """That the transformer computes in."""
    swap: SwapWish
    options: TrainOptions
    num_steps: int
    """Optimizer steps of the run."""
    batches_per_step: int
    """Of one process."""

    def text(self, size: MemorySize) -> str:
        """The whole report."""
        options = self.options
        plan = RunPlan(
            title=self._title(),
            tokens=self.batch.tokens.by_group(),
            compute=self._compute(),
            stages=self.stages(options),
            notes=self._notes(),
        )
        return report_for(size, plan, options, self.ladder, self.stages)

    # ---- operations ----

    def _compute(self) -> list[tuple[str, Flops]]:
        config, batch = self.transformers.config, self.batch
        recomputed = len(self.options.kept(config).checkpointed) / num_blocks(config)
        blocks = training_flops(step_flops(config, batch.tokens, batch=batch.size), recomputed=recomputed)
        # Three products of a layer's size with each trained matrix: forward, and both gradients.
        adapters = self._adapter_flops().linear * (3 + recomputed)
        prepared = prepare_flops(config, batch.tokens, batch=batch.size)
        one = blocks + prepared + Flops(linear=round(adapters))
        step = one * self.batches_per_step
        steps = [("a step", step), ("in all", step * self.num_steps)]
        return [("a batch", one), *steps] if self.batches_per_step > 1 else steps

    def _adapter_flops(self) -> Flops:
        tokens, total = self.batch.tokens, Flops()
        for path, count in self.numbers.by_layer.items():
            total += linear_flops(_rows(path, tokens) * self.batch.size, count)
        return total

    # ---- bytes ----

    def stages(self, options: TrainOptions) -> list[Stage]:
        """A single one: nothing but the transformer and what is trained is on the device."""
        config, tokens, total = self.transformers.config, self.batch.tokens, self.numbers.total
        swap = self.swap.options(config, options.num_blocks, offload=False)
        placed = self.transformers.placed(options.fp8, swap)
        work, kept = self._work(options.fp8), options.kept(config)
        parts = (
            ("weights", placed.stays),
            ("swap", placed.block_slots + placed.prepare_slots),
            ("network", 4 * total),
            ("gradients", 4 * total),
            ("optimizer", round(self.numbers.state_bytes * total)),
            ("kept", self._kept(options.fp8, kept)),
            ("work", prepared_bytes(config, tokens, work) + backward_bytes(config, tokens, work, kept)),
        )
        return [Stage(name="training", parts=parts)]

    def _work(self, fp8: Fp8Mode) -> Work:
        return Work(itemsize=self.dtype.itemsize, batch=self.batch.size, unpacked=self.transformers.unpacked(fp8))

    def _kept(self, fp8: Fp8Mode, kept: Kept) -> int:
        """Activations, and trained numbers in half precision, which autograd keeps with them."""
        config, is_half = self.transformers.config, self.dtype.itemsize < 4
        share = 1 - len(kept.checkpointed) / num_blocks(config)
        copies = round(share * self.dtype.itemsize * self.numbers.total) if is_half else 0
        return kept_bytes(config, self.batch.tokens, self._work(fp8), kept) + copies

    # ---- what can be done ----

    def ladder(self) -> list[Rung[TrainOptions]]:
        """The cheapest first: what costs time only, then precision, then much time."""
        options, rungs = self.options, []
        total = num_blocks(self.transformers.config)
        rungs.append([_checkpoint(number, total) for number in range(options.num_checkpointed + 1, total + 1)])
        if not options.in_ram:
            flag = "--gradient_checkpointing_cpu_offload"
            rungs.append([Change(flag=flag, apply=lambda o: replace(o, in_ram=True))])
        if options.fp8 == "off" and self.transformers.accepts("scaled"):
            rungs.append([Change(flag="--fp8_scaled", apply=lambda o: replace(o, fp8="scaled"))])
        rungs.append(swap_rung(self.swap, self.transformers.config, options.num_blocks))
        return rungs

    # ---- words ----

    def _title(self) -> str:
        shape = self.batch.layout.shape(TARGET)
        size = f"{shape[3] * VAE_STRIDE}x{shape[2] * VAE_STRIDE}, {_counted(shape[1], 'latent frame')}"
        dtype = str(self.dtype).removeprefix("torch.")
        batch = f"the largest batch: {_counted(self.batch.size, 'item')} of {size}"
        return f"{batch}; {_counted(self.num_steps, 'step')}; transformer in {dtype}"

    def _notes(self) -> list[str]:
        every = Kept(checkpointed=frozenset(range(num_blocks(self.transformers.config))))
        none, all_of_them = (self._kept(self.options.fp8, kept) for kept in (Kept(), every))
        each = f"kept with no block checkpointed: {shown_bytes(none)}, with all: {shown_bytes(all_of_them)}"
        left_out = "not in it: samples, the driver's share, work space of kernels, gaps between allocations"
        return [each, f"{self.numbers.total / 1e6:.1f} million numbers are trained", left_out]


def largest_batch(layouts: tuple[tuple[Layout, int], ...]) -> TrainedBatch:
    """Of all that a data set has."""
    batches = [TrainedBatch.of(layout, size) for layout, size in layouts]
    return max(batches, key=lambda batch: batch.num_tokens)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def _checkpoint(number: int, total: int) -> Change[TrainOptions]:
    flag = "--gradient_checkpointing" if number == total else f"--checkpoint_blocks {number}"
    return Change(flag=flag, apply=lambda o: replace(o, num_checkpointed=number))


def _rows(path: str, tokens: Tokens) -> int:
    """How many rows of one item go through a layer."""
    if OF_ALL.fullmatch(path):
        return tokens.total
    if OF_TEXT.fullmatch(path):
        return tokens.texts
    return tokens.pictures if OF_PICTURES.fullmatch(path) else 1
