"""What a run will cost, as far as it can be computed: operations, bytes by stage, and what makes them fit.

Nothing here knows an architecture. A model's own module counts its layers and says what its memory options do; this one
has the conventions of counting, the search for options, and the words.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Generic, TypeVar

from options.memory_size import MemorySize

Options = TypeVar("Options")
NOT_COUNTED = "the driver's share, work space of kernels, gaps between allocations"
"""Of a device's memory."""
LINE = 118
"""Characters; longer ones are wrapped."""


# ---- operations ----


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Floating-point operations; one multiplication and one addition are two."""

    linear: int = 0
    """Of products with weights."""
    attention: int = 0
    """Of the two products that attention is."""

    @property
    def total(self) -> int:
        return self.linear + self.attention

    def __add__(self, other: Flops) -> Flops:
        return Flops(linear=self.linear + other.linear, attention=self.attention + other.attention)

    def __mul__(self, times: int) -> Flops:
        return Flops(linear=self.linear * times, attention=self.attention * times)


def linear_flops(num_rows: int, num_weights: int) -> Flops:
    """Of rows that go through layers with so many weights together; biases are not counted."""
    return Flops(linear=2 * num_rows * num_weights)


def attention_flops(num_queries: int, num_keys: int, width: int) -> Flops:
    """Of all heads together, `width` channels wide: q·kᵀ, and the product with v."""
    return Flops(attention=4 * num_queries * num_keys * width)


def training_flops(forward: Flops, *, recomputed: float) -> Flops:
    """Of forward and backward with frozen weights, so that gradients are taken of inputs only.

    Args:
        recomputed: the share of the forward pass that is computed a second time, 0 to 1.

    Source: attention's backward is 2.5 times its forward, as it computes the scores again (FlashAttention 2).
    """
    return Flops(
        linear=round(forward.linear * (2 + recomputed)), attention=round(forward.attention * (3.5 + recomputed))
    )


# ---- bytes ----


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a run, and what is on the device at its worst moment."""

    name: str
    parts: tuple[tuple[str, int], ...]
    """(what, bytes)."""

    @property
    def num_bytes(self) -> int:
        return sum(size for _, size in self.parts)


@dataclass(frozen=True, kw_only=True)
class Change(Generic[Options]):
    """Something that a user may do about memory."""

    flag: str
    """As it is written on a command line."""
    apply: Callable[[Options], Options]
    is_automatic: bool = False
    """Whether the run does it by itself when memory is short."""


Rung = Sequence[Change[Options]]
"""One measure in its degrees, the mildest first: each takes less memory than the one before."""
Stages = Callable[[Options], Sequence[Stage]]


@dataclass(frozen=True, kw_only=True)
class Fit(Generic[Options]):
    """What makes a run fit into a size."""

    changes: tuple[Change[Options], ...]
    too_large: tuple[Stage, ...]
    """Stages that do not fit whatever is done, as they are with all that can be done for them."""


def find_fit(options: Options, ladder: Sequence[Rung[Options]], stages: Stages[Options], limit: int) -> Fit[Options]:
    """The cheapest changes that let every stage fit.

    Each stage climbs the ladder from its foot until it fits; rungs that do nothing for it are passed over, and those
    that turn out not to be needed in the end are left out again.

    Args:
        ladder: what can be done, the cheapest first.
        stages: of a run with certain options.
        limit: bytes.
    """
    search = _Search(options, ladder, stages, limit)
    taken: dict[int, Change[Options]] = {}
    too_large = []
    for name in search.names:
        own = search.climb(name)
        if own is None:
            too_large.append(search.stage(name, {number: rung[-1] for number, rung in enumerate(ladder) if rung}))
            continue
        for number, change in own.items():
            taken[number] = max(change, taken.get(number, change), key=ladder[number].index)
    large = {stage.name for stage in too_large}
    taken = search.settle([name for name in search.names if name not in large], taken)
    return Fit(changes=tuple(taken[number] for number in sorted(taken)), too_large=tuple(too_large))


class _Search(Generic[Options]):
    """Sizes of stages under changes, which are known by the number of their rung."""

    def __init__(self, options: Options, ladder: Sequence[Rung[Options]], stages: Stages[Options], limit: int) -> None:
        self._options, self._ladder, self._stages, self._limit = options, ladder, stages, limit
        self._known: dict[tuple[int, ...], Mapping[str, Stage]] = {}
        self.names = list(self._all({}))

    def _all(self, changes: Mapping[int, Change[Options]]) -> Mapping[str, Stage]:
        key = tuple(id(changes.get(number)) for number in range(len(self._ladder)))
        if key not in self._known:
            options = self._options
            for number in sorted(changes):
                options = changes[number].apply(options)
            self._known[key] = {stage.name: stage for stage in self._stages(options)}
        return self._known[key]

    def stage(self, name: str, changes: Mapping[int, Change[Options]]) -> Stage:
        return self._all(changes)[name]

    def _fit(self, names: Sequence[str], changes: Mapping[int, Change[Options]]) -> bool:
        return all(self.stage(name, changes).num_bytes <= self._limit for name in names)

    def _mildest(
        self, names: Sequence[str], changes: Mapping[int, Change[Options]], number: int
    ) -> dict[int, Change[Options]]:
        """With as little of a rung as lets the stages fit, or all of it."""
        rung = self._ladder[number]
        place = bisect_left(range(len(rung)), True, key=lambda i: self._fit(names, {**changes, number: rung[i]}))
        return {**changes, number: rung[min(place, len(rung) - 1)]}

    def climb(self, name: str) -> dict[int, Change[Options]] | None:
        """What a stage needs, and perhaps more; None when all of it is not enough."""
        changes: dict[int, Change[Options]] = {}
        for number, rung in enumerate(self._ladder):
            if self._fit([name], changes):
                break
            if rung and self._gain(name, changes, number) > 0:
                changes = self._mildest([name], changes, number)
        return changes if self._fit([name], changes) else None

    def _gain(self, name: str, changes: Mapping[int, Change[Options]], number: int) -> int:
        """Bytes that all of a rung saves."""
        most = {**changes, number: self._ladder[number][-1]}
        return self.stage(name, changes).num_bytes - self.stage(name, most).num_bytes

    def settle(self, names: Sequence[str], changes: dict[int, Change[Options]]) -> dict[int, Change[Options]]:
        """Without what stages that fit do not need after all, the dearest first."""
        for number in sorted(changes, reverse=True):
            without = {other: change for other, change in changes.items() if other != number}
            milder = without if self._fit(names, without) else self._mildest(names, without, number)
            changes = milder if self._fit(names, milder) else changes
        return changes


# ---- words ----


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """Everything that is computed about a run."""

    title: str
    """What is planned."""
    tokens: Mapping[str, int]
    """By group."""
    compute: Sequence[tuple[str, Flops]]
    """(what, operations)."""
    stages: Sequence[Stage]
    notes: Sequence[str] = ()


def report_for(
    size: MemorySize,
    plan: RunPlan,
    options: Options,
    ladder: Callable[[], Sequence[Rung[Options]]],
    stages: Stages[Options],
) -> str:
    """The report, with what makes the run fit where a size was asked about."""
    if size.num_bytes is None:
        return report(plan)
    fit = find_fit(options, ladder(), stages, size.num_bytes)
    for change in fit.changes:
        options = change.apply(options)
    return report(plan, verdict_on(fit, stages(options), str(size)))


def report(plan: RunPlan, verdict: Sequence[str] = ()) -> str:
    """One screen of text.

    Args:
        verdict: of `verdict_on`, for a size that was asked about.
    """
    groups = ", ".join(f"{name} {count}" for name, count in plan.tokens.items())
    lines = ["plan (computed from the models' headers, not measured)", f"  {plan.title}"]
    lines += ["tokens", f"  {sum(plan.tokens.values())}: {groups}", "operations"]
    width = max(len(name) for name, _ in plan.compute)
    for name, flops in plan.compute:
        parts = [("linear", flops.linear), ("attention", flops.attention)]
        shown = " + ".join(f"{what} {shown_flops(count)}" for what, count in parts if count)
        lines.append(f"  {name:<{width}}  {shown_flops(flops.total):>12} = {shown}")
    lines.append("memory of the device")
    width = max(len(stage.name) for stage in plan.stages)
    most = max(plan.stages, key=lambda stage: stage.num_bytes)
    for stage in plan.stages:
        parts = " + ".join(f"{what} {shown_bytes(size)}" for what, size in stage.parts if size)
        text = f"  {stage.name:<{width}}  {shown_bytes(stage.num_bytes):>8} = {parts}"
        lines += wrap(text, LINE, subsequent_indent=" " * (width + 15), break_on_hyphens=False)
    lines.append(f"  at most {shown_bytes(most.num_bytes)}, in {most.name}")
    lines += [f"  {note}" for note in plan.notes]
    return "\n".join([*lines, *verdict])


def verdict_on(fit: Fit, stages: Sequence[Stage], size: str) -> list[str]:
    """Whether it fits, and what to do.

    Args:
        stages: with the changes of `fit`.
        size: as the user wrote it.
    """
    own = " ".join(change.flag for change in fit.changes if not change.is_automatic)
    automatic = [f"  {change.flag} takes effect by itself" for change in fit.changes if change.is_automatic]
    if fit.too_large:
        lines = [
            f"  does not fit: {stage.name}, which takes {shown_bytes(stage.num_bytes)} whatever options are given"
            for stage in fit.too_large
        ]
        rest = len(stages) > len(fit.too_large)
        return [
            f"in {size}",
            *lines,
            *([f"  the rest fits{f' with {own}' if own else ''}", *automatic] if rest else []),
        ]
    most = max(stages, key=lambda stage: stage.num_bytes)
    at_most = f"at most {shown_bytes(most.num_bytes)}, in {most.name}"
    return [f"in {size}", f"  fits{f' with {own}' if own else ''}: {at_most}", *automatic]


def shown_bytes(size: int) -> str:
    """Decimal: 1 GB is 10⁹ bytes."""
    return f"{size / 1e9:.2f} GB" if size >= 10**8 else f"{size / 1e6:.1f} MB"


def shown_flops(count: int) -> str:
    if count >= 10**16:
        return f"{count / 1e15:.1f} PFLOP"
    return f"{count / 1e12:.1f} TFLOP" if count >= 10**11 else f"{count / 1e9:.1f} GFLOP"
