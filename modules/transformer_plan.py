"""What a transformer takes on a device: its weights, counted in a model without any, and its work, as it counts itself.

What a plan can do about both is here, too, where it is the same for every model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn

from modules.block_swap import SwapOptions, device_bytes
from modules.fp8 import Fp8Linear
from modules.plan import Change, Flops, Rung
from modules.swapping import FLAG, SwapLimits, SwapWish
from options.errors import UserError
from options.fp8 import Fp8Mode

# ---- its work ----


@dataclass(frozen=True, kw_only=True)
class Work:
    """How a transformer computes, as far as its memory depends on it."""

    itemsize: int
    """Bytes of a number that it computes with."""
    batch: int = 1
    num_steps: int = 1
    """That are prepared together."""
    num_prepared: int = 1
    """2 with classifier-free guidance."""
    unpacked: int = 0
    """Bytes of the largest weight that is made whole from fp8 while its layer computes."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Which blocks keep what for the backward pass."""

    checkpointed: frozenset[int] = frozenset()
    """Numbers of those that keep their inputs only."""
    in_ram: bool = False
    """Whether these inputs wait in RAM."""


class Costs(Protocol):
    """What a model counts of itself, for samples of one size."""

    @property
    def num_blocks(self) -> int: ...

    def by_group(self) -> Mapping[str, int]:
        """Tokens of a sample, in the order and with the names of a report."""

    def step_flops(self, *, batch: int = 1) -> Flops:
        """Of one step."""

    def prepare_flops(self, *, num_steps: int = 1, batch: int = 1) -> Flops:
        """Of everything that is done once for all steps."""

    def prepared_bytes(self, work: Work) -> int:
        """What is ready for all steps."""

    def prepare_bytes(self, work: Work) -> int:
        """Of preparing, at its worst moment."""

    def step_bytes(self, work: Work) -> int:
        """What one step allocates on top of what is prepared, without gradients."""

    def kept_bytes(self, work: Work, kept: Kept) -> int:
        """What a forward pass keeps for the backward pass when every linear layer of the blocks has an adapter."""

    def backward_bytes(self, work: Work, kept: Kept) -> int:
        """What the backward pass takes at its worst moment beside what is kept."""

    def num_rows(self, path: str) -> int:
        """How many rows of a sample go through the layer of this path."""


# ---- its weights ----


@dataclass(frozen=True, kw_only=True)
class Placed:
    """Bytes of a transformer's weights on the device."""

    stays: int
    block_slots: int
    """Room for swapped blocks."""
    prepare_slots: int
    """Room for what only `prepare` needs; it is given back afterwards."""


class EmptyTransformers:
    """A transformer without weights, as it will be with fp8 or without.

    Args:
        build: makes it for a mode, a `Swappable` on the meta device; raises UserError where its file cannot be used so.
        dtype: that it is going to compute in.
        float32: names of tensors that are kept in float32 all the same.
    """

    def __init__(
        self,
        build: Callable[[Fp8Mode], nn.Module],
        *,
        limits: SwapLimits,
        dtype: torch.dtype,
        float32: re.Pattern[str] | None = None,
    ) -> None:
        self.limits, self.dtype = limits, dtype
        self._build, self._float32 = build, float32
        self._built: dict[Fp8Mode, nn.Module] = {}
        self._placed: dict[tuple[Fp8Mode, SwapOptions], Placed] = {}

    def __getitem__(self, fp8: Fp8Mode) -> nn.Module:
        """Raises UserError where the file cannot be used with this mode."""
        if fp8 not in self._built:
            self._built[fp8] = self._build(fp8)
        return self._built[fp8]

    def accepts(self, fp8: Fp8Mode) -> bool:
        try:
            self[fp8]
        except UserError:
            return False
        return True

    def placed(self, fp8: Fp8Mode, swap: SwapOptions) -> Placed:
        """Where its weights are."""
        if (fp8, swap) not in self._placed:
            blocks_only = replace(swap, invariant="none")
            stays = self._size(fp8, replace(swap, ring_size=0))
            block_slots = self._size(fp8, blocks_only) - self._size(fp8, replace(blocks_only, ring_size=0))
            prepare_slots = self._size(fp8, swap) - stays - block_slots
            placed = Placed(stays=stays, block_slots=block_slots, prepare_slots=prepare_slots)
            self._placed[fp8, swap] = placed
        return self._placed[fp8, swap]

    def _size(self, fp8: Fp8Mode, swap: SwapOptions) -> int:
        return device_bytes(self[fp8], swap, self.dtype, self._float32)

    def unpacked(self, fp8: Fp8Mode) -> int:
        """Bytes of the largest weight in fp8 while it is made whole: in the type of its scales, then in its own."""
        layers = [layer for layer in self[fp8].modules() if isinstance(layer, Fp8Linear)]
        return max((self._whole(layer) for layer in layers), default=0)

    def _whole(self, layer: Fp8Linear) -> int:
        scale = layer.scale_weight
        between = 0 if scale is None or scale.dtype == self.dtype else scale.dtype.itemsize
        return layer.weight.numel() * (self.dtype.itemsize + between)


# ---- what can be done ----


def fp8_rung(transformers: EmptyTransformers, fp8: Fp8Mode) -> Rung:
    """For options that have an `fp8`, where it is not chosen yet and the file can be used so."""
    if fp8 != "off" or not transformers.accepts("scaled"):
        return []
    return [Change(flag="--fp8_scaled", apply=lambda o: replace(o, fp8="scaled"))]


def swap_rung(wish: SwapWish, limits: SwapLimits, num_blocks: int) -> Rung:
    """More and more blocks in RAM, for options that have a `num_blocks`."""
    is_auto = wish.blocks.is_auto

    def change(number: int) -> Change:
        flag = f"{FLAG} auto" if is_auto else f"{FLAG} {number}"
        return Change(flag=flag, apply=lambda o: replace(o, num_blocks=number), is_automatic=is_auto)

    most = limits.most(for_training=wish.for_training)
    return [change(number) for number in range(num_blocks + 1, most + 1)]
