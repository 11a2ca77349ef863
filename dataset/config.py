"""The data set file, `.toml` or `.json`: checked as a whole, and resolved: nobody after it looks up a default."""

from __future__ import annotations

import json
import logging
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from common.files import existing_file
from dataset.buckets import bucket_sizes
from dataset.config_keys import COMMON_READERS, DATASET_READERS, IMAGE_READERS, READERS, VIDEO_READERS, Rejected
from options.errors import UserError, UserErrors, did_you_mean, nearest, shown
from options.geometry import SIZE_STEP

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """What image and video data sets have in common. Paths are as written: relative to the current directory."""

    where: str
    """The table's place for messages: `data.toml [datasets][1]`, counted from 1."""
    cache_directory: Path
    """Folder of the cache files; it need not exist yet, and no other data set of the file has it."""
    control_directory: Path | None = None
    """Folder of control images, or of control videos and folders of frames; None for a JSONL source."""
    resolution: tuple[int, int] = (960, 544)
    """(width, height): the size itself, or with buckets the area to keep."""
    caption_extension: str | None = None
    """What is put behind a file's stem to find its caption, dot included; a JSONL source has its captions inside."""
    batch_size: int = 1
    """Items of one shape that are encoded and trained together."""
    num_repeats: int = 1
    """How often an epoch shows each item."""
    enable_bucket: bool = False
    """Keep each item's aspect ratio, roughly; else everything is cropped to `resolution`."""
    bucket_no_upscale: bool = False
    """Items that are smaller than the area stay as they are, cut to steps of 16; false without buckets."""
    fp_latent_window_size: int = 9
    """Latent frames of a FramePack section."""

    @property
    def source_name(self) -> str:
        """The key and base name of the source: what its caches are known by when data sets share a folder."""
        key = next(key for key in SOURCES if getattr(self, key, None) is not None)
        return f"{key} {getattr(self, key).name}"


@dataclass(frozen=True, kw_only=True)
class ImageDataset(Dataset):
    """Images, with control images for one-frame training. Exactly one of the two sources is set."""

    image_directory: Path | None = None
    """Folder of the images and their captions."""
    image_jsonl_file: Path | None = None
    """File with one JSON object per image."""
    mask_directory: Path | None = None
    """Folder of pictures that say where the loss of the images of the same names counts; None for a JSONL source."""
    multiple_target: bool = False
    """A JSONL line may name several target images (neither FramePack nor Wan uses them)."""
    fp_1f_clean_indices: tuple[int, ...] | None = None
    """One-frame: the time index of each control image, in their order; None is [0]."""
    fp_1f_target_index: int | None = None
    """One-frame: the time index of the image itself."""
    fp_1f_no_post: bool = False
    """One-frame FramePack: leave out the blank frame behind the window."""
    fp_1f_image_embedding_source: str | int = "control"
    """One-frame: what the image encoder looks at: "control" (control image 0), "target", or a control's number."""
    no_resize_control: bool = False
    """Control images keep their own size."""
    control_resolution: tuple[int, int] | None = None
    """(width, height), the area of control images; None is the image's own bucket."""

    @property
    def num_controls(self) -> int:
        """Control images per image, where there are any."""
        return len(self.fp_1f_clean_indices or (0,))

    @property
    def embedded_control(self) -> int | None:
        """The number of the control image that the image encoder looks at; None is the image itself."""
        source = self.fp_1f_image_embedding_source
        return {"target": None, "control": 0}.get(source, source)


@dataclass(frozen=True, kw_only=True)
class VideoDataset(Dataset):
    """Videos. Exactly one of the two sources is set."""

    video_directory: Path | None = None
    """Folder of the videos and their captions."""
    video_jsonl_file: Path | None = None
    """File with one JSON object per video or folder of frames."""
    target_frames: tuple[int, ...] = (1,)
    """Lengths of the clips in frames, each 4n + 1, ascending; `full` does not use them."""
    frame_extraction: str = "head"
    """How clips are cut out of a video: head, chunk, slide, uniform, full."""
    frame_stride: int = 1
    """`slide`: frames from the start of one clip to the start of the next."""
    frame_sample: int = 1
    """`uniform`: clips per length."""
    max_frames: int = 129
    """`full`: the longest clip in frames."""
    source_fps: float | None = None
    """Frames per second of the videos; None is what each file says."""


@dataclass(frozen=True, kw_only=True)
class DatasetConfig:
    """Everything that a data set file says."""

    datasets: tuple[ImageDataset | VideoDataset, ...]
    """In the order of the file, at least one."""


def load_dataset_config(path: str | Path, *, flag: str = "--dataset_config") -> DatasetConfig:
    """Reads and checks a data set file and looks whether the folders and files it names are there.

    A key's value is the data set's own, else that of [general], else the default. Nothing is created.

    Raises:
        UserErrors: all problems of the file, one line each.
        UserError: the file is missing or is neither TOML nor JSON.
    """
    content = _parsed(existing_file(path, flag=flag, expected="a data set file, .toml or .json"), flag)
    problems: list[UserError] = _top_level_problems(content, str(path))
    general = _general(content.get("general", {}), f"{path} [general]", problems)
    tables = content.get("datasets")
    if not isinstance(tables, list) or not tables:
        got = "nothing" if not tables else shown(tables)
        remedy = "add a [[datasets]] table, with two brackets on each side"
        problems.append(UserError(f"{path} [datasets]", got, "at least one data set", remedy))
        raise UserErrors(problems)
    places = [f"{path} [datasets][{number}]" for number in range(1, len(tables) + 1)]
    found = [_dataset(table, general, where, problems) for table, where in zip(tables, places, strict=True)]
    problems += _shared_caches({where: d["cache_directory"] for where, d in zip(places, found, strict=True) if d})
    if problems:
        raise UserErrors(problems)
    return DatasetConfig(datasets=tuple(_built(values) for values in found if values))


# ---- the file ----


def _parsed(path: Path, flag: str) -> dict:
    """The top level table of the file.

    Raises:
        UserError: another suffix, not UTF-8, not TOML or JSON.
    """
    parse = {".toml": tomllib.loads, ".json": _strict_json}.get(path.suffix.lower())
    if parse is None:
        raise UserError(flag, path, "a data set file that ends in .toml or .json", "rename it")
    text = ""
    try:
        # An editor's byte order mark is no part of the text.
        text = path.read_bytes().decode("utf-8-sig")
        content = parse(text)
    except UnicodeDecodeError as error:
        raise UserError(flag, path, "text in UTF-8", f"save it as UTF-8 ({error.reason})") from error
    except OSError as error:
        raise UserError(flag, path, "a file that can be read", error.strerror or "look at it") from error
    except (ValueError, RecursionError) as error:
        hint = "; write \\ in a path as / or put the path in 'single quotes'" if "\\" in text else ""
        raise UserError(flag, path, f"valid {path.suffix[1:].upper()}", f"{error}{hint}") from error
    if not isinstance(content, dict):
        raise UserError(flag, path, "a JSON object with general and datasets", "put { } around it")
    return content


def _strict_json(text: str) -> object:
    return json.loads(text, object_pairs_hook=unique_keys)


def unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """A JSON object as a dictionary; what a repeated key said first would be lost in silence.

    Raises:
        ValueError: a key occurs twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice in one object")
    return found


def _top_level_problems(content: Mapping[str, object], place: str) -> list[UserError]:
    known = ("general", "datasets")
    problems = []
    for key in content:
        if key in known:
            continue
        remedy = did_you_mean(key, known, "remove it")
        if key in READERS:
            remedy = "put it below [general]" if key in COMMON_KEYS else "put it below [[datasets]]"
        problems.append(UserError(f"{place} {key}", "an unknown key", "[general] and [[datasets]]", remedy))
    return problems


# ---- the tables ----


def _general(table: object, where: str, problems: list[UserError]) -> dict[str, object]:
    if not isinstance(table, dict):
        problems.append(UserError(where, shown(table), "a table", "write [general] on a line of its own"))
        return {}
    values, table_problems = _values(_renamed(table, where), COMMON_KEYS, "[general]", where)
    problems += table_problems
    return values


def _dataset(
    table: object, general: Mapping[str, object], where: str, problems: list[UserError]
) -> dict[str, object] | None:
    """The values of a data set, those of [general] where it has none of its own; None when it is not even a table."""
    if not isinstance(table, dict):
        problems.append(UserError(where, shown(table), "a table", "write [[datasets]] on a line of its own"))
        return None
    table = _renamed(table, where)
    sources = [key for key in SOURCES if key in table]
    kinds = {SOURCES[key] for key in sources}
    keys, name = KEYS_OF[kinds.pop()] if len(kinds) == 1 else (set(READERS), "data sets")
    own, table_problems = _values(table, keys, name, where)
    if len(sources) != 1:
        got = " and ".join(sources) or "none of them"
        remedy = "split it into several [[datasets]]" if sources else "add one; a data set has one source"
        table_problems.append(UserError(where, got, f"one of {', '.join(SOURCES)}", remedy))
    values = {"where": where, "cache_directory": None} | dict(general) | own
    problems += table_problems + _path_problems(values, where)
    if len(sources) == 1:
        _use_source(values, sources[0], where, table, problems)
    problems += _size_problems(values, where) + _one_frame_problems(values, where) + _mask_problems(values, where)
    return values


def _renamed(table: Mapping[str, object], where: str) -> dict[str, object]:
    """`table` with the current names of keys that were called otherwise; the current one counts when both are there."""
    table = dict(table)
    for old, new in RENAMED.items():
        if old not in table:
            continue
        value = table.pop(old)
        outcome = f"{new} is there as well and counts" if new in table else "please rename it"
        logger.warning("%s %s: this key is now called %s; %s", where, old, new, outcome)
        table.setdefault(new, value)
    return table


def _values(
    table: Mapping[str, object], known: Iterable[str], name: str, where: str
) -> tuple[dict[str, object], list[UserError]]:
    """What the known keys of a table say, and a problem for every other key and every bad value."""
    values, problems = {}, []
    for key, value in table.items():
        place = f"{where} {key}"
        if key not in known:
            problems.append(_unknown_key(key, known, name, place))
            continue
        try:
            values[key] = READERS[key](value)
        except Rejected as rule:
            problems.append(UserError(place, shown(value), rule.expected, rule.remedy))
            continue
        if key == "target_frames" and values[key] != tuple(sorted(set(value))):
            logger.warning("%s: %s becomes %s: clips have 4n + 1 frames", place, value, list(values[key]))
    return values, problems


def _unknown_key(key: str, known: Iterable[str], name: str, place: str) -> UserError:
    expected = f"a key of {name}"
    if key in READERS and known == COMMON_KEYS:
        return UserError(place, "a key of single data sets", expected, "move it below [[datasets]]")
    if key in READERS:
        other = next(label for keys, label in KEYS_OF.values() if key in keys)
        remedy = "masks are for images: remove it" if key == "mask_directory" else "remove it or change the source"
        return UserError(place, f"a key of {other}", expected, remedy)
    likely = nearest(key.lower(), known) or nearest(key.lower(), READERS)
    remedy = f"did you mean {likely}?" if likely else "remove it"
    return UserError(place, "an unknown key", expected, remedy)


def _use_source(
    values: dict[str, object], source: str, where: str, table: Mapping[str, object], problems: list[UserError]
) -> None:
    """What depends on the kind of source: the default cache folder, and whether other folders are looked at."""
    is_jsonl = source.endswith("_jsonl_file")
    for key, what in (("control_directory", "control files"), ("mask_directory", "masks")) if is_jsonl else ():
        if values.pop(key, None):
            logger.warning("%s %s: not used, as the lines of %s name the %s", where, key, source, what)
    if "cache_directory" in table:
        return
    values["cache_directory"] = None if is_jsonl else values.get(source)
    if is_jsonl:
        remedy = "add cache_directory"
        problems.append(UserError(where, "no cache_directory", f"one, as {source} has no folder of its own", remedy))


def _built(values: dict[str, object]) -> ImageDataset | VideoDataset:
    """Defaults are those of the dataclasses."""
    values = values | {"bucket_no_upscale": bool(values.get("enable_bucket") and values.get("bucket_no_upscale"))}
    kind = next(SOURCES[key] for key in SOURCES if key in values)
    return kind(**values)


# ---- what several keys say together, and what is on the disk ----


def _path_problems(values: Mapping[str, object], where: str) -> list[UserError]:
    problems = []
    from_jsonl = any(key.endswith("_jsonl_file") for key in values)
    for key in (*SOURCES, "control_directory", "mask_directory"):
        path = values.get(key)
        if path is None or (key in ("control_directory", "mask_directory") and from_jsonl):
            continue
        is_there, kind = (os.path.isfile, "file") if key.endswith("_file") else (os.path.isdir, "folder")
        if not is_there(path):
            problems.append(UserError(f"{where} {key}", path, f"an existing {kind}", _path_remedy(path, kind)))
    cache = values.get("cache_directory")
    if cache is not None and os.path.lexists(cache) and not os.path.isdir(cache):
        place = f"{where} cache_directory"
        problems.append(UserError(place, cache, "a folder, which may be new", "something else is there: rename it"))
    return problems


def _path_remedy(path: Path, kind: str) -> str:
    if os.path.exists(path):
        return f"it is there but is no {kind}: did you mean the key for the other kind of source?"
    start = "" if path.is_absolute() else f"; relative paths start in the current folder, {os.getcwd()}"
    return f"there is nothing of that name{start}"


def _size_problems(values: Mapping[str, object], where: str) -> list[UserError]:
    """Whether the resolution can be used as it is, or as the area of buckets."""
    width, height = values.get("resolution", Dataset.resolution)
    place, got = f"{where} resolution", f"{width} x {height}"
    if values.get("enable_bucket"):
        if not bucket_sizes((width, height)):
            area = f"{SIZE_STEP} x {SIZE_STEP}"
            return [UserError(place, got, f"an area of at least {area} for buckets", "make it larger")]
    elif width % SIZE_STEP or height % SIZE_STEP:
        near = [max(round(side / SIZE_STEP), 1) * SIZE_STEP for side in (width, height)]
        remedy = f"write {near} or set enable_bucket = true"
        return [UserError(place, got, f"multiples of {SIZE_STEP} when there are no buckets", remedy)]
    return []


def _one_frame_problems(values: Mapping[str, object], where: str) -> list[UserError]:
    problems = []
    indices = values.get("fp_1f_clean_indices")
    if indices and values.get("image_directory") and "control_directory" not in values:
        remedy = "add control_directory, the folder of the control images"
        got = f"{len(indices)} indices of control images and no control images"
        problems.append(UserError(f"{where} fp_1f_clean_indices", got, "both or neither", remedy))
    number = values.get("fp_1f_image_embedding_source")
    count = len(indices or (0,))
    if isinstance(number, int) and number >= count:
        expected = f"the number of a control image, 0 to {count - 1}"
        remedy = "counting starts at 0; fp_1f_clean_indices says how many there are"
        problems.append(UserError(f"{where} fp_1f_image_embedding_source", number, expected, remedy))
    return problems


def _mask_problems(values: Mapping[str, object], where: str) -> list[UserError]:
    """Masks are found by name, so in a folder of other pictures these would be taken for masks."""
    masks = values.get("mask_directory")
    for key in ("image_directory", "control_directory"):
        if masks and values.get(key) and _one_folder(masks, values[key]):
            got, remedy = f"{masks}, the folder of {key}", "give the masks a folder of their own"
            return [UserError(f"{where} mask_directory", got, "a folder of masks only", remedy)]
    return []


def _one_folder(*paths: Path) -> bool:
    return len({os.path.normcase(os.path.realpath(path)) for path in paths}) == 1


def _shared_caches(caches: Mapping[str, Path | None]) -> list[UserError]:
    """A problem for every data set whose cache folder an earlier one has, however it is spelled."""
    owners: dict[str, str] = {}
    problems = []
    for where, folder in caches.items():
        if folder is None:
            continue
        owner = owners.setdefault(os.path.normcase(os.path.realpath(folder)), where)
        if owner != where:
            got = f"{folder}, which is that of {owner}"
            remedy = "give each data set a cache_directory (without one it is the folder of the images or videos)"
            problems.append(UserError(f"{where} cache_directory", got, "a folder of its own", remedy))
    return problems


COMMON_KEYS = set(COMMON_READERS)
"""What [general] may hold."""
KEYS_OF: dict[type, tuple[set[str], str]] = {
    ImageDataset: (COMMON_KEYS | set(DATASET_READERS) | set(IMAGE_READERS), "image data sets"),
    VideoDataset: (COMMON_KEYS | set(DATASET_READERS) | set(VIDEO_READERS), "video data sets"),
}
SOURCES: dict[str, type[ImageDataset] | type[VideoDataset]] = {
    "image_directory": ImageDataset,
    "image_jsonl_file": ImageDataset,
    "video_directory": VideoDataset,
    "video_jsonl_file": VideoDataset,
}
RENAMED = {
    "flux_kontext_no_resize_control": "no_resize_control",
    "qwen_image_edit_no_resize_control": "no_resize_control",
    "qwen_image_edit_control_resolution": "control_resolution",
}
"""Keys of older data set files and what they are called now."""
