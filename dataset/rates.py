"""Frame rates: which frames of a video are shown at the model's own rate."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from fractions import Fraction
from itertools import count, islice, repeat
from typing import TypeVar

T = TypeVar("T")

SAME_RATE = Fraction(2, 1000)
"""29.97 and 30 differ by half of this: one frame repeated in 1000 would be a stutter for a speed that nobody sees."""


def resample_indices(
    num_source_frames: int, source_fps: float | Fraction, target_fps: float | Fraction
) -> tuple[int, ...]:
    """Which source frame is each frame of the target rate; faster sources lose frames, slower ones repeat them."""
    copies = islice(frame_copies(source_fps, target_fps), num_source_frames)
    return tuple(index for index, times in enumerate(copies) for _ in range(times))


def frame_copies(source_fps: float | Fraction, target_fps: float | Fraction) -> Iterator[int]:
    """How often each source frame is shown, without end.

    A faster source follows the incumbent's accumulator, its rounding errors too, so that both choose the same frames.
    A slower one shows at k / target what a player would show then: frame floor(k · source / target).

    Raises:
        ValueError: a rate that is not positive.
    """
    if source_fps <= 0 or target_fps <= 0:
        raise ValueError(f"rates must be positive, got {source_fps} and {target_fps}")
    ratio = Fraction(target_fps) / Fraction(source_fps)
    if ratio < 1:
        return _copies_dropping(float(target_fps) / float(source_fps))
    return repeat(1) if ratio - 1 <= SAME_RATE else _copies_repeating(ratio)


def _copies_dropping(step: float) -> Iterator[int]:
    position, accepted = 0.0, -1
    while True:
        slot = int(position)
        position += step
        yield int(slot != accepted)
        accepted = slot


def _copies_repeating(ratio: Fraction) -> Iterator[int]:
    shown = 0
    for index in count(1):
        next_shown = math.ceil(index * ratio)
        yield next_shown - shown
        shown = next_shown


def nearest_frames(timed: Iterable[tuple[float, T]], tail: float, target_fps: float) -> Iterator[T]:
    """Frames of any timing at an even rate: at each k / target the frame that begins nearest to it.

    Args:
        timed: (begin in seconds, frame).
        tail: seconds that the last frame is shown.
    """
    origin: float | None = None
    previous: tuple[float, T] | None = None
    slot = 0
    for begin, frame in timed:
        origin = begin if origin is None else origin
        if previous is not None:
            middle = (previous[0] + begin) / 2 - origin
            while slot / target_fps < middle:
                yield previous[1]
                slot += 1
        previous = (begin, frame)
    if previous is None:
        return
    end = previous[0] + tail - origin - 1e-6  # a slot that begins where the video ends is none
    while slot == 0 or slot / target_fps < end:
        yield previous[1]
        slot += 1
