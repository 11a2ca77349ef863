"""Prompts of the samples that are made while training: files of lines (`.txt`), or of tables (`.toml`, `.json`).

    a cat --w 512 --h 512 --f 37 --d 42 --i start.png           prompts.txt, and texts in a JSON list

    [prompt]                                                    prompts.toml: what all prompts share ...
    width = 512
    [[prompt.subset]]                                           ... and what each has for itself, which wins
    prompt = "a cat"

The letters and keys are the incumbent's. What they mean is said in the terms of generation, so that a sample is what
generation makes with these settings.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from options.errors import UserError, UserErrors, did_you_mean, shown
from options.flags_generate import RequestFlags
from options.geometry import FRAMEPACK_FPS
from options.prompt_line import INTEGER, NUMBER, SIDES, LineOption, PromptLine, numbered_lines

FLAG = "--sample_prompts"
FIRST = {".txt": "line", ".toml": "prompt", ".json": "entry"}
"""Kinds of files, and what a prompt is called in each."""
MAX_FRAMES = 1_000_000
T = TypeVar("T")


def _seconds(text: str) -> float:
    """Frames at the model's rate."""
    if not 1 <= (frames := INTEGER(text)) <= MAX_FRAMES:
        raise ValueError(f"1 to {MAX_FRAMES} frames")
    return frames / FRAMEPACK_FPS


def _option(key: str, field: str | None, convert: Callable[[str], object], help: str, **named: bool) -> LineOption:
    return LineOption(field=field, convert=convert, help=help, key=key, **named)


SAMPLE_OPTIONS = {
    "w": _option("width", "video_size", INTEGER, "a width"),
    "h": _option("height", "video_size", INTEGER, "a height"),
    "f": _option("frame_count", "video_seconds", _seconds, "a number of frames"),
    "d": _option("seed", "seed", INTEGER, "a seed"),
    "s": _option("sample_steps", "infer_steps", INTEGER, "denoising steps"),
    "g": _option("guidance_scale", "embedded_cfg_scale", NUMBER, "distilled guidance"),
    "l": _option("cfg_scale", "guidance_scale", NUMBER, "classifier-free guidance"),
    "fs": _option("discrete_flow_shift", "flow_shift", NUMBER, "a flow shift"),
    "n": _option("negative_prompt", "negative_prompt", str, "a negative prompt"),
    "i": _option("image_path", "image_path", str, "a start image"),
    "im": _option("image_mask_path", "image_mask_path", str, "its mask"),
    "ei": _option("end_image_path", "end_image_path", str, "an end image"),
    "ci": _option("control_image_path", "control_image_path", str, "a control image", repeats=True),
    "cim": _option("control_image_mask_path", "control_image_mask_path", str, "its mask", repeats=True),
    "of": _option("one_frame", "one_frame_inference", str, "one-frame options, or default"),
    "cn": _option("control_video_path", None, str, "a control video (not available yet)"),
}
"""By letter; each has its key in TOML and JSON. `guidance_scale` as a key is the distilled one."""
KEYS = {option.key: letter for letter, option in SAMPLE_OPTIONS.items()}
PROMPT, SUBSET = "prompt", "subset"


@dataclass(frozen=True, kw_only=True)
class SamplePrompt:
    """One prompt as it stands in its file, not understood yet."""

    number: int
    """Its place in the file, from 0."""
    where: str
    """`prompts.txt line 3`."""
    entry: object
    """A line or a table; JSON may hold other things."""

    def over(self, defaults: RequestFlags) -> RequestFlags:
        """`defaults` with what the prompt says in their place.

        More than one frame makes a video, also where `defaults` ask for one-frame pictures.

        Raises:
            UserError: it is not a text or a table, or something in it is unknown or malformed.
        """
        line = self._parsed()
        seconds = line.overrides.get("video_seconds", 0.0)
        if seconds > 1 / FRAMEPACK_FPS:
            if "one_frame_inference" in line.overrides:
                got = f"{self.named('f')} {round(seconds * FRAMEPACK_FPS)} with {self.named('of')}"
                raise UserError(self.where, got, "1 frame, or no one-frame options", "leave one of them out")
            defaults = replace(defaults, one_frame_inference=None)
        flags = line.over(defaults)
        if flags.prompt is None:
            given = 'prompt = "…"' if isinstance(self.entry, Mapping) else "it in front of the options"
            raise UserError(self.where, "no prompt", "a prompt", f"write {given}")
        return flags

    def named(self, letter: str) -> str:
        """What an option is called in this prompt."""
        return SAMPLE_OPTIONS[letter].key if isinstance(self.entry, Mapping) else f"--{letter}"

    def resolve(self, defaults: RequestFlags, resolve: Callable[[RequestFlags], T]) -> T:
        """What `resolve` makes of the flags; what it complains about is said in the terms of the prompt.

        Raises:
            UserError: see `over`, and what `resolve` raises.
        """
        flags = self.over(defaults)
        try:
            return resolve(flags)
        except UserError as error:
            error.where, error.complaint = self.in_its_terms(error.where), self.in_its_terms(error.complaint)
            raise UserError.within(self.where, error) from error

    def in_its_terms(self, text: str) -> str:
        """`text` with the names that options have here, instead of those of generation's flags."""
        names = {option.field: self.named(letter) for letter, option in SAMPLE_OPTIONS.items()}
        names["video_size"] = f"{self.named('h')} and {self.named('w')}"
        return re.sub(r"(?<!\S)--(\w+)", lambda match: names.get(match[1], match[0]), text)

    def _parsed(self) -> PromptLine:
        if isinstance(self.entry, str):
            return PromptLine.parse(self.entry, self.where, SAMPLE_OPTIONS)
        if isinstance(self.entry, Mapping):
            return _from_table(self.entry, self.where)
        raise UserError(self.where, shown(self.entry), 'a text, or a table such as {"prompt": "a cat"}', "change it")


def each(prompts: Iterable[SamplePrompt], convert: Callable[[SamplePrompt], T]) -> list[T]:
    """What `convert` makes of the prompts.

    Raises:
        UserErrors: what it raises, one line for each bad prompt.
    """
    results, errors = [], []
    for prompt in prompts:
        try:
            results.append(convert(prompt))
        except UserError as error:
            errors.append(UserError.within(prompt.where, error))
    if errors:
        raise UserErrors(errors)
    return results


# ---- files ----


def sample_prompts(path: str) -> tuple[SamplePrompt, ...]:
    """The prompts of a file, in its order; the suffix says of which kind it is.

    Raises:
        UserError: no such file, or not one of prompts.
    """
    file = Path(path)
    kind = file.suffix.lower()
    if kind not in FIRST:
        raise UserError(FLAG, path, "a .txt, .toml or .json file", "rename or convert it")
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UserError(FLAG, path, "a UTF-8 text file", f"check the path ({error})") from error
    try:
        entries = {".txt": numbered_lines, ".toml": _toml_entries, ".json": _json_entries}[kind](text)
    except (ValueError, RecursionError) as error:  # the libraries' own errors are ValueErrors
        raise UserError(FLAG, path, f"valid {kind[1:].upper()}", f"mend it ({error})") from error
    except UserError as error:
        raise UserError.within(file.name, error) from None
    if not entries:
        raise UserError(FLAG, path, "at least one prompt", "write one")
    word = FIRST[kind]
    return tuple(
        SamplePrompt(number=number, where=f"{file.name} {word} {place}", entry=entry)
        for number, (place, entry) in enumerate(entries)
    )


def _toml_entries(text: str) -> list[tuple[int, object]]:
    data = tomllib.loads(text)
    for name in data:
        if name != PROMPT:
            raise UserError(name, "an unknown table or key", f"[{PROMPT}] only", f"write it below [{PROMPT}]")
    common = data.get(PROMPT, {})
    if not isinstance(common, Mapping):
        raise UserError(PROMPT, shown(common), "a table", "write [prompt], and [[prompt.subset]] above each prompt")
    shared = {key: value for key, value in common.items() if key != SUBSET}
    for key in shared.keys() - {PROMPT}:
        _known(key, f"[{PROMPT}]")
    subsets = common.get(SUBSET, [{}] if shared else [])
    if not isinstance(subsets, list) or not all(isinstance(subset, Mapping) for subset in subsets):
        raise UserError(f"{PROMPT}.{SUBSET}", shown(subsets), "tables", "write [[prompt.subset]] above each prompt")
    return list(enumerate(({**shared, **subset} for subset in subsets), 1))


def _json_entries(text: str) -> list[tuple[int, object]]:
    data = json.loads(text)
    if not isinstance(data, list):
        raise UserError("its top", shown(data), "a list of texts and tables", "put [ ] around it")
    return list(enumerate(data, 1))


# ---- tables ----


def _from_table(table: Mapping[str, object], where: str) -> PromptLine:
    prompt, overrides = table.get(PROMPT), {}
    if not isinstance(prompt, str | None):
        raise UserError(where, f"{PROMPT} = {shown(prompt)}", "a text", "put it in quotes")
    for key, value in table.items():
        if key == PROMPT or value is None:
            continue
        letter = _known(key, where)
        option = SAMPLE_OPTIONS[letter]
        name = letter if letter in SIDES else option.field
        if option.repeats:
            values = value if isinstance(value, list) else [value]
            overrides[name] = tuple(_value(option, item, where) for item in values)
        else:
            overrides[name] = _value(option, value, where)
    return PromptLine(prompt=prompt, overrides=overrides)


def _known(key: str, where: str) -> str:
    """The letter of a key.

    Raises:
        UserError: there is no such key.
    """
    if key in KEYS:
        return KEYS[key]
    meant = (option.key for letter, option in SAMPLE_OPTIONS.items() if key in (letter, option.field))
    short = next((f"here it is {known}" for known in meant), None)
    known = [PROMPT, *KEYS]
    raise UserError(where, key, "a known key", short or did_you_mean(key, known, f"choose one of {', '.join(known)}"))


def _value(option: LineOption, value: object, where: str) -> object:
    """By way of the text that a line would hold."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not isinstance(value, str) and not (is_number and option.convert is not str):
        expected = "a text" if option.convert is str else option.help
        raise UserError(where, f"{option.key} = {shown(value)}", expected, "change it")
    return option.read(str(value).strip(), option.key, where)
