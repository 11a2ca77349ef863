"""What became of a data set: counts that several processes add up, and the lines that a user reads at the end."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from dataset.jobs import Job
from dataset.planning import Failure, Plan

LINES_SHOWN = 20


@dataclass(kw_only=True)
class Tally:
    """What one process did; filled while it works."""

    num_valid: int = 0
    """Units or captions that were cached already."""
    num_unknown: int = 0
    """Of these, caches without a fingerprint."""
    num_encoded: int = 0
    num_bytes: int = 0
    """Of the files that were written."""
    seconds: float = 0.0
    """From the first to the last of them, loading and encoding."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Why caches were made anew -> how often."""
    failures: list[Failure] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        """Adds what another process did at the same time."""
        self.num_valid += other.num_valid
        self.num_unknown += other.num_unknown
        self.num_encoded += other.num_encoded
        self.num_bytes += other.num_bytes
        self.seconds = max(self.seconds, other.seconds)
        self.reasons += other.reasons
        self.failures += other.failures


def summed(tallies: Sequence[Tally]) -> Tally:
    """Everybody's work together."""
    total = Tally()
    for tally in tallies:
        total.add(tally)
    return total


def report_lines(plan: Plan, tally: Tally, *, what: str, pruned: Sequence[str], notes: Sequence[str]) -> Iterator[str]:
    """Yields the lines of one data set.

    Args:
        what: is counted: "images", "clips", "captions".
        pruned: names of the files that were removed.
        notes: anything else.
    """
    failures = [*plan.failures, *tally.failures]
    num_used = len(plan.jobs) - len({failure.stem for failure in tally.failures})
    num_failed = plan.num_items - num_used - len(plan.dropped)
    counts = f"{plan.num_items} items, {num_used} used, {len(plan.dropped)} dropped, {num_failed} failed"
    yield f"{plan.dataset.where}: {counts}"
    rate = f", {tally.num_encoded / tally.seconds:.2f} {what} per second" if tally.num_encoded and tally.seconds else ""
    yield (
        f"  {tally.num_encoded} {what} encoded, {_bytes(tally.num_bytes)} written in {tally.seconds:.1f} s{rate}; "
        f"{tally.num_valid} were cached already"
    )
    if tally.num_unknown:
        yield f"  {tally.num_unknown} of these have no fingerprint, so nobody can tell whether they are up to date"
    for reason, times in tally.reasons.most_common(LINES_SHOWN):
        yield f"  made anew ({times}): {reason}"
    yield from _buckets(plan, what)
    for title, lines in (("dropped", plan.dropped), ("trimmed", plan.trimmed), ("note", [*plan.notes, *notes])):
        yield from _some(title, lines)
    yield from _some("removed, as nothing in the data set belongs to it", pruned)
    yield from _some("failed", [failure.message for failure in failures])


def _buckets(plan: Plan, what: str) -> Iterator[str]:
    counts = Counter(job.size for job in plan.jobs if isinstance(job, Job) for _ in job.units)
    if counts:
        listed = ", ".join(f"{width}x{height}: {counts[width, height]}" for width, height in sorted(counts))
        yield f"  buckets (width x height: {what}): {listed}"


def _some(title: str, lines: Sequence[str]) -> Iterator[str]:
    """The first of many lines, each with its title, and how many more there are."""
    for line in lines[:LINES_SHOWN]:
        yield f"  {title}: {line}"
    if len(lines) > LINES_SHOWN:
        yield f"  {title}: {len(lines) - LINES_SHOWN} more like these"


def _bytes(count: int) -> str:
    power = min(int(math.log(count, 1024)), 4) if count else 0
    return f"{count / 1024**power:.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[power]}" if power else f"{count} B"
