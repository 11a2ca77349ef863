"""Which noise level and which noise a training item gets: functions of the seed, the epoch and the item.

Nothing is drawn from a running generator. So a batch gets what its items would get alone, and neither the number of
processes nor an interruption changes anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import repeat

import torch
from torch import Tensor

from dataset.epochs import ItemKey, stable_number
from modules.flow_matching import NUM_TIMESTEPS
from options.errors import UserError
from options.flags_timesteps import TimestepFlags
from options.geometry import VAE_STRIDE
from training.sigma_distribution import MIN_PROBABILITY, UnreachableRange, sigma_distribution

MIN_WEIGHTED_SIGMA = 1 / NUM_TIMESTEPS
"""The smallest sigma of the published schedule: below it, sigma^-2 goes on as it is there, 10⁶."""


def item_seed(seed: int, epoch: int, key: ItemKey) -> int:
    """What `draw_sigmas` and `draw_noise` draw from, each in its own way."""
    return stable_number("draws", seed, epoch, key.dataset, key.name, key.repeat)


def draw_noise(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Standard normal (B, *shape), float32 on the CPU: row i depends on `seeds[i]` alone."""
    return torch.stack([_noise(seed, shape) for seed in seeds])


def _noise(seed: int, shape: Sequence[int]) -> Tensor:
    generator = torch.Generator().manual_seed(stable_number("noise", seed))
    return torch.randn(*shape, generator=generator)


def draw_sigmas(
    flags: TimestepFlags,
    seeds: Sequence[int],
    *,
    latent_size: tuple[int, int],
    quantiles: Sequence[float] | None = None,
) -> Tensor:
    """Sigmas (B,), float32 on the CPU: row i depends on `seeds[i]` and `quantiles[i]` alone.

    Args:
        flags: that `check_timesteps` and `check_reachable` have seen.
        latent_size: (h, w), which some methods look at.
        quantiles: in [0, 1], of `stratified_quantiles`; None draws them.
    """
    distribution = sigma_distribution(flags, latent_size)
    given = repeat(None, len(seeds)) if quantiles is None else quantiles
    drawn = [
        distribution.at(_unit("timestep", seed) if quantile is None else quantile, mix=_unit("mix", seed))
        for seed, quantile in zip(seeds, given, strict=True)
    ]
    return torch.tensor(drawn, dtype=torch.float32)


def stratified_quantiles(
    keys: Iterable[ItemKey], *, seed: int, epoch: int, num_buckets: int
) -> Mapping[ItemKey, float]:
    """A quantile in (0, 1) for every item of an epoch, such that all of `num_buckets` equal intervals get as many, ±1.

    Which interval an item falls into changes with seed and epoch; inside it, its quantile is uniform. When there are
    fewer items than intervals, those that are used are evenly spread.
    """
    order = sorted(keys, key=lambda key: stable_number("stratum", item_seed(seed, epoch, key)))
    # Systematic sampling: evenly spaced places with one random offset. In integers, so that counts are exact.
    offset, one = stable_number("offset", seed, epoch), 2**64
    quantiles = {}
    for place, key in enumerate(order):
        bucket = (place * one + offset) * num_buckets // (len(order) * one)
        quantiles[key] = (bucket + _unit("quantile", item_seed(seed, epoch, key))) / num_buckets
    return quantiles


def _unit(purpose: str, seed: int) -> float:
    """A uniform number in (0, 1), both ends excluded."""
    return ((stable_number(purpose, seed) >> 12) + 0.5) / 2**52


def loss_weights(scheme: str, sigmas: Tensor) -> Tensor | None:
    """Weights (B,) of the samples' losses; None when all weigh the same.

    sigma_sqrt is sigma^-2, at most 10⁶; cosmap is 2 / (pi·(1 - 2·sigma + 2·sigma²)).
    """
    if scheme == "sigma_sqrt":
        return sigmas.clamp(min=MIN_WEIGHTED_SIGMA) ** -2
    if scheme == "cosmap":
        return 2 / (math.pi * (1 - 2 * sigmas + 2 * sigmas**2))
    return None


def check_reachable(flags: TimestepFlags, latent_sizes: Iterable[tuple[int, int]]) -> None:
    """Makes sure that the range of timesteps can be drawn from.

    Args:
        latent_sizes: (h, w) of all buckets.

    Raises:
        UserError: with `--preserve_distribution_shape`, the method hardly ever falls into the range.
    """
    for latent_size in latent_sizes:
        try:
            sigma_distribution(flags, latent_size)
        except UnreachableRange as error:
            low, high = (round(NUM_TIMESTEPS * sigma) for sigma in flags.sigma_range)
            height, width = (side * VAE_STRIDE for side in latent_size)
            raise UserError(
                "--min_timestep, --max_timestep",
                f"{low} to {high}, where --timestep_sampling {flags.timestep_sampling} falls with probability "
                f"{error.probability:.1g} (at {width}x{height})",
                f"at least {MIN_PROBABILITY:g} with --preserve_distribution_shape",
                "widen the range, or leave --preserve_distribution_shape out",
            ) from None
