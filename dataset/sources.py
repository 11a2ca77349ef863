"""From a data set to its items: which files belong together, and with which caption. No picture is opened here."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

from dataset.cache_names import comparable
from dataset.config import ImageDataset, VideoDataset
from dataset.items import (
    IMAGE_SUFFIXES,
    UNREAD_SUFFIXES,
    VIDEO_SUFFIXES,
    Found,
    Listing,
    MediaItem,
    files_in,
    has_frames,
    names_of,
    right_number,
    stem_of,
)
from dataset.jsonl import collect_jsonl


def list_items(dataset: ImageDataset | VideoDataset) -> Listing:
    """Finds the items of a data set. Never raises: what is wrong with some files does not hide the others.

    Files are those right in the folder, by their suffix in any case; names that begin with a dot do not count.
    """
    found = Found(dataset)
    try:
        collect = collect_jsonl if found.jsonl else _collect_folder
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


def _is_text(found: Found, item: MediaItem) -> bool:
    """Whether names and caption are UTF-8, which caches hold them in: those of old archives may not be."""
    for text, what, remedy in (
        (item.caption, "a caption with half a character (a lone surrogate)", "write it anew"),
        *((str(path), "a name that is not UTF-8", "rename it") for path in _files(item)),
    ):
        try:
            text.encode()
        except UnicodeEncodeError:
            found.problem(ascii(item.where), what, "text in UTF-8", remedy)
            return False
    return True


def _files(item: MediaItem) -> Iterable[Path]:
    return filter(None, (item.path, *item.control_paths, item.mask_path))


def _without_collisions(found: Found) -> list[MediaItem]:
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


def _collect_folder(found: Found) -> None:
    dataset = found.dataset
    paths = files_in(found.source, found.suffixes)
    found.num_found = len(paths)
    if unread := files_in(found.source, UNREAD_SUFFIXES):
        found.note(f"{dataset.where} {found.source_key}", f"files of kinds that are not read: {names_of(unread)}")
    if not paths:
        return
    if dataset.caption_extension is None:
        remedy = 'write caption_extension = ".txt", here or below [general]'
        found.problem(dataset.where, "no caption_extension", "one, so that captions can be found", remedy)
        return
    captions = _captions(found, paths)
    controls, masks = _controls(found, paths), _masks(found, paths)
    for path in paths:
        if path in captions and path in controls and path in masks:
            item = MediaItem(
                where=str(path),
                path=path,
                caption=captions[path],
                control_paths=controls[path],
                mask_path=masks[path],
                is_masked=_mask_folder(found) is not None,
            )
            found.items.append(item)


def _captions(found: Found, paths: Sequence[Path]) -> dict[Path, str]:
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


def _text(found: Found, path: Path) -> str | None:
    try:
        return path.read_bytes().decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        found.problem(str(path), f"bytes that are not UTF-8 ({error.reason})", "text in UTF-8", "save it as UTF-8")
    except OSError as error:
        found.problem(str(path), error.strerror or "an error", "a file that can be read", "check its permissions")
    return None


def _controls(found: Found, paths: Sequence[Path]) -> dict[Path, tuple[Path, ...]]:
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
        found.note(f"{found.dataset.where} control_directory", f"controls of no image: {names_of(orphans)}")
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


def _ordered(found: Found, path: Path, controls: Sequence[Path]) -> tuple[Path, ...] | None:
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
        got = f"{names_of(same)} in {same[0].parent}"
        found.problem(str(path), got, "one control image for each number", "rename or remove one")
        is_valid = False
    ordered = tuple(by_number[number][0] for number in sorted(by_number))
    return ordered if is_valid and right_number(found, str(path), ordered, found.dataset.num_controls) else None


def _control_number(stem: str, control_stem: str) -> int | None:
    """The place of a control in the order, 0 for the very name of its image; None when the name does not say."""
    if control_stem == stem:
        return 0
    digits = control_stem.rpartition("_")[2]
    return int(digits) + 1 if re.fullmatch("[0-9]{1,18}", digits) else None


def _control_video(found: Found, folder: Path, path: Path) -> Path | None:
    """The file of the same name, else a folder of frames, else a video with another suffix."""
    stem = stem_of(path)
    if os.path.isfile(folder / path.name):
        return folder / path.name
    if os.path.isdir(folder / stem):
        return folder / stem if has_frames(found, str(path), folder / stem) else None
    names = (f"{stem}{form}" for suffix in VIDEO_SUFFIXES for form in (suffix, suffix.upper()))
    control = next((folder / name for name in names if os.path.isfile(folder / name)), None)
    if control is None:
        expected = f"{path.name}, a folder {stem}, or {stem} with another suffix in {folder}"
        found.problem(str(path), "no control video", expected, "add it or take the video out")
    return control


def _mask_folder(found: Found) -> Path | None:
    return found.dataset.mask_directory if found.is_image else None


def _masks(found: Found, paths: Sequence[Path]) -> dict[Path, Path | None]:
    """The mask of every item, None where there is none and none is needed; items with a problem are left out."""
    folder = _mask_folder(found)
    if folder is None:
        return dict.fromkeys(paths)
    place = f"{found.dataset.where} mask_directory"
    if unread := files_in(folder, UNREAD_SUFFIXES):
        found.note(place, f"files of kinds that are not read: {names_of(unread)}")
    by_stem: dict[str, list[Path]] = defaultdict(list)
    for mask in files_in(folder, IMAGE_SUFFIXES):
        by_stem[comparable(stem_of(mask))].append(mask)
    claimed = {path: by_stem.get(comparable(stem_of(path)), []) for path in paths}
    if not any(claimed.values()):
        expected = f"pictures with the names of their images, such as {stem_of(paths[0])}.png"
        found.problem(place, f"no mask of any image in {folder}", expected, "correct it or leave it out")
        return {}
    taken = {mask for masks in claimed.values() for mask in masks}
    if orphans := [mask for masks in by_stem.values() for mask in masks if mask not in taken]:
        found.note(place, f"masks of no image: {names_of(orphans)}")
    return {path: mask for path, masks in claimed.items() for mask in _only_mask(found, path, masks)}


def _only_mask(found: Found, path: Path, masks: Sequence[Path]) -> Sequence[Path | None]:
    """The one mask of an image or None for a mask; nothing after a problem."""
    if len(masks) > 1:
        got = f"{names_of(masks)} in {masks[0].parent}"
        found.problem(str(path), got, "one mask for each image", "remove or rename one")
        return ()
    if not masks:
        found.note_without_mask(str(path))
    return masks or (None,)
