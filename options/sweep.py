"""Sweeps: `target_index=1..9`, `seed=1,2,3`, `control_index.1=4..16:4`: one request per value, two make a grid."""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from options.errors import UserError, did_you_mean
from options.flags_generate import RequestFlags, split_image_list
from options.lora import parse_prompt_lora
from options.one_frame import OneFrameOptions

INTEGER_NAMES = ("target_index", "latent_window_size", "control_index", "seed")
NUMBER_NAMES = ("guidance_scale", "embedded_cfg_scale", "flow_shift", "lora")
KNOWN = (*INTEGER_NAMES, *NUMBER_NAMES)
NUMBER = r"[0-9]{1,15}(?:\.[0-9]{1,15})?"
RANGE = re.compile(rf"(?P<first>-?{NUMBER})\.\.(?P<last>-?{NUMBER})(?::(?P<step>{NUMBER}))?")
MAX_VALUES = 1000


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One axis."""

    name: str
    """As the user wrote it, with the number of the control image in `control_index.1`."""
    values: tuple[float, ...]
    """Integers where the setting is one."""

    @classmethod
    def parse(cls, text: str, where: str = "--sweep") -> Sweep:
        """Parses `name=values`; values are a list `4,6,9`, a range `1..9`, a range with a step `1..40:3`, or a mixture.

        Raises:
            UserError: an unknown setting, or no values.
        """
        name, has_values, values = (part.strip() for part in text.partition("="))
        setting, _, position = name.partition(".")
        if setting not in KNOWN or (setting == "control_index") != position.isdecimal():
            known = ", ".join("control_index.N" if known == "control_index" else known for known in KNOWN)
            raise UserError(where, text, f"name=values, the name one of {known}", _name_remedy(setting, position))
        kind = int if setting in INTEGER_NAMES else float
        found = [value for item in values.split(",") for value in _values(item.strip(), kind, text, where)]
        if not has_values or len(found) > MAX_VALUES or len(set(found)) < len(found):
            raise UserError(where, text, f"1 to {MAX_VALUES} different values", f"write {name}=1..9, say")
        return cls(name=name, values=tuple(found))

    def set(self, flags: RequestFlags, value: float, where: str = "--sweep") -> RequestFlags:
        """`flags` with this setting at `value`.

        Raises:
            UserError: an index is swept without one-frame inference, or of a control image that has none.
        """
        setting, _, position = self.name.partition(".")
        if setting == "lora":
            return replace(flags, lora=_with_multiplier(flags.lora, value, where))
        if setting not in ("target_index", "control_index"):
            if not hasattr(flags, setting):
                raise UserError(where, self.name, "a setting of this model", f"leave --{setting} to FramePack")
            return replace(flags, **{setting: value})
        if flags.one_frame_inference is None:
            raise UserError(where, self.name, "--one_frame_inference beside it", "add --one_frame_inference default")
        options = OneFrameOptions.parse(flags.one_frame_inference)
        if setting == "target_index":
            options = replace(options, target_index=value)
        else:
            indices = list(options.resolve(len(flags.control_image_path)).control_indices)
            if int(position) >= len(indices):
                expected = f"control_index.0 to control_index.{len(indices) - 1}" if indices else "a control image"
                raise UserError(where, self.name, expected, "count control images from 0")
            indices[int(position)] = value
            options = replace(options, control_indices=tuple(indices))
        return replace(flags, one_frame_inference=str(options))


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """One cell of the grid."""

    label: str
    flags: RequestFlags


def sweep_points(flags: RequestFlags, sweeps: Sequence[Sweep]) -> list[SweepPoint]:
    """All combinations, the last sweep running fastest. A seed that was left open is drawn once for all.

    Raises:
        UserError: more than two sweeps, or the same one twice.
    """
    if len(sweeps) > 2 or len({sweep.name for sweep in sweeps}) < len(sweeps):
        got = " ".join(sweep.name for sweep in sweeps)
        raise UserError("--sweep", got, "one or two different settings", "leave one out")
    seed = secrets.randbits(32) if flags.seed is None else flags.seed
    points = [SweepPoint(label="", flags=split_image_list(replace(flags, seed=seed)))]
    for sweep in sweeps:
        points = [
            SweepPoint(label=f"{point.label} {sweep.name}={value}".strip(), flags=sweep.set(point.flags, value))
            for point in points
            for value in sweep.values
        ]
    return points


def _with_multiplier(loras: tuple[str, ...], multiplier: float, where: str) -> tuple[str, ...]:
    """The same LoRAs, each this strong.

    Raises:
        UserError: there are none.
    """
    if not loras:
        raise UserError(where, "lora", "--lora beside it", "add --lora FILE, whose multiplier is swept")
    return tuple(f"{parse_prompt_lora(text).path}:{multiplier}" for text in loras)


def _values(item: str, kind: Callable[[str], float], text: str, where: str) -> list[float]:
    """One item of the list: a value or a range, both ends included."""
    match = RANGE.fullmatch(item)
    try:
        if not match:
            return [kind(item)]
        first, last, step = kind(match["first"]), kind(match["last"]), kind(match["step"] or "1")
    except ValueError:
        expected = "integers" if kind is int else "numbers"
        raise UserError(where, text, f"{expected}: 4,6,9 or 1..9 or 1..40:3", f"change {item or 'the list'}") from None
    if step <= 0 or last < first or (last - first) / step >= MAX_VALUES:
        remedy = f"write {first}..{last}:1, with first below last"
        raise UserError(where, text, f"a rising range of at most {MAX_VALUES} values", remedy)
    count = int((last - first) / step + 1e-9) + 1
    return [kind(round(first + step * i, 10)) for i in range(count)]  # rounded: 0.1 steps shall not drift


def _name_remedy(setting: str, position: str) -> str:
    if setting == "control_index" and not position:
        return "name the control image: control_index.0"
    return did_you_mean(setting, KNOWN, "choose one of them")
