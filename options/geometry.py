"""Sizes and counts: pixels and latents, seconds and sections, aspect buckets."""

import math

from options.errors import UserError

SIZE_STEP = 16
"""Pixels per side of a target token: 8 for the VAE, 2 for the transformer's patch."""
MAX_SIDE = 16384
VAE_STRIDE = 8
FRAMES_PER_LATENT = 4
FRAMEPACK_FPS = 30
"""The rate that FramePack was trained at; seconds become sections by it, whatever rate the file gets."""
WAN_FPS = 16
"""The rate that Wan2.1 was trained at."""


def check_size(height: int, width: int, where: str = "--video_size") -> None:
    """Raises UserError unless both are positive multiples of 16 that a picture can have."""
    if all(0 < side <= MAX_SIDE and side % SIZE_STEP == 0 for side in (height, width)):
        return
    near = [min(max(SIZE_STEP, (side + SIZE_STEP // 2) // SIZE_STEP * SIZE_STEP), MAX_SIDE) for side in (height, width)]
    expected = f"height and width that are multiples of {SIZE_STEP}, at most {MAX_SIDE}"
    raise UserError(where, f"{height} {width}", expected, f"use {near[0]} {near[1]}, say")


def sections_from_seconds(seconds: float, window: int) -> int:
    """FramePack sections of `window` latent frames that come nearest to `seconds`, at least one."""
    return max(round(seconds * FRAMEPACK_FPS / (FRAMES_PER_LATENT * window)), 1)


def bucket_near(size: tuple[int, int], area: tuple[int, int]) -> tuple[int, int]:
    """(width, height) in steps of 16 with about the area of `area` and the aspect ratio of `size`.

    Five widths around sqrt(area · ratio) are tried; the best ratio wins, the first of equals.
    """
    target, ratio = area[0] * area[1], size[0] / size[1]
    middle = _floor(math.sqrt(target * ratio))
    widths = [w for i in range(-2, 3) if (w := middle + SIZE_STEP * i) >= SIZE_STEP]
    candidates = [(width, max(_floor(target // width), SIZE_STEP)) for width in widths]
    return min(candidates, key=lambda c: abs(c[0] / c[1] - ratio))


def _floor(value: float) -> int:
    return int(value) // SIZE_STEP * SIZE_STEP


def whole_latents(num_frames: int) -> int:
    """The largest 4n + 1 that is at most `num_frames`; 0 for no frames."""
    return (num_frames - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT + 1 if num_frames > 0 else 0


def size_like(image: tuple[int, int], *, area: int) -> tuple[int, int]:
    """(width, height) in steps of 16 with at most about `area` pixels and the aspect ratio of `image` (width, height).

    Source: Wan's image-to-video pipeline.
    """
    # In whole numbers: rounding would take 16 rows from a picture that has the area already.
    sides = (math.isqrt(area * image[0] // image[1]), math.isqrt(area * image[1] // image[0]))
    width, height = (max(side // SIZE_STEP * SIZE_STEP, SIZE_STEP) for side in sides)
    return width, height
