"""Classifier-free guidance, at every step or at some, and skip-layer guidance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from torch import Tensor

from options.guidance import CfgSkipMode, GuidanceOptions, SkipLayers, count_of

Pass = Literal["positive", "negative", "skipping"]
"""A run of the transformer: with the prompt, with the negative prompt, or with that and without some blocks."""


@dataclass(frozen=True, kw_only=True)
class StepGuidance:
    """The passes of one step and how their predictions are combined."""

    away_from: Literal["negative", "skipping"] | None = None
    """What classifier-free guidance leads away from; None: it is off."""
    cfg_scale: float = 1.0
    skip_scale: float = 0.0
    """Of positive - skipping, which is added."""
    skipped_blocks: tuple[int, ...] = ()
    """By the skipping pass."""

    @property
    def passes(self) -> tuple[Pass, ...]:
        """Those that `combine` needs, the positive one first."""
        wanted = {"positive", self.away_from, "skipping" if self.skip_scale else None}
        return tuple(name for name in ("positive", "negative", "skipping") if name in wanted)

    def combine(self, predictions: Mapping[Pass, Tensor]) -> Tensor:
        """The guided prediction."""
        positive = result = predictions["positive"]
        if self.away_from is not None:
            result = guided(positive, predictions[self.away_from], self.cfg_scale)
        if self.skip_scale:
            result = result + self.skip_scale * (positive - predictions["skipping"])
        return result


def plan_guidance(num_steps: int, cfg_scale: float, options: GuidanceOptions) -> tuple[StepGuidance, ...]:
    """The guidance of every step; a pass that would weigh nothing, as the negative one at scale 1, is not run."""
    slg = options.skip_layers
    skipping = range(0) if slg is None else slg.steps(num_steps)
    applied = enumerate(cfg_steps(options.cfg_skip_mode, options.cfg_apply_ratio, num_steps))
    plain = StepGuidance()
    return tuple(_with_cfg(cfg_scale, slg if step in skipping else None) if cfg else plain for step, cfg in applied)


def needs_negative(steps: Iterable[StepGuidance]) -> bool:
    """Whether any pass is told the negative prompt."""
    return any(name != "positive" for step in steps for name in step.passes)


def _with_cfg(cfg_scale: float, slg: SkipLayers | None) -> StepGuidance:
    """The guidance of a step that CFG is applied at."""
    away_from = "skipping" if slg is not None and slg.mode == "uncond" else "negative"
    return StepGuidance(
        away_from=None if cfg_scale == 1 else away_from,
        cfg_scale=cfg_scale,
        skip_scale=slg.scale if slg is not None and slg.mode == "original" else 0.0,
        skipped_blocks=() if slg is None else slg.blocks,
    )


def cfg_steps(mode: CfgSkipMode, ratio: float | None, num_steps: int) -> tuple[bool, ...]:
    """Whether classifier-free guidance is applied, by step.

    Args:
        mode: where the steps without it lie; `early_late`: at both ends, `alternate`: all over, evenly.
        ratio: share of the steps with it; None: all of them.
    """
    if mode == "none" or ratio is None:
        return (True,) * num_steps
    if mode == "alternate":
        counts = (count_of(ratio, steps) for steps in range(num_steps + 1))
        return tuple(count > before for before, count in pairwise(counts))
    count = count_of(ratio, num_steps)
    skipped = num_steps - count
    applied = {
        "early": range(skipped, num_steps),
        "late": range(count),
        "middle": (*range(count // 2), *range(count // 2 + skipped, num_steps)),
        "early_late": range(skipped // 2, skipped // 2 + count),
    }
    return tuple(step in applied[mode] for step in range(num_steps))


def guided(positive: Tensor, negative: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """negative + scale·(positive - negative), optionally pulled back to the positive's contrast.

    Args:
        rescale: phi in [0, 1]; 0 leaves the result, 1 gives it the standard deviation of `positive` per sample.

    Source: Ho & Salimans 2022; Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", 2023.
    """
    result = negative + scale * (positive - negative)
    if rescale == 0:
        return result
    axes = tuple(range(1, result.ndim))
    ratio = positive.std(dim=axes, keepdim=True) / result.std(dim=axes, keepdim=True)
    return rescale * (result * ratio) + (1 - rescale) * result
