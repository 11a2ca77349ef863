"""The flags of `wan_generate_video.py` that spread guidance over the steps."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields

from options.errors import UserError
from options.flag_fields import flag
from options.guidance import CfgSkipMode, GuidanceOptions, SkipLayerMode, SkipLayers


@dataclass(frozen=True, kw_only=True)
class WanGuidanceFlags:
    """Steps without classifier-free guidance, and guidance by skipped blocks."""

    cfg_skip_mode: CfgSkipMode = flag(
        "which steps go without CFG, and so twice as fast; --cfg_apply_ratio says how many", default="none"
    )
    cfg_apply_ratio: float | None = flag("share of the steps with CFG, 0 to 1, for --cfg_skip_mode")
    slg_layers: str | None = flag("skip-layer guidance: blocks to skip, as 9,10; numbered from 0")
    slg_scale: float = flag("its scale, with --slg_mode original", default=3.0)
    slg_start: float = flag("share of the steps that come before it", default=0.0)
    slg_end: float = flag("share of the steps after which it ends", default=0.3)
    slg_mode: SkipLayerMode | None = flag(
        "turns it on; original: one more pass for each step; uncond: CFG's negative pass skips the blocks"
    )

    def guidance_options(self) -> GuidanceOptions:
        """What they mean together.

        Raises:
            UserError: a value that suits no run.
        """
        blocks, skip_layers = parse_layers(self.slg_layers), None
        if blocks and self.slg_mode is not None:
            numbers = {"scale": self.slg_scale, "start": self.slg_start, "end": self.slg_end}
            skip_layers = SkipLayers(blocks=blocks, mode=self.slg_mode, **numbers)
        options = GuidanceOptions(
            cfg_skip_mode=self.cfg_skip_mode, cfg_apply_ratio=self.cfg_apply_ratio, skip_layers=skip_layers
        )
        options.check()
        return options

    def guidance_hints(self) -> Iterator[str]:
        """What has no effect, for the log."""
        if self.cfg_skip_mode != "none" and self.cfg_apply_ratio is None:
            yield "--cfg_skip_mode has no effect without --cfg_apply_ratio"
        if self.cfg_apply_ratio is not None and self.cfg_skip_mode == "none":
            yield "--cfg_apply_ratio has no effect without --cfg_skip_mode"
        if self.slg_mode is not None and self.slg_layers is None:
            yield "--slg_mode has no effect without --slg_layers"
        slg = [field for field in fields(self) if field.name.startswith("slg_") and field.name != "slg_mode"]
        given = [field.name for field in slg if getattr(self, field.name) != field.default]
        if self.slg_mode is None:
            yield from (f"--{name} has no effect without --slg_mode" for name in given)
        elif self.slg_mode == "uncond" and "slg_scale" in given:
            yield "--slg_scale has no effect with --slg_mode uncond"


def parse_layers(text: str | None) -> tuple[int, ...]:
    """`9,10` as numbers, rising; whether the transformer has such blocks, `options.guidance.check_layers` finds out.

    Raises:
        UserError: something else stands there.
    """
    if text is None:
        return ()
    values = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,3}", value) for value in values):
        raise UserError("--slg_layers", text or "nothing", "a comma list of block numbers from 0", "write 9,10, say")
    return tuple(sorted(set(map(int, values))))
