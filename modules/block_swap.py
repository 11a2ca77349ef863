"""Which weights of a transformer lie in RAM, and how its blocks and what prepares them get at these.

Swapped blocks stand evenly spaced between those that stay, so that there is something to compute while the next one's
weights are copied. Their linear layers come and go; norms, biases and embeddings, which are small, stay. One step of
sampling follows the other, so after the last swapped block comes the first. In training the way leads back: autograd
meets the blocks in reverse order, and computes each one again (`modules/checkpointing`), so that recomputation and
gradients of a block are over before the next one is asked for.

Layers that work only while a prompt is prepared, once for all steps, are called through a ring of their own, which
takes no memory in between.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal, ParamSpec, Protocol, TypeVar

import torch
from torch import Tensor, nn

from modules.weight_ring import Copies, PlainCopies, Ring, StreamCopies, Unit

P, R = ParamSpec("P"), TypeVar("R")
Invariant = Literal["none", "of swapped blocks", "with their blocks", "all"]
SCALE = "scale_weight"
"""What an fp8 layer calls the scales of its weight."""


@dataclass(frozen=True, kw_only=True)
class SwapOptions:
    """What lies in RAM."""

    counts: tuple[int, ...]
    """How many blocks are swapped of each of the model's lists of blocks."""
    invariant: Invariant = "none"
    """Which of the layers that only `prepare` calls. `with their blocks`: as `of swapped blocks`, for training where
    the blocks call them instead."""
    pinned: bool = False
    """RAM from which a GPU fetches by itself; else weights pass through two buffers of such RAM."""
    ring_size: int = 2
    """Slots on the device: the unit that is computed with, and those that are on their way."""

    @property
    def num_blocks(self) -> int:
        return sum(self.counts)

    def __bool__(self) -> bool:
        """Whether anything is swapped."""
        return self.num_blocks > 0 or self.invariant == "all"


class Swappable(Protocol):
    """What a transformer tells about itself, and what it gets."""

    swapping: Swapping

    @property
    def block_lists(self) -> Sequence[nn.ModuleList]:
        """In the order of a step."""

    @property
    def prepare_layers(self) -> Sequence[nn.Module]:
        """Those that `prepare` calls and `step` does not, in the order in which they are called; the large ones."""


class Berth:
    """A swapped block's place in the ring."""

    def __init__(self, ring: Ring, rank: int) -> None:
        self._ring, self._rank, self._last = ring, rank, len(ring.units)

    def around(self, block: Callable[P, R]) -> Callable[P, R]:
        """`block`, with its weights at hand while it is called; the next step follows."""

        def call(*arguments: P.args, **rest: P.kwargs) -> R:
            with self._ring.using(self._rank, [*self._later, *self._earlier]):
                return block(*arguments, **rest)

        return call

    def brings(self, layer: nn.Module) -> bool:
        """Whether the layer's weights come and go with the block."""
        return self._ring.units[self._rank].holds(layer)

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For a checkpoint: around the block's forward, and around its recomputation.

        The second one leaves the weights where they are: the block's gradients are still to come. They are over when
        another unit is asked for, as autograd goes strictly backwards through what was computed last.
        """
        back = reversed(range(self._last))
        return self._ring.using(self._rank, [*self._later, *back]), self._backwards()

    @contextmanager
    def _backwards(self) -> Iterator[None]:
        self._ring.hold(self._rank, [*reversed(self._earlier), *range(self._last)])
        yield

    @property
    def _later(self) -> range:
        return range(self._rank + 1, self._last)

    @property
    def _earlier(self) -> range:
        return range(self._rank)


class Swapping:
    """What of a model lies in RAM; nothing of most models.

    Args:
        blocks: (number in the model, unit) of the swapped ones.
        prepare: (layer, unit), in the order in which they are called. The layers get hooks.
    """

    def __init__(
        self,
        blocks: Sequence[tuple[int, Unit]] = (),
        prepare: Sequence[tuple[nn.Module, Unit]] = (),
        *,
        ring_size: int = 2,
        copies: Copies | None = None,
    ) -> None:
        self._units = [unit for _, unit in (*blocks, *prepare)]
        self.rings: list[Ring] = []
        self._berths: dict[int, Berth] = {}
        if blocks:
            ring = self._ring(blocks, ring_size, copies)
            self._berths = {number: Berth(ring, rank) for rank, (number, _) in enumerate(blocks)}
        if prepare:
            _hook(self._ring(prepare, ring_size, copies), [layer for layer, _ in prepare])

    def _ring(self, pairs: Sequence[tuple[object, Unit]], ring_size: int, copies: Copies | None) -> Ring:
        ring = Ring([unit for _, unit in pairs], ring_size, copies or PlainCopies())
        self.rings.append(ring)
        return ring

    def berth(self, number: int) -> Berth | None:
        """That of the model's block of this number; None for one that stays."""
        return self._berths.get(number)

    def brings(self, number: int, layer: nn.Module) -> bool:
        """Whether the block of this number is swapped, and has the layer's weights only while it is called."""
        berth = self.berth(number)
        return berth is not None and berth.brings(layer)

    @property
    def num_blocks(self) -> int:
        return len(self._berths)

    @property
    def ram_bytes(self) -> int:
        """Of all masters."""
        return sum(unit.num_bytes for unit in self._units)

    @property
    def device_bytes(self) -> int:
        """Of all slots, at this moment."""
        return sum(ring.num_bytes for ring in self.rings)

    @contextmanager
    def staying(self) -> Iterator[None]:
        """The model can be moved within: what lies in RAM stays there, and the slots are given up."""
        for ring in self.rings:
            ring.close()
        for unit in self._units:
            unit.hide()
        try:
            yield
        finally:
            for unit in self._units:
                unit.to_master()


def attach(transformer: Swappable, options: SwapOptions, device: torch.device, *, copies: Copies | None = None) -> None:
    """Moves the weights that `options` names into RAM, wherever they are, and lets the transformer swap from now on.

    Args:
        transformer: loaded and frozen, not swapped yet.
        device: where the rest of it is.
        copies: how weights get to the device; None: as the device has it.
    """
    on_gpu = device.type == "cuda"
    if copies is None:
        num_staging = 0 if options.pinned else options.ring_size
        copies = StreamCopies(device, num_staging=num_staging) if on_gpu else PlainCopies(device)
    pinned = options.pinned and on_gpu
    blocks, prepare = swapped_layers(transformer, options)
    transformer.swapping = Swapping(
        [(number, Unit(_weights(layers), pinned=pinned)) for number, layers in blocks],
        [(layer, Unit(_weights(_linears(layer)), pinned=pinned)) for layer in prepare],
        ring_size=options.ring_size,
        copies=copies,
    )


def swapped_layers(
    transformer: Swappable, options: SwapOptions
) -> tuple[list[tuple[int, list[nn.Linear]]], list[nn.Module]]:
    """(number of the block, its linear layers that come and go) for each swapped block; and what of `prepare` does."""
    prepare_layers = [] if options.invariant == "with their blocks" else list(transformer.prepare_layers)
    elsewhere = {linear for layer in prepare_layers for linear in _linears(layer)}
    every = [block for blocks in transformer.block_lists for block in blocks]
    numbers = swapped_numbers(options.counts, [len(blocks) for blocks in transformer.block_lists])
    swapped = [(number, every[number]) for number in numbers]
    own = [(number, [linear for linear in _linears(block) if linear not in elsewhere]) for number, block in swapped]
    if options.invariant == "all":
        return own, prepare_layers
    of_swapped = {module for _, block in swapped for module in block.modules()}
    of_swapped = of_swapped if options.invariant == "of swapped blocks" else set()
    return own, [layer for layer in prepare_layers if layer in of_swapped]


def swapped_names(transformer: Swappable, options: SwapOptions) -> frozenset[str]:
    """The state dict's names of what will lie in RAM. The transformer may be on the meta device."""
    blocks, prepare = swapped_layers(transformer, options)
    layers = {linear for _, linears in blocks for linear in linears}
    layers |= {linear for layer in prepare for linear in _linears(layer)}
    named = ((path, layer) for path, layer in transformer.named_modules() if layer in layers)
    return frozenset(f"{path}.{name}" for path, layer in named for _, name in _weights([layer]))


def device_bytes(
    transformer: Swappable, options: SwapOptions, dtype: torch.dtype, float32: re.Pattern[str] | None = None
) -> int:
    """Of weights and slots, when the transformer, which may be on the meta device, is loaded so.

    Args:
        dtype: of what is not stored in 8 bits.
        float32: names of what is float32 instead; none of it comes and goes.
    """

    def size(name: str, tensor: Tensor) -> int:
        if tensor.dtype.itemsize == 1 or name.endswith(SCALE):
            return tensor.numel() * tensor.dtype.itemsize
        is_float32 = float32 is not None and float32.fullmatch(name)
        return tensor.numel() * (torch.float32 if is_float32 else dtype).itemsize

    def slots(units: Iterable[Iterable[nn.Linear]]) -> int:
        units = [sum(size(name, getattr(layer, name)) for layer, name in _weights(unit)) for unit in units]
        return min(options.ring_size, len(units)) * max(units, default=0)

    in_ram = swapped_names(transformer, options)
    stays = sum(size(name, tensor) for name, tensor in transformer.state_dict().items() if name not in in_ram)
    blocks, prepare = swapped_layers(transformer, options)
    return stays + slots(layers for _, layers in blocks) + slots(_linears(layer) for layer in prepare)


def swapped_numbers(counts: Iterable[int], lengths: Iterable[int]) -> list[int]:
    """Which of a model's blocks are swapped, numbered through its lists.

    Args:
        counts: how many of each list.
        lengths: of the lists.
    """
    found, first = [], 0
    for count, length in zip(counts, lengths, strict=True):
        found += [first + index for index in evenly_spaced(count, length)]
        first += length
    return found


def evenly_spaced(count: int, total: int) -> list[int]:
    """`count` of the numbers 0 … `total` - 1. Source: the facts about block swap, ⌊(2i + 1)·total / (2·count)⌋."""
    return [(2 * i + 1) * total // (2 * count) for i in range(count)]


def _linears(module: nn.Module) -> list[nn.Linear]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear)]


def _weights(layers: Iterable[nn.Linear]) -> Iterator[tuple[nn.Module, str]]:
    for layer in layers:
        yield layer, "weight"
        if isinstance(getattr(layer, SCALE, None), Tensor):
            yield layer, SCALE


def _hook(ring: Ring, layers: Sequence[nn.Module]) -> None:
    """Lets calls of the layers go through the ring, which gives its slots up after the last one."""

    def enter(rank: int, layer: nn.Module, arguments: tuple) -> None:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in arguments):
            # Autograd would keep the weight, and find another layer's in its place.
            raise RuntimeError(f"{type(layer).__name__} {rank} is swapped: it cannot pass gradients to its input")
        uses[rank].enter_context(ring.using(rank, range(rank + 1, len(layers))))

    def leave(rank: int) -> None:
        uses[rank].close()
        if rank == len(layers) - 1:
            ring.close()

    uses = [ExitStack() for _ in layers]
    for rank, layer in enumerate(layers):
        layer.register_forward_pre_hook(lambda layer, arguments, rank=rank: enter(rank, layer, arguments))
        layer.register_forward_hook(lambda *_, rank=rank: leave(rank), always_call=True)
