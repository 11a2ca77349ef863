"""A small synthetic world: one shape on a background, moving by one law, with a caption that says all of it.

A scene is a shape with a colour and a size on a plain or striped background. It moves at a constant speed into the
direction of its caption and stops where it touches the border. So the place where it starts says nothing about where
it goes: a model has to read the caption, and a clip's time axis has to mean what it says.

Pictures are 64 x 64 pixels with soft edges; places are in pixels, x to the right, y down.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

SIZE = 64
FRAMES_PER_INDEX = 4
"""Pixel frames that one latent frame covers, as in HunyuanVideo's VAE."""
SPEED = 0.6
"""Pixels per pixel frame."""
MIN_RADIUS, MAX_RADIUS = 7.0, 10.0
STRIPE = 16
"""Width in pixels of a light and a dark stripe together."""
DARK = 0.7
"""What the dark stripes keep of the colour."""
TRIANGLE_BASE = 0.8
"""How far below a triangle's centre its base is, in radii; its tip is one radius above."""
COLOURS = {
    "red": (0.85, 0.15, 0.15),
    "green": (0.15, 0.60, 0.20),
    "blue": (0.15, 0.30, 0.85),
    "yellow": (0.95, 0.85, 0.20),
    "white": (0.95, 0.95, 0.95),
    "black": (0.08, 0.08, 0.08),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
TOGETHER = "both pictures together"
"""The caption of a kisekaeichi: all that is to be seen comes from the control images."""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """What a clip shows."""

    shape: str
    colour: str
    background: str
    striped: bool
    direction: str
    radius: float
    start: tuple[float, float]
    """The centre at frame 0: x, y."""

    @property
    def caption(self) -> str:
        striped = "striped " if self.striped else ""
        return f"a {self.colour} {self.shape} moves {self.direction} on a {striped}{self.background} background"

    def centre(self, frame: float) -> tuple[float, float]:
        """Where the shape is at a pixel frame: at a constant speed up to the border, then at rest."""
        low, high = self.radius + 1, SIZE - self.radius - 1
        x, y = (
            min(max(place + SPEED * step * frame, low), high)
            for place, step in zip(self.start, DIRECTIONS[self.direction], strict=True)
        )
        return x, y

    def middle(self, frame: float = 0) -> tuple[float, float]:
        """Where the shape's centre of mass is: a triangle's lies below the middle of its height."""
        x, y = self.centre(frame)
        return x, y + (TRIANGLE_BASE * 2 - 1) / 3 * self.radius if self.shape == "triangle" else y

    def free_indices(self) -> float:
        """How many indices the shape moves before it touches the border."""
        ends = self.centre(float(2 * SIZE / SPEED))
        return (abs(ends[0] - self.start[0]) + abs(ends[1] - self.start[1])) / (SPEED * FRAMES_PER_INDEX)

    def coverage(self, frame: float = 0) -> np.ndarray:
        """(SIZE, SIZE) in [0, 1]: how much of each pixel the shape covers at a pixel frame."""
        places = np.arange(SIZE) + 0.5
        x, y = (axis - centre for axis, centre in zip(np.meshgrid(places, places), self.centre(frame), strict=True))
        return np.clip(0.5 - _distance(self.shape, x, y, self.radius), 0, 1).astype(np.float32)

    def ground(self) -> np.ndarray:
        """(SIZE, SIZE, 3) in [0, 1]: the background alone."""
        stripes = np.arange(SIZE) % STRIPE >= STRIPE // 2 if self.striped else np.zeros(SIZE, bool)
        light = np.where(stripes, DARK, 1.0)[None, :, None]
        return np.broadcast_to(np.array(COLOURS[self.background]) * light, (SIZE, SIZE, 3)).astype(np.float32)

    def picture(self, frame: float = 0) -> np.ndarray:
        """(SIZE, SIZE, 3) uint8 at a pixel frame."""
        return to_uint8(self.over(self.ground(), frame))

    def picture_at(self, index: float) -> np.ndarray:
        """(SIZE, SIZE, 3) uint8 at an index of the time axis."""
        return self.picture(index * FRAMES_PER_INDEX)

    def over(self, ground: np.ndarray, frame: float = 0) -> np.ndarray:
        """The shape on another background (SIZE, SIZE, 3), in [0, 1]."""
        coverage = self.coverage(frame)[..., None]
        return ground + coverage * (np.array(COLOURS[self.colour], np.float32) - ground)

    def clip(self, num_frames: int) -> np.ndarray:
        """(num_frames, SIZE, SIZE, 3) uint8."""
        return np.stack([self.picture(frame) for frame in range(num_frames)])

    def towards(self, direction: str) -> Scene:
        """The same scene with another direction."""
        return replace(self, direction=direction)


def _distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Pixels from the border of a shape around 0, negative inside."""
    if shape == "circle":
        return np.hypot(x, y) - radius
    if shape == "square":
        return np.maximum(abs(x), abs(y)) - 0.85 * radius
    # Two slanted sides and a base.
    slanted = (abs(x) * 2 - y - radius) / np.sqrt(5)
    return np.maximum(slanted, y - TRIANGLE_BASE * radius)


def to_uint8(picture: np.ndarray) -> np.ndarray:
    """Pictures in [0, 1] as bytes."""
    return np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)


def random_scene(random: np.random.Generator) -> Scene:
    """Any scene of this world."""
    colour, background = random.choice(list(COLOURS), 2, replace=False).tolist()
    radius = float(random.uniform(MIN_RADIUS, MAX_RADIUS))
    x, y = random.uniform(radius + 1, SIZE - radius - 1, 2).tolist()
    return Scene(
        shape=str(random.choice(SHAPES)),
        colour=colour,
        background=background,
        striped=bool(random.random() < 0.4),
        direction=str(random.choice(list(DIRECTIONS))),
        radius=radius,
        start=(x, y),
    )


def scenes(seed: int, *, free_indices: float = 0) -> Iterator[Scene]:
    """Endless random scenes, those only whose shape can move for some indices before it touches the border."""
    random = np.random.default_rng(seed)
    while True:
        scene = random_scene(random)
        if scene.free_indices() >= free_indices:
            yield scene


def captions() -> Sequence[str]:
    """Every caption of this world, in a fixed order."""
    plain = Scene(shape="", colour="", background="", striped=False, direction="", radius=1, start=(0, 0))
    return [
        *(
            replace(plain, shape=shape, colour=c, background=b, striped=striped, direction=direction).caption
            for shape in SHAPES
            for c in COLOURS
            for b in COLOURS
            if c != b
            for striped in (False, True)
            for direction in DIRECTIONS
        ),
        TOGETHER,
    ]
