"""Items from a JSONL file: one JSON object on each line, which names its files and has its caption inside."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dataset.config import unique_keys
from dataset.config_keys import read_path
from dataset.items import Found, MediaItem, has_frames, right_number
from options.errors import nearest, shown


def collect_jsonl(found: Found) -> None:
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
    for item in items if found.any_masks else ():
        if item.mask_path is None:
            found.note_without_mask(item.where)
    items = [replace(item, is_masked=found.any_masks) for item in items]
    found.items += [item for item in items if _has_its_controls(found, item)]


def _entry(found: Found, where: str, line: bytes) -> dict[str, object] | None:
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


def _item(found: Found, where: str, entry: Mapping[str, object]) -> MediaItem | None:
    """The item of one line; None after a problem."""
    before = len(found.problems)
    has_mask = "mask_path" in entry
    if has_mask and not found.is_image:
        found.problem(f"{where} mask_path", "a mask", "no mask in a line of videos", "masks are for images: remove it")
        return None
    found.any_masks |= has_mask
    target_keys = _numbered_keys(found, where, entry, f"{found.kind}_path")
    control_keys = _numbered_keys(found, where, entry, "control_path")
    found.any_controls |= bool(control_keys)
    _look_at_other_keys(found, where, entry, target_keys, control_keys)
    if len(target_keys) > 1 and not found.dataset.multiple_target:
        remedy = "set multiple_target = true or keep one"
        found.problem(where, f"{len(target_keys)} target images", "one, without multiple_target", remedy)
    targets = [_media(found, f"{where} {key}", entry[key]) for key in target_keys]
    controls = _control_paths(found, where, entry, control_keys)
    mask = _media(found, f"{where} mask_path", entry["mask_path"]) if has_mask else None
    caption = entry.get("caption", "")
    if not isinstance(caption, str):
        found.problem(f"{where} caption", shown(caption), "text in quotes", "write the caption in quotes")
    if len(found.problems) > before:
        return None
    target, *others = targets
    return MediaItem(
        where=where,
        path=target,
        caption=caption,
        control_paths=tuple(controls),
        more_target_paths=tuple(others),
        mask_path=mask,
    )


def _numbered_keys(found: Found, where: str, entry: Mapping[str, object], name: str) -> list[str]:
    """`name` and, for images, `name_0`, `name_1`, … in the order of their numbers, of which gaps do not matter."""
    pattern = re.compile(rf"{name}(?:_([0-9]{{1,18}}))?" if found.is_image else f"{name}()")
    by_number: dict[int, str] = {}
    for match in filter(None, map(pattern.fullmatch, entry)):
        other = by_number.setdefault(int(match[1] or 0), match[0])
        if other != match[0]:
            found.problem(where, f"{other} and {match[0]}", "each number once", "remove or renumber one")
    return [by_number[number] for number in sorted(by_number)]


def _look_at_other_keys(
    found: Found, where: str, entry: Mapping[str, object], target_keys: Sequence[str], control_keys: Sequence[str]
) -> None:
    """Missing keys, and unknown ones that look like a missing one; other unknown keys are only noted, once each."""
    keys_of = {f"{found.kind}_path": target_keys, "control_path": control_keys, "caption": {"caption"} & set(entry)}
    if found.is_image:
        keys_of["mask_path"] = {"mask_path"} & set(entry)
    missing = [name for name, keys in keys_of.items() if not keys]
    unknown = [key for key in entry if not any(key in keys for keys in keys_of.values())]
    # Keys of other tools, such as base_path, look like mask_path too; the others are nearly always there.
    likely = {
        key: nearest(key.lower(), [n for n in missing if n != "mask_path" or "mask" in key.lower()]) for key in unknown
    }
    for key, name in likely.items():
        if name:
            found.problem(where, f"the unknown key {key}", f"one of {', '.join(keys_of)}", f"did you mean {name}?")
        else:
            found.unused.setdefault(key, where)
    for name in missing:
        if name not in ("control_path", "mask_path") and name not in likely.values():
            found.problem(where, f"no {name}", f"{found.kind}_path and caption", f'add "{name}": "…"')


def _control_paths(found: Found, where: str, entry: Mapping[str, object], keys: Sequence[str]) -> list[Path | None]:
    value = entry.get("control_path")
    # An existing file may have a comma in its name.
    if found.is_image and len(keys) == 1 and isinstance(value, str) and "," in value and not os.path.isfile(value):
        return [_media(found, f"{where} control_path", part.strip()) for part in value.split(",")]
    return [_media(found, f"{where} {key}", entry[key]) for key in keys]


def _media(found: Found, where: str, value: object) -> Path | None:
    """The path that `value` is, if something is there; None after a problem."""
    try:
        path = read_path(value)
    except ValueError:
        found.problem(where, shown(value), "a path in quotes", "write it, or leave the key out")
        return None
    if os.path.isfile(path):
        return path
    if not found.is_image and os.path.isdir(path):
        return path if has_frames(found, where, path) else None
    remedy = "there is no such file"
    if os.path.isdir(path):
        remedy = "it is a folder: give the file"
    elif os.path.exists(beside := found.jsonl.parent / path):
        remedy = f"paths start in the current folder, not in that of {found.jsonl.name}: write {beside}"
    found.problem(where, path, "an image" if found.is_image else "a video or a folder of frames", remedy)
    return None


def _has_its_controls(found: Found, item: MediaItem) -> bool:
    """Whether an item has as many controls as every item has to have; none is right where no line names any."""
    if not found.any_controls and not (found.is_image and found.dataset.fp_1f_clean_indices):
        return True
    if found.is_image:
        return right_number(found, item.where, item.control_paths, found.dataset.num_controls)
    if not item.control_paths:
        found.problem(item.where, "no control_path", "one in each line, as other lines have it", "add it")
    return bool(item.control_paths)
