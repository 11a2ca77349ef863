"""What the keys of a data set file may hold: one reader for each, which says what is wrong with a value."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from options.errors import did_you_mean
from options.geometry import FRAMES_PER_LATENT, MAX_SIDE

FRAME_EXTRACTIONS = ("head", "chunk", "slide", "uniform", "full")
MAX_COUNT = 1_000_000
"""Far beyond what is useful for any number; what lies outside is a typing error."""


class Rejected(Exception):
    """A value breaks the rule of its key."""

    def __init__(self, expected: str, remedy: str = "change it") -> None:
        super().__init__(expected)
        self.expected, self.remedy = expected, remedy


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)  # Python counts true as an integer


def _integer(low: int, high: int = MAX_COUNT) -> Callable[[object], int]:
    def read(value: object) -> int:
        if not _is_integer(value) or not low <= value <= high:
            raise Rejected(f"an integer from {low} to {high}")
        return value

    return read


def _integers(value: object, low: int, example: str) -> tuple[int, ...]:
    items_are_valid = isinstance(value, list) and all(_is_integer(item) and low <= item <= MAX_COUNT for item in value)
    if not items_are_valid or not value:
        raise Rejected(f"a list of integers from {low} to {MAX_COUNT}, not empty", f"write {example}, say")
    return tuple(value)


def _indices(value: object) -> tuple[int, ...]:
    return _integers(value, 0, "[0, 10], one for each control image")


def _clip_lengths(value: object) -> tuple[int, ...]:
    lengths = _integers(value, 1, "[1, 25, 45]")
    return tuple(sorted({(length - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT + 1 for length in lengths}))


def _switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise Rejected("true or false", "write true or false without quotes")
    return value


def _size(value: object) -> tuple[int, int]:
    sides = value if isinstance(value, list) else [value, value]
    if len(sides) != 2 or not all(_is_integer(side) and 0 < side <= MAX_SIDE for side in sides):
        rule = f"one integer or [width, height], each from 1 to {MAX_SIDE}"
        raise Rejected(rule, "write [960, 544], say")
    return sides[0], sides[1]


def _rate(value: object) -> float:
    if not (_is_integer(value) or isinstance(value, float)) or not 0 < value <= MAX_COUNT:  # false for nan as well
        raise Rejected("frames per second, a number above 0", "write 30.0, say, or leave it out to use the file's")
    return float(value)


def _extension(value: object) -> str:
    if not isinstance(value, str) or "." not in value or set(value) & set("/\\\0"):
        raise Rejected("the end of a file name with its dot", "write .txt, say")
    return value


def _extraction(value: object) -> str:
    if value not in FRAME_EXTRACTIONS:
        remedy = did_you_mean(value, FRAME_EXTRACTIONS, "write head, say") if isinstance(value, str) else "choose one"
        raise Rejected(f"one of {', '.join(FRAME_EXTRACTIONS)}", remedy)
    return value


def _embedding_source(value: object) -> str | int:
    if value in ("control", "target") or (_is_integer(value) and 0 <= value <= MAX_COUNT):
        return value
    remedy = did_you_mean(value, ("control", "target"), "leave it out") if isinstance(value, str) else "leave it out"
    raise Rejected('"control", "target" or the number of a control image, from 0', remedy)


def read_path(value: object) -> Path:
    """A path as users write it.

    Raises:
        ValueError: not text, empty, or nothing that a file system can name.
    """
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError("not a path")
    os.fsencode(value)  # raises UnicodeEncodeError, a ValueError, for half characters
    return Path(value)


def _path(value: object) -> Path:
    try:
        return read_path(value)
    except ValueError as error:
        raise Rejected("a path in quotes", "write it, or leave the key out") from error


COMMON_READERS: dict[str, Callable[[object], object]] = {
    "resolution": _size,
    "caption_extension": _extension,
    "batch_size": _integer(1),
    "num_repeats": _integer(1),
    "enable_bucket": _switch,
    "bucket_no_upscale": _switch,
}
DATASET_READERS: dict[str, Callable[[object], object]] = {
    "cache_directory": _path,
    "control_directory": _path,
    "fp_latent_window_size": _integer(1, 1000),
}
IMAGE_READERS: dict[str, Callable[[object], object]] = {
    "image_directory": _path,
    "image_jsonl_file": _path,
    "mask_directory": _path,
    "multiple_target": _switch,
    "fp_1f_clean_indices": _indices,
    "fp_1f_target_index": _integer(0),
    "fp_1f_no_post": _switch,
    "fp_1f_image_embedding_source": _embedding_source,
    "no_resize_control": _switch,
    "control_resolution": _size,
}
VIDEO_READERS: dict[str, Callable[[object], object]] = {
    "video_directory": _path,
    "video_jsonl_file": _path,
    "target_frames": _clip_lengths,
    "frame_extraction": _extraction,
    "frame_stride": _integer(1),
    "frame_sample": _integer(1),
    "max_frames": _integer(1),
    "source_fps": _rate,
}
READERS = COMMON_READERS | DATASET_READERS | IMAGE_READERS | VIDEO_READERS
"""Every key, and what turns what was written into its value."""
