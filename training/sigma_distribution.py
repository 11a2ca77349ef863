"""How the noise levels of training are distributed.

All methods have one form: a uniform number u in (0, 1) is a *quantile*, and an increasing function turns it into a
sigma in [0, 1]. Most are logistic, sigma = 1 / (1 + exp(-(mu + scale·R))) with R the normal quantile of u:

    sigmoid         mu 0, scale sigmoid_scale
    shift           the same with mu ln(discrete_flow_shift), since a shift by k adds ln k to the logit
    *_shift         the same with a mu that grows with the size of the picture
    logsnr          mu -logit_mean / 2, scale logit_std / 2, as the logarithm of (1 - sigma)² / sigma² is -2·logit
    logit_normal    (of `sigma`) mu ln(discrete_flow_shift) - logit_mean, scale logit_std

With quantiles, strata of equal probability are intervals of u, and cutting the distribution to a range of timesteps
is cutting u to an interval: what drawing again and again until a draw fits would give, in one draw.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from statistics import NormalDist

from modules.flow_matching import NUM_TIMESTEPS, linear_mu, shifted
from options.flags_timesteps import TimestepFlags

EDGE = 1e-7
"""Quantiles stay this far from 0 and 1, where logistic sigmas would be exactly 0 and 1."""
MIN_PROBABILITY = 1e-6
"""A range of timesteps that fewer draws than this would fall into cannot be cut out."""
THINNEST = 1e-12
"""A component of which less is left has no quantiles that floats tell apart."""

TAIL_LOGIT_MEAN, TAIL_LOGIT_STD = 5.36, 1.0
"""Log-SNR of the almost clean draws that the qinglong methods mix in."""

Quantile = Callable[[float], float]
"""Quantile in (0, 1) -> sigma in [0, 1], increasing."""


class UnreachableRange(ValueError):
    """No draw falls into the range of timesteps."""

    def __init__(self, probability: float) -> None:
        super().__init__(f"a range with probability {probability}")
        self.probability = probability


@dataclass(frozen=True, kw_only=True)
class Component:
    """A part of a mixture."""

    probability: float
    sigma: Quantile
    low: float = 0.0
    high: float = 1.0
    """The quantiles that are drawn from."""

    def at(self, quantile: float) -> float:
        return self.sigma(self.low + (self.high - self.low) * quantile)

    def within(self, low: float, high: float) -> Component:
        """Cut to a range of sigmas, with the probability that is left."""
        low, high = (_quantile_of(sigma, self.sigma) for sigma in (low, high))
        return replace(self, probability=self.probability * (high - low), low=low, high=high)


def _quantile_of(target: float, sigma: Quantile) -> float:
    """The inverse, by halving: as exact as a float is."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if sigma(middle) < target else (low, middle)
    return low if high < 1 else 1.0


@dataclass(frozen=True, kw_only=True)
class SigmaDistribution:
    """How the sigmas of items of one size are distributed."""

    components: tuple[Component, ...]
    low: float
    high: float
    """Sigmas lie between these."""
    is_squeezed: bool
    """The components cover [0, 1] and are to be scaled into the range; else they were cut to it."""
    is_whole: bool
    """Timesteps are whole numbers, rounded up, so that no draw is exactly clean."""

    def at(self, quantile: float, *, mix: float) -> float:
        """The sigma at a quantile of the component that `mix` in (0, 1) picks."""
        sigma = self._picked(mix).at(min(max(quantile, EDGE), 1 - EDGE))
        if self.is_squeezed:
            sigma = self.low + (self.high - self.low) * sigma
        if self.is_whole:
            sigma = math.ceil(NUM_TIMESTEPS * sigma) / NUM_TIMESTEPS
        return sigma

    def _picked(self, mix: float) -> Component:
        rest = mix * sum(component.probability for component in self.components)
        for component in self.components:
            rest -= component.probability
            if rest < 0:
                break
        return component


@cache
def sigma_distribution(flags: TimestepFlags, latent_size: tuple[int, int]) -> SigmaDistribution:
    """The distribution of a method at a latent size (h, w).

    Raises:
        UnreachableRange: the range of timesteps cannot be cut out of it.
    """
    low, high = flags.sigma_range
    components = _components(flags, *latent_size)
    is_cut = flags.preserve_distribution_shape and (low, high) != (0.0, 1.0)
    if is_cut:
        components = [component.within(low, high) for component in components]
        probability = sum(component.probability for component in components)
        if probability < MIN_PROBABILITY:
            raise UnreachableRange(probability)
        components = [component for component in components if component.probability > THINNEST]
    is_whole = flags.timestep_sampling == "sigma"
    return SigmaDistribution(
        components=tuple(components), low=low, high=high, is_squeezed=not is_cut, is_whole=is_whole
    )


def _components(flags: TimestepFlags, height: int, width: int) -> tuple[Component, ...]:
    tokens = (height // 2) * (width // 2)
    log_snr = _log_snr(flags.logit_mean, flags.logit_std)
    tail = _log_snr(TAIL_LOGIT_MEAN, TAIL_LOGIT_STD)
    spread = partial(_logistic, scale=flags.sigmoid_scale)
    flux = spread(linear_mu(tokens))
    qwen = spread(linear_mu(tokens, high=0.9, high_at=8192))
    mixtures = {
        "sigma": [(1.0, _density(flags))],
        "uniform": [(1.0, _uniform)],
        "sigmoid": [(1.0, spread(0.0))],
        "shift": [(1.0, spread(math.log(flags.discrete_flow_shift)))],
        "flux_shift": [(1.0, flux)],
        "flux2_shift": [(1.0, spread(linear_mu(height * width)))],
        "qwen_shift": [(1.0, qwen)],
        "krea2_shift": [(1.0, spread(linear_mu(tokens, high_at=6400)))],
        "logsnr": [(1.0, log_snr)],
        "qinglong_flux": [(0.79, flux), (0.11, log_snr), (0.10, tail)],
        "qinglong_qwen": [(0.95, qwen), (0.05, tail)],
    }
    mixture = mixtures[flags.timestep_sampling]
    return tuple(Component(probability=probability, sigma=sigma) for probability, sigma in mixture)


def _density(flags: TimestepFlags) -> Quantile:
    """What `sigma` draws from. The weighting schemes are densities of 1 - sigma, as their users know them."""
    shift = flags.discrete_flow_shift
    if flags.weighting_scheme == "logit_normal":
        return _logistic(math.log(shift) - flags.logit_mean, flags.logit_std)
    density = partial(_mode, scale=flags.mode_scale) if flags.weighting_scheme == "mode" else _uniform
    return lambda quantile: shifted(density(quantile), shift)


def _uniform(quantile: float) -> float:
    return quantile


def _mode(quantile: float, *, scale: float) -> float:
    """Source: Esser et al., "Scaling Rectified Flow Transformers", 2024, equation 20, as 1 - f(u)."""
    return quantile + scale * (math.cos(math.pi * quantile / 2) ** 2 - 1 + quantile)


def _logistic(mu: float, scale: float) -> Quantile:
    def sigma(quantile: float) -> float:
        logit = mu + scale * NormalDist().inv_cdf(quantile)
        # Of the two forms the one whose exponential cannot overflow.
        return 1 / (1 + math.exp(-logit)) if logit >= 0 else math.exp(logit) / (1 + math.exp(logit))

    return sigma


def _log_snr(mean: float, std: float) -> Quantile:
    return _logistic(-mean / 2, std / 2)
