"""Flags that say which noise levels training sees, and how the loss is weighted over them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

from options.errors import UserError, UserErrors
from options.flag_fields import flag

SHIFTED_BY_SIZE = ("flux_shift", "flux2_shift", "qwen_shift", "krea2_shift")
MAX_MODE_SCALE = 2 / (math.pi - 2)
"""Beyond it, or below -1, the density folds over itself. Source: Esser et al., "Scaling Rectified Flow
Transformers", 2024."""


@dataclass(frozen=True, kw_only=True)
class TimestepFlags:
    """How noise levels are drawn. Timesteps run from 0 (clean) to 1000 (noise)."""

    timestep_sampling: Literal[
        "sigma", "uniform", "sigmoid", "shift", "flux_shift", "flux2_shift", "ideogram4_shift", "qwen_shift",
        "krea2_shift", "logsnr", "qinglong_flux", "qinglong_qwen",
    ] = flag("how timesteps are drawn", default="sigma")  # fmt: skip
    discrete_flow_shift: float = flag("sigma, shift: above 1 draws more noise, below 1 less", default=1.0)
    sigmoid_scale: float = flag("sigmoid and the shifts: how far the draws spread", default=1.0)
    weighting_scheme: Literal["logit_normal", "mode", "cosmap", "sigma_sqrt", "none"] = flag(
        "cosmap, sigma_sqrt: weight of the loss; logit_normal, mode: density that sigma draws from", default="none"
    )
    logit_mean: float = flag("mean of logit_normal and logsnr: above 0 draws less noise", default=0.0)
    logit_std: float = flag("standard deviation of the same", default=1.0)
    mode_scale: float = flag("mode: above 0 draws more from the middle, below 0 from the ends", default=1.29)
    min_timestep: int | None = flag("lowest timestep that is trained (default: 0)")
    max_timestep: int | None = flag("highest timestep that is trained (default: 1000)")
    preserve_distribution_shape: bool = flag("cut the distribution to that range, do not squeeze it in", default=False)
    num_timestep_buckets: int | None = flag("2 or more: an epoch draws equally often from so many quantiles")
    show_timesteps: Literal["image", "console"] | None = flag(
        "show how timesteps are drawn, as timesteps.png or as text, then exit"
    )

    @property
    def sigma_range(self) -> tuple[float, float]:
        """The range that is trained, as sigmas in [0, 1]."""
        low = 0 if self.min_timestep is None else self.min_timestep
        high = 1000 if self.max_timestep is None else self.max_timestep
        return low / 1000, high / 1000

    @property
    def num_strata(self) -> int | None:
        """Quantiles that an epoch draws from equally often; None draws every item for itself."""
        return self.num_timestep_buckets if (self.num_timestep_buckets or 0) >= 2 else None


def check_timesteps(flags: TimestepFlags) -> None:
    """Refuses what no distribution can be made of.

    Raises:
        UserErrors: one line for each value.
    """
    if found := list(_problems(flags)):
        raise UserErrors(found)


def _problems(flags: TimestepFlags) -> Iterator[UserError]:
    if flags.timestep_sampling == "ideogram4_shift":
        expected, remedy = "a method for video models", "it is not supported, being made for another model; use shift"
        yield UserError("--timestep_sampling", flags.timestep_sampling, expected, remedy)
    for name in ("discrete_flow_shift", "sigmoid_scale", "logit_std"):
        value = getattr(flags, name)
        if not 0 < value < math.inf:
            yield UserError(f"--{name}", value, "a number above 0", "leave it out for 1.0")
    if not math.isfinite(flags.logit_mean):
        yield UserError("--logit_mean", flags.logit_mean, "a finite number", "leave it out for 0.0")
    if flags.weighting_scheme == "mode" and not -1 <= flags.mode_scale <= MAX_MODE_SCALE:
        expected = f"-1 to {MAX_MODE_SCALE:.4f}, or the density folds over itself"
        yield UserError("--mode_scale", flags.mode_scale, expected, "leave it out for 1.29")
    if flags.num_timestep_buckets is not None and flags.num_timestep_buckets < 0:
        expected = "2 or more; 0 and 1 are off"
        yield UserError("--num_timestep_buckets", flags.num_timestep_buckets, expected, "leave it out to turn it off")
    yield from _range_problems(flags)


def _range_problems(flags: TimestepFlags) -> Iterator[UserError]:
    lowest, highest = flags.min_timestep, flags.max_timestep
    if lowest is not None and not 0 <= lowest <= 999:
        yield UserError("--min_timestep", lowest, "0 to 999", "0 is clean, 1000 is noise; leave it out for 0")
    elif highest is not None and not 1 <= highest <= 1000:
        yield UserError("--max_timestep", highest, "1 to 1000", "0 is clean, 1000 is noise; leave it out for 1000")
    elif lowest is not None and highest is not None and lowest >= highest:
        expected = f"more than --min_timestep {lowest}"
        yield UserError("--max_timestep", highest, expected, "exchange them, or leave one out")


def settings_read(flags: TimestepFlags) -> tuple[str, ...]:
    """The names of the flags that have an effect together with this method and weighting."""
    method, weighting = flags.timestep_sampling, flags.weighting_scheme
    density = method == "sigma" and weighting in ("logit_normal", "mode")
    has_range = flags.sigma_range != (0.0, 1.0)
    reads = {
        "timestep_sampling": True,
        "discrete_flow_shift": method in ("sigma", "shift"),
        "sigmoid_scale": method in ("sigmoid", "shift", "qinglong_flux", "qinglong_qwen", *SHIFTED_BY_SIZE),
        "weighting_scheme": density or weighting not in ("logit_normal", "mode"),
        "logit_mean": method in ("logsnr", "qinglong_flux") or (density and weighting == "logit_normal"),
        "logit_std": method in ("logsnr", "qinglong_flux") or (density and weighting == "logit_normal"),
        "mode_scale": density and weighting == "mode",
        "min_timestep": True,
        "max_timestep": True,
        "preserve_distribution_shape": has_range,
        "num_timestep_buckets": True,
        "show_timesteps": True,
    }
    return tuple(name for name, is_read in reads.items() if is_read)


def unread_settings(flags: TimestepFlags) -> tuple[str, ...]:
    """One line for the log for each flag that was changed and has no effect."""
    read = settings_read(flags)
    changed = [field.name for field in fields(flags) if getattr(flags, field.name) != field.default]
    return tuple(
        f"--{name} {getattr(flags, name)} has no effect with --timestep_sampling {flags.timestep_sampling} "
        f"and --weighting_scheme {flags.weighting_scheme}"
        for name in changed
        if name not in read
    )
