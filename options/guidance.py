"""How guidance is spread over the denoising steps: CFG skipping and skip-layer guidance."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from options.errors import UserError
from options.step_count import StepCount

CfgSkipMode = Literal["early", "late", "middle", "early_late", "alternate", "none"]
SkipLayerMode = Literal["original", "uncond"]
MAX_SCALE = 1_000
"""Far beyond what is useful; what lies outside is a typing error."""


@dataclass(frozen=True, kw_only=True)
class SkipLayers:
    """Guidance away from what the transformer predicts for the negative prompt without some of its blocks."""

    blocks: tuple[int, ...]
    """From 0."""
    mode: SkipLayerMode
    """`original`: a third prediction beside CFG's two; `uncond`: it takes the place of CFG's negative one."""
    scale: float = 3.0
    """Of `original`."""
    start: float = 0.0
    """Share of the steps that come before it."""
    end: float = 0.3
    """Share of the steps after which it ends."""

    def steps(self, num_steps: int) -> range:
        """Those it is used at, where CFG is."""
        return range(count_of(self.start, num_steps), count_of(self.end, num_steps))

    def check(self) -> None:
        """Raises UserError for numbers that suit no run."""
        _check_share("--slg_start", self.start)
        _check_share("--slg_end", self.end)
        if not abs(self.scale) <= MAX_SCALE:  # also true for nan
            raise UserError("--slg_scale", self.scale, f"a number from {-MAX_SCALE} to {MAX_SCALE}", "change it")
        if not self.blocks or min(self.blocks) < 0:
            raise UserError("--slg_layers", _listed(self.blocks), "numbers of blocks from 0", "give 9,10, say")


@dataclass(frozen=True, kw_only=True)
class GuidanceOptions:
    """By default every step is guided, by CFG alone."""

    cfg_skip_mode: CfgSkipMode = "none"
    """Where the steps without CFG lie: `early_late` is at both ends, `alternate` all over, evenly."""
    cfg_apply_ratio: float | None = None
    """Share of the steps with CFG; None: all."""
    skip_layers: SkipLayers | None = None

    def check(self) -> None:
        """Raises UserError for numbers that suit no run."""
        if self.cfg_apply_ratio is not None:
            _check_share("--cfg_apply_ratio", self.cfg_apply_ratio)
        if self.skip_layers is not None:
            self.skip_layers.check()

    def hints(self, *, num_steps: int, cfg_scale: float) -> Iterator[str]:
        """What has no effect in such a run, for the log."""
        slg = self.skip_layers
        if cfg_scale == 1 and self.cfg_skip_mode != "none" and slg is None:
            yield "--cfg_skip_mode has no effect with --guidance_scale 1"
        if slg is not None and not slg.steps(num_steps):
            yield f"--slg_mode has no effect: no step of {num_steps} is between shares {slg.start} and {slg.end}"
        elif slg is not None and slg.mode == "uncond" and cfg_scale == 1:
            yield "--slg_mode uncond has no effect with --guidance_scale 1"


def count_of(share: float, num_steps: int) -> int:
    """A share of the steps, rounded down."""
    return StepCount(value=float(share)).of(num_steps)


def check_layers(layers: Iterable[int], num_blocks: int) -> None:
    """Raises UserError unless a transformer of `num_blocks` blocks has all of `layers` to skip."""
    if absent := [layer for layer in layers if not 0 <= layer < num_blocks]:
        expected = f"numbers from 0 to {num_blocks - 1}, for the transformer has {num_blocks} blocks"
        raise UserError("--slg_layers", _listed(absent), expected, "leave them out")


def _check_share(flag: str, value: float) -> None:
    if not 0 <= value <= 1:  # also true for nan
        raise UserError(flag, value, "a share of the steps from 0 to 1", "use 0.5 for half of them, say")


def _listed(layers: Iterable[int]) -> str:
    return ",".join(map(str, layers)) or "nothing"
