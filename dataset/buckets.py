"""Which size a picture or video is brought to: one rule for caching and for training. Sizes are (width, height)."""

from functools import lru_cache
from math import isqrt

from options.geometry import SIZE_STEP

Size = tuple[int, int]


@lru_cache(maxsize=64)
def bucket_sizes(resolution: Size) -> tuple[Size, ...]:
    """All buckets of about the area of `resolution`, in steps of 16, sorted by width.

    Widths run from half the side of the square of that area to the side itself; every size comes with its transpose.
    Empty when `resolution` has fewer pixels than the smallest bucket, 16x16.
    """
    area = resolution[0] * resolution[1]
    side = isqrt(area)
    widths = range(max(_floor(side // 2), SIZE_STEP), side + SIZE_STEP, SIZE_STEP)
    upright = [(width, height) for width in widths if (height := _floor(area // width))]
    return tuple(sorted({*upright, *((height, width) for width, height in upright)}))


def pick_bucket(size: Size, resolution: Size, *, enabled: bool, no_upscale: bool) -> Size:
    """The size that a picture of `size` is resized and cropped to.

    Args:
        enabled: without buckets everything gets `resolution` itself.
        no_upscale: with buckets, a picture of no more pixels than `resolution` keeps its own size, cut to multiples
            of 16 (a side below 16 becomes 16).

    Raises:
        ValueError: `resolution` has room for no bucket.
    """
    if not enabled:
        return resolution
    width, height = size
    if no_upscale and width * height <= resolution[0] * resolution[1]:
        return max(_floor(width), SIZE_STEP), max(_floor(height), SIZE_STEP)
    buckets = bucket_sizes(resolution)
    if not buckets:
        raise ValueError(f"a resolution of {resolution[0]}x{resolution[1]} has no bucket: 16x16 is the smallest")
    # `min` keeps the first of equals, and the buckets are sorted.
    return min(buckets, key=lambda bucket: abs(bucket[0] / bucket[1] - width / height))


def _floor(side: int) -> int:
    return side // SIZE_STEP * SIZE_STEP
