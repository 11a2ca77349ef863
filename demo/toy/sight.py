"""Where the shape is in a picture of the toy world, and what colours shape and background have."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from demo.toy.world import COLOURS, DIRECTIONS, FRAMES_PER_INDEX, SIZE, Scene

MIN_PIXELS = 8.0
"""Of a shape that counts as seen; the smallest one covers about 70, but may be faint."""
SEEN = 0.35
"""Coverage from which a pixel belongs to the shape."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A shape that was found."""

    centre: tuple[float, float]
    """x, y in pixels."""
    off_colour: float
    """How far its pixels are, 0 ... 1 in the mean, from all mixtures of its colour and the background's."""


def find(picture: np.ndarray, *, colour: str, ground: np.ndarray) -> Seen | None:
    """The shape of a colour in front of a known background; None when hardly anything is there.

    A pixel's coverage is how far it lies on the way from the background's colour to the shape's.

    Args:
        picture: (SIZE, SIZE, 3) uint8.
        ground: (SIZE, SIZE, 3) in [0, 1].
    """
    way = np.array(COLOURS[colour], np.float32) - ground
    coverage = ((picture / 255.0 - ground) * way).sum(axis=2) / np.square(way).sum(axis=2)
    weights = np.clip(coverage, 0, 1) * (coverage > SEEN)
    total = float(weights.sum())
    if total < MIN_PIXELS:
        return None
    places = np.arange(SIZE) + 0.5
    x, y = float(weights.sum(axis=0) @ places) / total, float(weights.sum(axis=1) @ places) / total
    mixtures = ground + coverage[..., None] * way
    distances = np.abs(picture / 255.0 - mixtures).mean(axis=2)
    return Seen(centre=(x, y), off_colour=float((weights * distances).sum() / total))


def find_in(picture: np.ndarray, scene: Scene) -> Seen | None:
    """The scene's shape in a picture of it at any moment."""
    return find(picture, colour=scene.colour, ground=scene.ground())


def error(picture: np.ndarray, truth: np.ndarray) -> float:
    """Mean absolute difference of two (SIZE, SIZE, 3) uint8 pictures, 0 ... 1."""
    return float(np.abs(picture.astype(np.float32) - truth).mean() / 255)


def travelled(seen: Seen, scene: Scene) -> float:
    """How many pixels along the caption's direction a shape has come from where it started."""
    steps = zip(DIRECTIONS[scene.direction], seen.centre, scene.middle(), strict=True)
    return sum(step * (now - begin) for step, now, begin in steps)


def astray(seen: Seen, scene: Scene, index: float) -> float:
    """Pixels between a shape and the place where the scene has it at an index."""
    x, y = scene.middle(index * FRAMES_PER_INDEX)
    return float(np.hypot(seen.centre[0] - x, seen.centre[1] - y))
