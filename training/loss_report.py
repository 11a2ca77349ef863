"""What the loss was, by timestep and over time: collected while training, in constant memory, and drawn at the end."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from common.files import atomic_file
from common.plots import BLUE, GREEN, PALE_BLUE, Bars, Chart, Dots, Line, draw_chart, stacked
from modules.flow_matching import NUM_TIMESTEPS

NUM_BUCKETS = 20
MAX_POINTS = 1000
AVERAGED_SHARE, MIN_AVERAGED = 0.05, 10
"""The moving average goes over this share of a curve's points, but over so many at least."""
SPIKE_QUANTILE, SPIKE_FACTOR = 0.95, 2.5
"""The chart ends at so many times this quantile: rarer, higher points would press everything else flat."""


@dataclass
class Mean:
    """The mean of numbers that come one by one."""

    total: float = 0.0
    count: int = 0

    def add(self, total: float, count: int = 1) -> None:
        self.total += total
        self.count += count

    @property
    def value(self) -> float:
        """NaN when there were none."""
        return self.total / self.count if self.count else math.nan


@dataclass
class Curve:
    """Values over steps, as at most `MAX_POINTS` means of neighbours.

    When there are too many, twice as many steps share a point: so what is kept depends on what was added and not on
    when it was saved, loaded or merged.
    """

    stride: int = 1
    """Steps that share a point: 1, 2, 4, ..."""
    points: dict[int, Mean] = field(default_factory=dict)
    """By step // stride."""

    def add(self, step: int, total: float, count: int = 1) -> None:
        """Adds `count` values of a step."""
        self.points.setdefault(step // self.stride, Mean()).add(total, count)
        while len(self.points) > MAX_POINTS:
            self._coarsen()

    def merge(self, other: Curve) -> None:
        while self.stride < other.stride:
            self._coarsen()
        for place, mean in other.points.items():
            self.add(place * other.stride, mean.total, mean.count)

    def _coarsen(self) -> None:
        self.stride *= 2
        finer, self.points = self.points, {}
        for place, mean in finer.items():
            self.points.setdefault(place // 2, Mean()).add(mean.total, mean.count)

    def means(self) -> list[tuple[float, float]]:
        """(step, mean value) in order; the step is the middle of those that share the point."""
        return [
            (place * self.stride + (self.stride - 1) / 2, self.points[place].value) for place in sorted(self.points)
        ]

    def averages(self, num_points: int) -> list[tuple[float, float]]:
        """(step, mean of the last `num_points` points up to it)."""
        places = sorted(self.points)
        found = []
        for number, (step, _) in enumerate(self.means()):
            mean = Mean()
            for place in places[max(0, number + 1 - num_points) : number + 1]:
                mean.add(self.points[place].total, self.points[place].count)
            found.append((step, mean.value))
        return found


class LossReport:
    """Losses of samples: sums for each of 20 equal timestep buckets, and curves over steps."""

    def __init__(self) -> None:
        self._buckets = [Mean() for _ in range(NUM_BUCKETS)]
        self._training, self._validation = Curve(), Curve()
        self._num_skipped = 0

    def add(self, step: int, sigmas: Sequence[float], losses: Sequence[float]) -> None:
        """Adds the samples of a batch. Losses that are not finite are counted only.

        Args:
            step: the optimizer step that they belong to; batches of one step are added one after the other.
            sigmas: in [0, 1].
            losses: before `--weighting_scheme` weighs them, so that timesteps can be compared.
        """
        for sigma, loss in zip(sigmas, losses, strict=True):
            if not math.isfinite(loss):
                self._num_skipped += 1
                continue
            self._buckets[min(int(sigma * NUM_BUCKETS), NUM_BUCKETS - 1)].add(loss)
            self._training.add(step, loss)

    def add_validation(self, step: int, loss: float) -> None:
        """Adds the mean validation loss after a step."""
        if math.isfinite(loss):
            self._validation.add(step, loss)
        else:
            self._num_skipped += 1

    def state(self) -> dict[str, object]:
        """Everything, for JSON; exact."""
        return {
            "buckets": [[bucket.total, bucket.count] for bucket in self._buckets],
            "training": _curve_state(self._training),
            "validation": _curve_state(self._validation),
            "num_skipped": self._num_skipped,
        }

    def load_state(self, state: Mapping[str, object]) -> None:
        """Takes the place of what was collected: what `state` gave, also through JSON.

        Raises:
            ValueError: it is something else.
        """
        try:
            buckets = [Mean(float(total), int(count)) for total, count in state["buckets"]]
            training, validation = _curve(state["training"]), _curve(state["validation"])
            num_skipped = int(state["num_skipped"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not the state of a loss report: {error!r}") from error
        if len(buckets) != NUM_BUCKETS:
            raise ValueError(f"not the state of a loss report: {len(buckets)} buckets")
        self._buckets, self._training, self._validation = buckets, training, validation
        self._num_skipped = num_skipped

    @classmethod
    def merged(cls, states: Iterable[Mapping[str, object]]) -> LossReport:
        """One report of what several processes collected, each its own samples."""
        whole = cls()
        for state in states:
            part = cls()
            part.load_state(state)
            for mine, theirs in zip(whole._buckets, part._buckets, strict=True):
                mine.add(theirs.total, theirs.count)
            whole._training.merge(part._training)
            whole._validation.merge(part._validation)
            whole._num_skipped += part._num_skipped
        return whole

    def save(self, path: str | Path, *, title: str = "") -> None:
        """Writes both charts as one picture.

        Args:
            title: what was trained, the name of the LoRA for example.
        """
        with atomic_file(path) as temporary:
            self.draw(title).save(temporary)

    def draw(self, title: str = "") -> Image.Image:
        """Loss by timestep above, loss over steps below."""
        of = f" of {title}" if title else ""
        return stacked([draw_chart(self._by_timestep(of)), draw_chart(self._over_steps(of))])

    def _by_timestep(self, of: str) -> Chart:
        edges = [NUM_TIMESTEPS * number / NUM_BUCKETS for number in range(NUM_BUCKETS + 1)]
        means = [bucket.value for bucket in self._buckets]
        counts = [_short(bucket.count) if bucket.count else "" for bucket in self._buckets]
        return Chart(
            title=f"Loss by timestep{of}",
            x_label="timestep (0 is clean, 1000 is noise)",
            y_label="mean loss",
            layers=[Bars(label="", edges=edges, heights=means, notes=counts)],
            x_range=(0, NUM_TIMESTEPS),
            caption="The number above a column counts the samples that it is the mean of." + self._skipped(),
        )

    def _over_steps(self, of: str) -> Chart:
        dots, validation = self._training.means(), self._validation.means()
        num_averaged = max(MIN_AVERAGED, math.ceil(AVERAGED_SHARE * len(dots)))
        averages = self._training.averages(num_averaged)
        stride = self._training.stride
        layers = [
            Dots(
                label="one step" if stride == 1 else f"mean of {stride} steps",
                points=dots,
                color=PALE_BLUE,
                radius=_radius(dots),
            ),
            Line(label=f"mean of the last {num_averaged * stride} steps", points=averages, color=BLUE),
        ]
        if validation:
            layers.append(Line(label="", points=validation, color=GREEN, width=1))
            layers.append(Dots(label="validation", points=validation, color=GREEN, radius=4))
        y_max = _top([y for _, y in dots], [y for _, y in averages + validation])
        num_above = sum(y > y_max for _, y in dots)
        above = f"Dots above this chart: {num_above}. " if num_above else ""
        return Chart(
            title=f"Loss over steps{of}",
            x_label="step",
            y_label="loss",
            layers=layers,
            y_max=y_max,
            caption=above + self._skipped().strip(),
        )

    def _skipped(self) -> str:
        return f" Left out, because not finite: {self._num_skipped}." if self._num_skipped else ""


def _radius(dots: Sequence[object]) -> float:
    """Few dots are large enough to be seen, many small enough to be told apart."""
    return min(max(24 / math.sqrt(len(dots) + 1), 1.5), 4)


def _top(dots: Sequence[float], shown: Sequence[float]) -> float:
    """Where the chart ends: above all of `shown`, and above all dots but rare, very high ones."""
    if not dots:
        return max(shown, default=1.0)
    usual = sorted(dots)[int(SPIKE_QUANTILE * (len(dots) - 1))]
    return max(min(max(dots), SPIKE_FACTOR * usual), *shown)


def _short(count: int) -> str:
    """At most four characters up to 99 million."""
    for unit, name in ((1_000_000, "M"), (1_000, "k")):
        if count >= 10 * unit:
            return f"{count // unit}{name}"
    return str(count)


def _curve_state(curve: Curve) -> dict[str, object]:
    points = [[place, curve.points[place].total, curve.points[place].count] for place in sorted(curve.points)]
    return {"stride": curve.stride, "points": points}


def _curve(state: Mapping[str, object]) -> Curve:
    points = {int(place): Mean(float(total), int(count)) for place, total, count in state["points"]}
    stride = int(state["stride"])
    if stride < 1:
        raise ValueError(f"{stride} steps per point")
    return Curve(stride=stride, points=points)
