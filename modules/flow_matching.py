"""Rectified flow, defined once for training and sampling.

A noisy latent is x_sigma = (1 - sigma)·x_0 + sigma·noise, sigma in [0, 1]; the model predicts the velocity
v = noise - x_0 and is told timestep = 1000·sigma. Hence x_0 = x_sigma - sigma·v.
"""

import math
from typing import TypeVar

import torch
from torch import Tensor

Sigma = TypeVar("Sigma", float, Tensor)
NUM_TIMESTEPS = 1000
MAX_MU = math.log(7)
"""Cap of the resolution-dependent shift. Source: FramePack's sampler."""


def noisy(latents: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
    """x_sigma, float32: what the model sees.

    Args:
        latents: (B, ...) clean, of any floating type.
        noise: (B, ...) standard normal.
        sigmas: (B,), one for each sample.
    """
    sigmas = sigmas.to(latents.device, torch.float32).view(-1, *[1] * (latents.ndim - 1))
    return (1 - sigmas) * latents + sigmas * noise


def velocity(latents: Tensor, noise: Tensor) -> Tensor:
    """v, float32: what the model learns to predict."""
    return noise.float() - latents.float()


def denoised(noisy: Tensor, velocity: Tensor, sigma: float) -> Tensor:
    """The clean latent that a velocity points to."""
    return noisy - sigma * velocity


def shifted(sigma: Sigma, shift: float) -> Sigma:
    """Moves sigmas towards noise: the odds sigma / (1 - sigma) are multiplied by `shift`."""
    return shift * sigma / (shift * sigma + 1 - sigma)


def linear_mu(num_tokens: int, *, high: float = 1.15, high_at: int = 4096) -> float:
    """Logarithm of a flow shift: 0.5 at 256 tokens, `high` at `high_at`, on the same line before and beyond."""
    return 0.5 + (high - 0.5) * (num_tokens - 256) / (high_at - 256)


def resolution_mu(num_tokens: int) -> float:
    """Logarithm of the flow shift that suits a number of target tokens: 0.5 at 256, 1.15 at 4096, at most ln 7."""
    return min(linear_mu(num_tokens), MAX_MU)


def shifted_sigmas(num_steps: int, mu: float) -> Tensor:
    """(num_steps + 1,) float64 sigmas from 1 to 0, shifted towards noise by e^mu.

    sigma(u) = e^mu / (e^mu + 1/u - 1) for u falling evenly from 1 to 0.
    """
    return shifted(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), math.exp(mu))
