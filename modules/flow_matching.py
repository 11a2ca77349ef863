"""Rectified flow, defined once for training and sampling.

A noisy latent is x_sigma = (1 - sigma)·x_0 + sigma·noise, sigma in [0, 1]; the model predicts the velocity
v = noise - x_0 and is told timestep = 1000·sigma. Hence x_0 = x_sigma - sigma·v.
"""

import math

import torch
from torch import Tensor

NUM_TIMESTEPS = 1000
MAX_MU = math.log(7)
"""Cap of the resolution-dependent shift. Source: FramePack's sampler."""


def denoised(noisy: Tensor, velocity: Tensor, sigma: float) -> Tensor:
    """The clean latent that a velocity points to."""
    return noisy - sigma * velocity


def resolution_mu(num_tokens: int) -> float:
    """Logarithm of the flow shift that suits a number of target tokens: 0.5 at 256, 1.15 at 4096, at most ln 7."""
    return min(0.5 + (1.15 - 0.5) * (num_tokens - 256) / (4096 - 256), MAX_MU)


def shifted_sigmas(num_steps: int, mu: float) -> Tensor:
    """(num_steps + 1,) float64 sigmas from 1 to 0, shifted towards noise by e^mu.

    sigma(u) = e^mu / (e^mu + 1/u - 1) for u falling evenly from 1 to 0.
    """
    u = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    shift = math.exp(mu)
    return shift * u / (shift * u + 1 - u)
