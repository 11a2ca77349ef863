"""From a data set to its items: which files belong together, and with which caption. No picture is opened here."""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset.config import ImageDataset, VideoDataset, unique_keys
from dataset.config_keys import read_path, shown
from options.errors import UserError, nearest, one_line

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


def list_items(dataset: ImageDataset | VideoDataset) -> Listing:
    """Finds the items of a data set. Never raises: what is wrong with some files does not hide the others.

    Files are those right in the folder, by their suffix in any case; names that begin with a dot do not count.
    """
    found = _Found(dataset)
    try:
        collect = _collect_jsonl if found.jsonl else _collect_folder
        collect(found)
    except OSError as error:
        got = error.filename or dataset.where
        found.problem(dataset.where, got, "a file or folder that can be read", error.strerror or "look at it")
    found.items = [item for item in found.items if _is_text(found, item)]
    items = _without_collisions(found)
    if not items and not found.problems:
        kind = "lines" if found.jsonl else f"files that end in {', '.join(found.suffixes)}"
        remedy = "fill it" if found.jsonl else "subfolders are not searched: name the folder that has them"
        found.problem(f"{dataset.where} {found.source_key}", f"no {kind} in {found.source}", "at least one", remedy)
    return Listing(
        items=tuple(items), problems=tuple(found.problems), notes=tuple(found.notes), num_found=found.num_found
    )


def _is_text(found: _Found, item: MediaItem) -> bool:
    """Whether names and caption are UTF-8, which caches hold them in: those of old archives may not be."""
    for text, what, remedy in (
        (item.caption, "a caption with half a character (a lone surrogate)", "write it anew"),
        *((str(path), "a name that is not UTF-8", "rename it") for path in (item.path, *item.control_paths)),
    ):
        try:
            text.encode()
        except UnicodeEncodeError:
            found.problem(ascii(item.where), what, "text in UTF-8", remedy)
            return False
    return True


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


class _Found:
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
        self.unused: dict[str, str] = {}
        """Keys of JSONL lines that nobody reads, and the first place of each."""

    def problem(self, where: str, got: object, expected: str, remedy: str) -> None:
        self.problems.append(str(UserError(where, got, expected, remedy)))

    def note(self, where: str, text: str) -> None:
        self.notes.append(one_line(f"{where}: {text}"))


def _without_collisions(found: _Found) -> list[MediaItem]:
    """The items but those that share a stem, and with it their cache files."""
    by_stem: dict[str, list[MediaItem]] = defaultdict(list)
    for item in found.items:
        by_stem[os.path.normcase(item.stem)].append(item)
    for same in (items for items in by_stem.values() if len(items) > 1):
        got = " and ".join(item.where if found.jsonl is None else f"{item.path} ({item.where})" for item in same)
        if len({os.path.realpath(item.path) for item in same}) == 1:
            expected, remedy = "each file once", "keep one of them; num_repeats shows items more often"
        else:
            expected = "names that differ in more than folder and suffix, as caches are named by them"
            remedy = "rename one or use two data sets"
        found.problem(found.dataset.where, got, expected, remedy)
    return [item for item in found.items if len(by_stem[os.path.normcase(item.stem)]) == 1]


# ---- folders ----


def _collect_folder(found: _Found) -> None:
    dataset = found.dataset
    paths = files_in(found.source, found.suffixes)
    found.num_found = len(paths)
    if unread := files_in(found.source, UNREAD_SUFFIXES):
        found.note(f"{dataset.where} {found.source_key}", f"files of kinds that are not read: {_names(unread)}")
    if not paths:
        return
    if dataset.caption_extension is None:
        remedy = 'write caption_extension = ".txt", here or below [general]'
        found.problem(dataset.where, "no caption_extension", "one, so that captions can be found", remedy)
        return
    captions = _captions(found, paths)
    controls = _controls(found, paths)
    for path in paths:
        if path in captions and path in controls:
            item = MediaItem(where=str(path), path=path, caption=captions[path], control_paths=controls[path])
            found.items.append(item)


def _captions(found: _Found, paths: Sequence[Path]) -> dict[Path, str]:
    """The captions that could be read."""
    files = {path: path.with_name(stem_of(path) + found.dataset.caption_extension) for path in paths}
    missing = [path for path in paths if not os.path.isfile(files[path])]
    if len(missing) == len(paths) > 1:
        got = f"{len(paths)} {found.kind}s and no caption file such as {files[paths[0]].name} in {found.source}"
        remedy = "write the captions or correct caption_extension"
        found.problem(f"{found.dataset.where} caption_extension", got, "a caption file beside each", remedy)
        return {}
    for path in missing:
        remedy = f"write {files[path].name} (it may be empty) or take the {found.kind} out of the folder"
        found.problem(str(path), f"no caption file {files[path].name}", "one beside it", remedy)
    texts = {path: _text(found, files[path]) for path in sorted(set(paths) - set(missing))}
    return {path: text for path, text in texts.items() if text is not None}


def _text(found: _Found, path: Path) -> str | None:
    try:
        return path.read_bytes().decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        found.problem(str(path), f"bytes that are not UTF-8 ({error.reason})", "text in UTF-8", "save it as UTF-8")
    except OSError as error:
        found.problem(str(path), error.strerror or "an error", "a file that can be read", "check its permissions")
    return None


def _controls(found: _Found, paths: Sequence[Path]) -> dict[Path, tuple[Path, ...]]:
    """The controls of every item whose controls are as they should be; with no control folder, none for each."""
    folder = found.dataset.control_directory
    if folder is None:
        return {path: () for path in paths}
    if not found.is_image:
        videos = {path: _control_video(found, folder, path) for path in paths}
        return {path: (video,) for path, video in videos.items() if video}
    pool = files_in(folder, IMAGE_SUFFIXES)
    claimed = _claimed({stem_of(path) for path in paths}, pool)
    taken = {control for controls in claimed.values() for control in controls}
    if orphans := [control for control in pool if control not in taken]:
        found.note(f"{found.dataset.where} control_directory", f"controls of no image: {_names(orphans)}")
    ordered = {path: _ordered(found, path, claimed[stem_of(path)]) for path in paths}
    return {path: controls for path, controls in ordered.items() if controls is not None}


def _claimed(stems: Iterable[str], pool: Sequence[Path]) -> dict[str, list[Path]]:
    """Which control images belong to which stem: `stem.*` and `stem_*`. Longer stems choose first: `im_1` before `im`.

    Instead of going through the pool for each stem, each control looks for the longest stem that it continues.
    """
    claimed: dict[str, list[Path]] = {stem: [] for stem in stems}
    for control in pool:
        name = control.name
        ends = (at for at in range(len(name) - 1, 0, -1) if name[at] in "._")
        stem = next((name[:at] for at in ends if name[:at] in claimed), None)
        if stem is not None:
            claimed[stem].append(control)
    return claimed


def _ordered(found: _Found, path: Path, controls: Sequence[Path]) -> tuple[Path, ...] | None:
    """The controls of one image by their number: `im.png`, `im_0.png`, `im_1.png`; None after a problem."""
    by_number: dict[int, list[Path]] = defaultdict(list)
    is_valid = True
    for control in controls:
        number = _control_number(stem_of(path), stem_of(control))
        if number is None:
            expected = f"{stem_of(path)} or {stem_of(path)}_NUMBER before the suffix, as it belongs to {path.name}"
            found.problem(str(control), control.name, expected, "rename it")
            is_valid = False
        else:
            by_number[number].append(control)
    for same in (same for same in by_number.values() if len(same) > 1):
        got = f"{_names(same)} in {same[0].parent}"
        found.problem(str(path), got, "one control image for each number", "rename or remove one")
        is_valid = False
    ordered = tuple(by_number[number][0] for number in sorted(by_number))
    return ordered if is_valid and _right_number(found, str(path), ordered, found.dataset.num_controls) else None


def _control_number(stem: str, control_stem: str) -> int | None:
    """The place of a control in the order, 0 for the very name of its image; None when the name does not say."""
    if control_stem == stem:
        return 0
    digits = control_stem.rpartition("_")[2]
    return int(digits) + 1 if re.fullmatch("[0-9]{1,18}", digits) else None


def _right_number(found: _Found, where: str, controls: Sequence[Path], count: int) -> bool:
    if len(controls) == count:
        return True
    got = f"{len(controls)} control images" + (f" ({_names(controls)})" if controls else "")
    why = (
        "one for each of fp_1f_clean_indices" if found.dataset.fp_1f_clean_indices else "1 without fp_1f_clean_indices"
    )
    remedy = "give fp_1f_clean_indices one index for each" if len(controls) > count else "add what is missing"
    found.problem(where, got, f"{count} ({why})", remedy)
    return False


def _control_video(found: _Found, folder: Path, path: Path) -> Path | None:
    """The file of the same name, else a folder of frames, else a video with another suffix."""
    stem = stem_of(path)
    if os.path.isfile(folder / path.name):
        return folder / path.name
    if os.path.isdir(folder / stem):
        return folder / stem if _has_frames(found, str(path), folder / stem) else None
    names = (f"{stem}{form}" for suffix in VIDEO_SUFFIXES for form in (suffix, suffix.upper()))
    control = next((folder / name for name in names if os.path.isfile(folder / name)), None)
    if control is None:
        expected = f"{path.name}, a folder {stem}, or {stem} with another suffix in {folder}"
        found.problem(str(path), "no control video", expected, "add it or take the video out")
    return control


def _has_frames(found: _Found, where: str, folder: Path) -> bool:
    try:
        if files_in(folder, IMAGE_SUFFIXES):
            return True
        remedy = "put the frames in, sorted by name"
    except OSError as error:
        remedy = error.strerror or "check its permissions"
    found.problem(where, f"no images in the folder {folder}", "a folder of frames", remedy)
    return False


def _names(paths: Sequence[Path]) -> str:
    first = ", ".join(path.name for path in paths[:NAMES_SHOWN])
    return first if len(paths) <= NAMES_SHOWN else f"{first} and {len(paths) - NAMES_SHOWN} more"


# ---- JSONL ----


def _collect_jsonl(found: _Found) -> None:
    # Line breaks are bytes: str.splitlines would also break at characters that JSON allows within a text.
    lines = found.jsonl.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    items = []
    found.num_found = sum(bool(line.strip()) for line in lines)
    for number, line in enumerate(lines, start=1):
        where = f"{found.jsonl} line {number}"
        entry = _entry(found, where, line) if line.strip() else None
        if entry is not None and (item := _item(found, where, entry)):
            items.append(item)
    for key, where in found.unused.items():
        found.note(where, f"the key {key} is not used, here or further down")
    found.items += [item for item in items if _has_its_controls(found, item)]


def _entry(found: _Found, where: str, line: bytes) -> dict[str, object] | None:
    expected = f'one JSON object, {{"{found.kind}_path": "…", "caption": "…"}}'
    try:
        entry = json.loads(line.decode("utf-8"), object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        found.problem(where, f"bytes that are not UTF-8 ({error.reason})", expected, "save the file as UTF-8")
    except (ValueError, RecursionError) as error:
        hint = "; write \\ in a path as / or twice" if b"\\" in line else ""
        found.problem(where, f"no valid JSON ({error})", expected, f"write one object on each line{hint}")
    else:
        if isinstance(entry, dict):
            return entry
        found.problem(where, f"a JSON {type(entry).__name__}", expected, "one object on each line, no list around them")
    return None


def _item(found: _Found, where: str, entry: Mapping[str, object]) -> MediaItem | None:
    """The item of one line; None after a problem."""
    before = len(found.problems)
    target_keys = _numbered_keys(found, where, entry, f"{found.kind}_path")
    control_keys = _numbered_keys(found, where, entry, "control_path")
    found.any_controls |= bool(control_keys)
    _look_at_other_keys(found, where, entry, target_keys, control_keys)
    if len(target_keys) > 1 and not found.dataset.multiple_target:
        remedy = "set multiple_target = true or keep one"
        found.problem(where, f"{len(target_keys)} target images", "one, without multiple_target", remedy)
    targets = [_media(found, f"{where} {key}", entry[key]) for key in target_keys]
    controls = _control_paths(found, where, entry, control_keys)
    caption = entry.get("caption", "")
    if not isinstance(caption, str):
        found.problem(f"{where} caption", shown(caption), "text in quotes", "write the caption in quotes")
    if len(found.problems) > before:
        return None
    target, *others = targets
    return MediaItem(
        where=where, path=target, caption=caption, control_paths=tuple(controls), more_target_paths=tuple(others)
    )


def _numbered_keys(found: _Found, where: str, entry: Mapping[str, object], name: str) -> list[str]:
    """`name` and, for images, `name_0`, `name_1`, … in the order of their numbers, of which gaps do not matter."""
    pattern = re.compile(rf"{name}(?:_([0-9]{{1,18}}))?" if found.is_image else f"{name}()")
    by_number: dict[int, str] = {}
    for match in filter(None, map(pattern.fullmatch, entry)):
        other = by_number.setdefault(int(match[1] or 0), match[0])
        if other != match[0]:
            found.problem(where, f"{other} and {match[0]}", "each number once", "remove or renumber one")
    return [by_number[number] for number in sorted(by_number)]


def _look_at_other_keys(
    found: _Found, where: str, entry: Mapping[str, object], target_keys: Sequence[str], control_keys: Sequence[str]
) -> None:
    """Missing keys, and unknown ones that look like a missing one; other unknown keys are only noted, once each."""
    keys_of = {f"{found.kind}_path": target_keys, "control_path": control_keys, "caption": {"caption"} & set(entry)}
    missing = [name for name, keys in keys_of.items() if not keys]
    unknown = [key for key in entry if not any(key in keys for keys in keys_of.values())]
    likely = {key: nearest(key.lower(), missing) for key in unknown}
    for key, name in likely.items():
        if name:
            found.problem(where, f"the unknown key {key}", f"one of {', '.join(keys_of)}", f"did you mean {name}?")
        else:
            found.unused.setdefault(key, where)
    for name in missing:
        if name != "control_path" and name not in likely.values():
            found.problem(where, f"no {name}", f"{found.kind}_path and caption", f'add "{name}": "…"')


def _control_paths(found: _Found, where: str, entry: Mapping[str, object], keys: Sequence[str]) -> list[Path | None]:
    value = entry.get("control_path")
    # An existing file may have a comma in its name.
    if found.is_image and len(keys) == 1 and isinstance(value, str) and "," in value and not os.path.isfile(value):
        return [_media(found, f"{where} control_path", part.strip()) for part in value.split(",")]
    return [_media(found, f"{where} {key}", entry[key]) for key in keys]


def _media(found: _Found, where: str, value: object) -> Path | None:
    """The path that `value` is, if something is there; None after a problem."""
    try:
        path = read_path(value)
    except ValueError:
        found.problem(where, shown(value), "a path in quotes", "write it, or leave the key out")
        return None
    if os.path.isfile(path):
        return path
    if not found.is_image and os.path.isdir(path):
        return path if _has_frames(found, where, path) else None
    remedy = "there is no such file"
    if os.path.isdir(path):
        remedy = "it is a folder: give the file"
    elif os.path.exists(beside := found.jsonl.parent / path):
        remedy = f"paths start in the current folder, not in that of {found.jsonl.name}: write {beside}"
    found.problem(where, path, "an image" if found.is_image else "a video or a folder of frames", remedy)
    return None


def _has_its_controls(found: _Found, item: MediaItem) -> bool:
    """Whether an item has as many controls as every item has to have; none is right where no line names any."""
    if not found.any_controls and not (found.is_image and found.dataset.fp_1f_clean_indices):
        return True
    if found.is_image:
        return _right_number(found, item.where, item.control_paths, found.dataset.num_controls)
    if not item.control_paths:
        found.problem(item.where, "no control_path", "one in each line, as other lines have it", "add it")
    return bool(item.control_paths)
