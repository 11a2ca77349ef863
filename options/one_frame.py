"""One-frame options: `no_2x,no_4x,target_index=1,control_index=0;10`, from any door, parsed here and nowhere else."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from options.errors import UserError, UserErrors, did_you_mean

SWITCHES = ("no_2x", "no_4x", "no_post")
KNOWN = ("default", *SWITCHES, "target_index", "control_index")
QUOTE_HINT = "a ';' must be quoted in a shell: \"control_index=0;10\""
WAN_PLACES = 1024
"""Of Wan's time axis: indices are 0 to 1023."""
OTHER_TOOLS = {
    "control_indices": "control_index",
    "clean_index": "control_index",
    "clean_indices": "control_index",
    "history_index": "control_index (the index of the reference image)",
    "clean_latent_index": "control_index",
    "latent_index": "target_index (oichi's latent_index=0 is simply left out)",
    "latent_indices": "target_index",
    "use_clean_latents_2x": "no_2x (leave it out to use them)",
    "use_clean_latents_4x": "no_4x (leave it out to use them)",
    "use_clean_latents_post": "no_post (leave it out to use it)",
    "clean_latents_2x": "no_2x (leave it out to use them)",
    "clean_latents_4x": "no_4x (leave it out to use them)",
    "clean_latents_post": "no_post (leave it out to use it)",
}
"""Names of the same things elsewhere (FramePack-eichi/oichi, diffusion code) and what they are called here."""


@dataclass(frozen=True, kw_only=True)
class OneFrameOptions:
    """Where the generated picture and its control images stand on the time axis."""

    target_index: int | None = None
    """Index of the generated picture; None is `latent_window_size` (FramePack; Wan has no default)."""
    control_indices: tuple[int, ...] | None = None
    """One index per control image, in their order; None until `resolve`. FramePack alone has the three that follow."""
    no_2x: bool = False
    """Leave out the (zero) history at half resolution."""
    no_4x: bool = False
    """Leave out the (zero) history at quarter resolution."""
    no_post: bool = False
    """Leave out the (zero) frame behind the target: about 20 % faster, sometimes unstable."""

    @classmethod
    def parse(cls, text: str, where: str = "--one_frame_inference") -> OneFrameOptions:
        """Parses the comma list.

        Raises:
            UserError: an unknown or repeated key, a missing or malformed value.
        """
        values: dict[str, object] = {}
        for item in (piece.strip() for piece in text.split(",")):
            key, has_value, value = (part.strip() for part in item.partition("="))
            field = {"control_index": "control_indices"}.get(key, key)
            if field in values:
                raise UserError(where, f"{key} twice", "each option once", "keep one of them")
            if key in SWITCHES and not has_value:
                values[field] = True
            elif key == "target_index" and has_value:
                values[field] = _index(value, key, where)
            elif key == "control_index" and has_value:
                values[field] = tuple(_index(part.strip(), key, where) for part in value.split(";"))
            elif item != "default":
                raise _unknown(item, key, where)
        return cls(**values)

    def resolve(self, num_controls: int, where: str = "--one_frame_inference") -> OneFrameOptions:
        """The same with one control index per control image.

        Raises:
            UserError: the numbers differ, or several images have no index.
        """
        if self.control_indices is None:
            if num_controls > 1:
                got = f"{num_controls} control images and no control_index"
                raise UserError(where, got, "one index per control image", f"give control_index=a;b ({QUOTE_HINT})")
            return replace(self, control_indices=(0,) * num_controls)
        if len(self.control_indices) != num_controls:
            given = ";".join(map(str, self.control_indices))
            got = f"{len(self.control_indices)} control indices ({given}) for {num_controls} control images"
            raise UserError(where, got, "one index per control image", f"give as many as images; {QUOTE_HINT}")
        return self

    def resolve_wan(self, num_controls: int, where: str = "--one_frame_inference") -> OneFrameOptions:
        """`resolve` for Wan, where nothing has a default: the picture is one more frame among the control images.

        Raises:
            UserErrors: everything that is missing, contradicts the number of control images or lies outside the axis.
        """
        if problems := list(self._wan_problems(num_controls, where)):
            raise UserErrors(problems)
        return self

    def _wan_problems(self, num_controls: int, where: str) -> Iterator[UserError]:
        target, controls = self.target_index, self.control_indices
        if num_controls == 0:
            remedy = "give --control_image_path, usually the start image once more"
            yield UserError(where, "no control image", "at least one, as Wan makes the picture from them", remedy)
        yield from self._wan_lacks(where)
        if controls is not None and num_controls:
            try:
                self.resolve(num_controls, where)
            except UserError as error:
                yield error
        yield from wan_place_problems(target, controls or (), where)

    def _wan_lacks(self, where: str) -> Iterator[UserError]:
        lacking = {
            "target_index": (self.target_index, "the index of the picture", "target_index=1"),
            "control_index": (self.control_indices, "one index per control image", "control_index=0"),
        }
        lacking = {name: told for name, (value, *told) in lacking.items() if value is None}
        if lacking:
            expected, examples = zip(*lacking.values(), strict=True)
            remedy = f"give {','.join(examples)}, say" + (f"; {QUOTE_HINT}" if "control_index" in lacking else "")
            yield UserError(where, f"no {' and no '.join(lacking)}", " and ".join(expected), remedy)

    def wan_hints(self) -> list[str]:
        """Advice about options that Wan does not need, and index values that are rarely meant."""
        hints = []
        if ignored := [name for name in SWITCHES if getattr(self, name)]:
            hints.append(f"{', '.join(ignored)}: ignored, as Wan has no history and no post frame to leave out")
        if self.target_index == 0:
            hints.append("target_index=0 is the place of the start image; usual values are 1 and more")
        return hints

    def hints(self, window: int) -> list[str]:
        """Advice about index values that work but are rarely meant."""
        hints = []
        target = window if self.target_index is None else self.target_index
        if target == 0:
            hints.append("target_index=0 is the place of the start image; usual values are 1 to 13")
        if between := [index for index in self.control_indices or () if 0 < index < target]:
            place = f"control_index {between[0]} lies between 0 and target_index {target}"
            hints.append(f"{place}: right for 1f-mc; kisekaeichi wants it behind the target (10, say)")
        return hints

    def __str__(self) -> str:
        parts = [name for name in SWITCHES if getattr(self, name)]
        if self.target_index is not None:
            parts.append(f"target_index={self.target_index}")
        if self.control_indices:
            parts.append(f"control_index={';'.join(map(str, self.control_indices))}")
        return ",".join(parts) or "default"


def wan_place_problems(target: int | None, controls: Sequence[int], where: str) -> Iterator[UserError]:
    """Places that Wan's time axis does not have, or that the picture would share with a control image."""
    for key, index in (("target_index", target), *(("control_index", index) for index in controls)):
        if index is not None and index >= WAN_PLACES:
            remedy = "Wan's time axis ends there"
            yield UserError(where, f"{key}={index}", f"an index from 0 to {WAN_PLACES - 1}", remedy)
    if target in controls:
        got = f"target_index={target} and a control image at {target}"
        yield UserError(where, got, "a place of its own for the picture", "choose another target_index")


def _index(text: str, key: str, where: str) -> int:
    if not re.fullmatch(r"[0-9]{1,6}", text):
        remedy = f"give {key}=9, say" + (f"; {QUOTE_HINT}" if key == "control_index" else "")
        raise UserError(where, f"{key}={text[:40] or '(nothing)'}", "an integer from 0 to 999999", remedy)
    return int(text)


def _unknown(item: str, key: str, where: str) -> UserError:
    got = item or "an empty option"
    if key in KNOWN:
        if key.endswith("index"):
            return UserError(where, got, f"{key} with a value", f"write {key}=1, say")
        return UserError(where, got, f"{key} with no value", f"write {key}")
    if key in OTHER_TOOLS:
        return UserError(where, got, f"one of {', '.join(KNOWN)}", f"here it is called {OTHER_TOOLS[key]}")
    remedy = did_you_mean(key, KNOWN, "separate options by commas")
    return UserError(where, got, f"one of {', '.join(KNOWN)}", remedy)
