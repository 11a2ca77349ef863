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
from functools import partial
from pathlib import Path
from typing import TypeVar

from options.errors import UserError, UserErrors, did_you_mean, shown
from options.flags_generate import RequestFlags
from options.line_options import LineOption
from options.prompt_line import SIDES, PromptLine, numbered_lines

FLAG = "--sample_prompts"
FIRST = {".txt": "line", ".toml": "prompt", ".json": "entry"}
"""Kinds of files, and what a prompt is called in each."""
T = TypeVar("T")


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
    options: Mapping[str, LineOption]
    """What it may say, by letter; each has its key in TOML and JSON. `guidance_scale` as a key is the distilled one."""

    def over(self, defaults: RequestFlags) -> RequestFlags:
        """`defaults` with what the prompt says in their place.

        More than one frame makes a video, also where `defaults` ask for one-frame pictures.

        Raises:
            UserError: it is not a text or a table, or something in it is unknown or malformed.
        """
        line = self._parsed()
        flags = line.over(defaults)
        if self.options["f"].field in line.overrides and flags.num_frames > 1:
            if "one_frame_inference" in line.overrides:
                got = f"{self.named('f')} {flags.num_frames} with {self.named('of')}"
                raise UserError(self.where, got, "1 frame, or no one-frame options", "leave one of them out")
            flags = replace(flags, one_frame_inference=None)
        if flags.prompt is None:
            given = 'prompt = "…"' if isinstance(self.entry, Mapping) else "it in front of the options"
            raise UserError(self.where, "no prompt", "a prompt", f"write {given}")
        return flags

    def named(self, letter: str) -> str:
        """What an option is called in this prompt."""
        return self.options[letter].key if isinstance(self.entry, Mapping) else f"--{letter}"

    def resolve(self, defaults: RequestFlags, resolve: Callable[[RequestFlags], T]) -> T:
        """What `resolve` makes of the flags; what it complains about is said in the terms of the prompt.

        Raises:
            UserError: see `over`, and what `resolve` raises.
        """
        flags = self.over(defaults)
        try:
            return resolve(flags)
        except UserError as error:
            raise UserError.within(self.where, error.reworded(self.in_its_terms, self.in_its_terms)) from error

    def in_its_terms(self, text: str) -> str:
        """`text` with the names that options have here, instead of those of generation's flags."""
        names = {option.field: self.named(letter) for letter, option in self.options.items()}
        names["video_size"] = f"{self.named('h')} and {self.named('w')}"
        return re.sub(r"(?<!\S)--(\w+)", lambda match: names.get(match[1], match[0]), text)

    def _parsed(self) -> PromptLine:
        if isinstance(self.entry, str):
            return PromptLine.parse(self.entry, self.where, self.options)
        if isinstance(self.entry, Mapping):
            return _from_table(self.entry, self.where, self.options)
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


def sample_prompts(path: str, options: Mapping[str, LineOption]) -> tuple[SamplePrompt, ...]:
    """The prompts of a file, in its order; the suffix says of which kind it is.

    Args:
        options: what they may say.

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
        entries = {".txt": numbered_lines, ".toml": partial(_toml_entries, options=options), ".json": _json_entries}[
            kind
        ](text)
    except (ValueError, RecursionError) as error:  # the libraries' own errors are ValueErrors
        raise UserError(FLAG, path, f"valid {kind[1:].upper()}", f"mend it ({error})") from error
    except UserError as error:
        raise UserError.within(file.name, error) from None
    if not entries:
        raise UserError(FLAG, path, "at least one prompt", "write one")
    word = FIRST[kind]
    return tuple(
        SamplePrompt(number=number, where=f"{file.name} {word} {place}", entry=entry, options=options)
        for number, (place, entry) in enumerate(entries)
    )


def _toml_entries(text: str, options: Mapping[str, LineOption]) -> list[tuple[int, object]]:
    data = tomllib.loads(text)
    for name in data:
        if name != PROMPT:
            raise UserError(name, "an unknown table or key", f"[{PROMPT}] only", f"write it below [{PROMPT}]")
    common = data.get(PROMPT, {})
    if not isinstance(common, Mapping):
        raise UserError(PROMPT, shown(common), "a table", "write [prompt], and [[prompt.subset]] above each prompt")
    shared = {key: value for key, value in common.items() if key != SUBSET}
    for key in shared.keys() - {PROMPT}:
        _known(key, f"[{PROMPT}]", options)
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


def _from_table(table: Mapping[str, object], where: str, options: Mapping[str, LineOption]) -> PromptLine:
    prompt, overrides = table.get(PROMPT), {}
    if not isinstance(prompt, str | None):
        raise UserError(where, f"{PROMPT} = {shown(prompt)}", "a text", "put it in quotes")
    for key, value in table.items():
        if key == PROMPT or value is None:
            continue
        letter = _known(key, where, options)
        option = options[letter]
        name = letter if letter in SIDES else option.field
        if option.repeats:
            values = value if isinstance(value, list) else [value]
            converted = tuple(_value(option, item, where) for item in values)
        else:
            converted = _value(option, value, where)
        if option.has_effect:
            overrides[name] = converted
    return PromptLine(prompt=prompt, overrides=overrides)


def _known(key: str, where: str, options: Mapping[str, LineOption]) -> str:
    """The letter of a key.

    Raises:
        UserError: there is no such key.
    """
    letters = {option.key: letter for letter, option in options.items()}
    if key in letters:
        return letters[key]
    meant = (option.key for letter, option in options.items() if key in (letter, option.field))
    short = next((f"here it is {known}" for known in meant), None)
    known = [PROMPT, *letters]
    raise UserError(where, key, "a known key", short or did_you_mean(key, known, f"choose one of {', '.join(known)}"))


def _value(option: LineOption, value: object, where: str) -> object:
    """By way of the text that a line would hold."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not isinstance(value, str) and not (is_number and option.convert is not str):
        expected = "a text" if option.convert is str else option.help
        raise UserError(where, f"{option.key} = {shown(value)}", expected, "change it")
    return option.read(str(value).strip(), option.key, where)
