"""Which caches are valid already: headers are read and sources hashed, nothing is decoded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace

from dataset.cache_files import MISSING, NO_FINGERPRINT, staleness
from dataset.fingerprints import ABSENT, MASK_SETTING, Fingerprint, item_identity
from dataset.jobs import Job, Unit

NO_MASK = "no loss mask in a cache without a fingerprint"


@dataclass(frozen=True, kw_only=True)
class Pending:
    """What is left of some jobs."""

    jobs: tuple[Job, ...]
    """Those with something left, with only these units."""
    num_valid: int
    """Units whose caches are all there and belong to their source and settings."""
    num_unknown: int
    """Of these, units with a cache that has no fingerprint: the incumbent's."""
    reasons: Counter[str]
    """Why caches that are there are made anew -> how many units."""


def pending(jobs: Iterable[Job], encoders: Fingerprint) -> Pending:
    """Sorts out the units that are cached already.

    Args:
        encoders: what caches say about the models that made them.
    """
    left = []
    states: Counter[str | None] = Counter()
    for job in jobs:
        found = _states(job, encoders)
        states.update(found)
        stale = tuple(u for u, state in zip(job.units, found, strict=True) if state not in (None, NO_FINGERPRINT))
        if stale:
            left.append(replace(job, units=stale))
    num_unknown = states.pop(NO_FINGERPRINT, 0)
    num_valid = states.pop(None, 0) + num_unknown
    states.pop(MISSING, None)
    return Pending(jobs=tuple(left), num_valid=num_valid, num_unknown=num_unknown, reasons=states)


def _states(job: Job, encoders: Fingerprint) -> list[str | None]:
    """`staleness` of each unit."""
    try:
        # Neither a mask nor one control more than the item has now.
        absent = {MASK_SETTING: ABSENT, f"control_{len(job.item.control_paths)}": ABSENT}
        identity = absent | item_identity(job.item)
    except OSError:  # who loads it will tell
        return [MISSING] * len(job.units)
    states = [_state(unit, {**unit.settings, **encoders, **identity}) for unit in job.units]
    # The incumbent's caches are taken as they are, but they cannot have a mask.
    return [NO_MASK if state == NO_FINGERPRINT and job.item.is_masked else state for state in states]


def _state(unit: Unit, expected: Fingerprint) -> str | None:
    """Of a unit's files the first answer that asks for a new cache; else the first other one."""
    states = [state for state in (staleness(path, expected) for path in unit.paths) if state is not None]
    return next((state for state in states if state != NO_FINGERPRINT), states[0] if states else None)
