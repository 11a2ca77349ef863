"""Encoding the inputs of many requests: each input once, each encoder brought in once, one failure at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.residency import Resident

NUM_REMEMBERED = 64
"""Encoded texts and images that are kept for the next prompts of a session, of each kind."""


@dataclass(frozen=True)
class ImageInput:
    """What decides the features and the latent of an image, or of a folder of them."""

    path: str | None
    """None is no image."""
    width: int
    height: int
    version: tuple[tuple[int, int], ...]
    """Time and size of the file, or of a folder and all files in it, so that an edited one is encoded anew."""

    @classmethod
    def of(cls, path: str | None, width: int, height: int) -> ImageInput:
        file = Path(path or "")
        files = [file, *(sorted(file.iterdir()) if file.is_dir() else [])] if path and file.exists() else []
        stats = [file.stat() for file in files]
        return cls(path, width, height, tuple((stat.st_mtime_ns, stat.st_size) for stat in stats))


class Results(dict):
    """Encoded inputs; asking for one that failed raises its error."""

    def __getitem__(self, key: Any) -> Any:
        value = super().__getitem__(key)
        if isinstance(value, Exception):
            raise value
        return value


def encode_each(
    inputs: Iterable[Any], encoder: Resident, encode: Callable[[Any, Any], Any], remembered: dict
) -> Results:
    """Every input's result, or the exception that it caused. The model comes in only for what is not remembered.

    Args:
        inputs: hashable; equal ones are encoded once.
        encode: (model, input) → result.
        remembered: results of earlier calls, which this one brings up to date.
    """
    results = Results({key: remembered.get(key) for key in inputs})
    missing = [key for key, value in results.items() if value is None]
    with encoder.use() if missing else nullcontext():
        for key in missing:
            try:
                results[key] = encode(encoder.model, key)
            except Exception as error:  # kept for the requests that need it
                results[key] = without_frames(error)
    for key, value in results.items():
        if not isinstance(value, Exception):
            remembered.pop(key, None)  # to the end, where the latest are
            remembered[key] = value
    for key in list(remembered)[:-NUM_REMEMBERED]:
        del remembered[key]
    return results


def without_frames(error: Exception) -> Exception:
    """The error without tracebacks, its causes' too: their frames hold the encoder, which has to leave the device."""
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return error
