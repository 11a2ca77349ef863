"""The items of a data set, and what is gathered on the way to them: problems, notes, counts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset.config import ImageDataset, VideoDataset
from options.errors import UserError, one_line

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif")
VIDEO_SUFFIXES = (".mp4", ".webm", ".avi", ".mkv", ".mov", ".flv", ".wmv", ".m4v", ".mpg", ".mpeg")
UNREAD_SUFFIXES = (".jxl", ".gif", ".tif", ".tiff", ".heic", ".heif")
"""Pictures and videos that are not looked at; whoever has them in a folder should hear of it."""
NAMES_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class MediaItem:
    """One image or video of a data set with all that belongs to it."""

    where: str
    """Its place for messages: the file, or the line of the JSONL file."""
    path: Path
    """The (target) image, the video, or a folder of frames."""
    caption: str
    """The caption; from a file without white space around it, from JSONL as it stands there."""
    control_paths: tuple[Path, ...] = ()
    """Control images in the order of their indices; for a video at most one, a video or a folder of frames."""
    more_target_paths: tuple[Path, ...] = ()
    """The other target images of a line, with `multiple_target`."""
    mask_path: Path | None = None
    """A picture that is white where the loss of the image counts; None: it counts everywhere."""
    is_masked: bool = False
    """Whether its cache holds a mask: true for all items of a data set that has masks, so that they can be stacked."""

    @property
    def stem(self) -> str:
        """What the names of its cache files begin with; no other item of the data set has it."""
        return stem_of(self.path)


@dataclass(frozen=True, kw_only=True)
class Listing:
    """What a data set consists of."""

    items: tuple[MediaItem, ...]
    """Everything that can be used: a folder's by name, a JSONL file's by line."""
    problems: tuple[str, ...]
    """One line for each thing that keeps an item out, or all of them."""
    notes: tuple[str, ...] = ()
    """One line for each thing that is left aside and was perhaps meant to be used."""
    num_found: int = 0
    """Images, videos or lines of JSON, usable or not."""


class Found:
    """What has been gathered so far, and the data set it comes from."""

    def __init__(self, dataset: ImageDataset | VideoDataset) -> None:
        self.dataset = dataset
        self.is_image = isinstance(dataset, ImageDataset)
        self.kind = "image" if self.is_image else "video"
        self.suffixes = IMAGE_SUFFIXES if self.is_image else VIDEO_SUFFIXES
        self.jsonl: Path | None = getattr(dataset, f"{self.kind}_jsonl_file")
        self.source_key = f"{self.kind}_jsonl_file" if self.jsonl else f"{self.kind}_directory"
        self.source: Path = getattr(dataset, self.source_key)
        self.items: list[MediaItem] = []
        self.problems: list[str] = []
        self.notes: list[str] = []
        self.num_found = 0
        self.any_controls = False
        """Whether a line of the JSONL file names a control."""
        self.any_masks = False
        """Whether a line of the JSONL file names a mask."""
        self.unused: dict[str, str] = {}
        """Keys of JSONL lines that nobody reads, and the first place of each."""

    def problem(self, where: str, got: object, expected: str, remedy: str) -> None:
        self.problems.append(str(UserError(where, got, expected, remedy)))

    def note(self, where: str, text: str) -> None:
        self.notes.append(one_line(f"{where}: {text}"))

    def note_without_mask(self, where: str) -> None:
        self.note(where, "no mask, so its loss counts everywhere")


def stem_of(path: str | Path) -> str:
    """The name without folder and last suffix."""
    return os.path.splitext(os.path.basename(path))[0]


def files_in(folder: str | Path, suffixes: Iterable[str]) -> list[Path]:
    """The files right in `folder` with one of the suffixes, in any case, sorted by name.

    Raises:
        OSError: the folder cannot be read.
    """
    # os.scandir takes the name as it is, where glob would read [x] as a pattern.
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".") and not entry.is_dir()]
    known = tuple(suffixes)
    return [Path(folder) / name for name in sorted(names) if os.path.splitext(name)[1].lower() in known]


def right_number(found: Found, where: str, controls: Sequence[Path], count: int) -> bool:
    """Whether there are `count` control images; else that is a problem."""
    if len(controls) == count:
        return True
    got = f"{len(controls)} control images" + (f" ({names_of(controls)})" if controls else "")
    why = (
        "one for each of fp_1f_clean_indices" if found.dataset.fp_1f_clean_indices else "1 without fp_1f_clean_indices"
    )
    remedy = "give fp_1f_clean_indices one index for each" if len(controls) > count else "add what is missing"
    found.problem(where, got, f"{count} ({why})", remedy)
    return False


def has_frames(found: Found, where: str, folder: Path) -> bool:
    """Whether a folder of frames has any; else that is a problem."""
    try:
        if files_in(folder, IMAGE_SUFFIXES):
            return True
        remedy = "put the frames in, sorted by name"
    except OSError as error:
        remedy = error.strerror or "check its permissions"
    found.problem(where, f"no images in the folder {folder}", "a folder of frames", remedy)
    return False


def names_of(paths: Sequence[Path]) -> str:
    """The first names, and how many more there are."""
    first = ", ".join(path.name for path in paths[:NAMES_SHOWN])
    return first if len(paths) <= NAMES_SHOWN else f"{first} and {len(paths) - NAMES_SHOWN} more"
