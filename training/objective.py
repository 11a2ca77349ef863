"""What training minimises: the squared error of the velocity that the model predicts, for batches of any kind.

Training and validation come here; noise, target and timestep are those of sampling (`modules/flow_matching`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dataset.cache_checks import MAIN
from dataset.epochs import ItemKey
from dataset.loss_masks import LOSS_MASK
from dataset.training_dataset import TrainBatch
from modules.flow_matching import noisy, velocity
from options.flags_timesteps import TimestepFlags
from training.architecture import Architecture
from training.timesteps import draw_noise, draw_sigmas, item_seed, loss_weights


@dataclass(frozen=True, kw_only=True)
class BatchLoss:
    """A batch's losses, sample by sample."""

    weighted: Tensor
    """() what gradients are taken of."""
    losses: Tensor
    """(B,) before weighting, so that timesteps can be compared; without gradient."""
    sigmas: Tensor
    """(B,) on the CPU."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The loss of a batch as a function of the seed, the epoch and its items."""

    architecture: Architecture
    transformer: nn.Module
    timesteps: TimestepFlags
    seed: int
    masked: bool

    def __call__(self, batch: TrainBatch, *, epoch: int, quantiles: Mapping[ItemKey, float] | None = None) -> BatchLoss:
        """The loss with noise levels as `--timestep_sampling` draws them.

        Args:
            quantiles: of all items of the epoch, with `--num_timestep_buckets`.
        """
        seeds = [item_seed(self.seed, epoch, key) for key in batch.items]
        sigmas = draw_sigmas(
            self.timesteps,
            seeds,
            latent_size=batch.contents[MAIN].shape[-2:],
            quantiles=None if quantiles is None else [quantiles[key] for key in batch.items],
        )
        return self.at(batch, sigmas, seeds)

    def at(self, batch: TrainBatch, sigmas: Tensor, seeds: list[int]) -> BatchLoss:
        """The loss at these noise levels (B,), with the noise of these seeds."""
        device = self.transformer.device
        latents = batch.contents[MAIN].to(device)
        noise = draw_noise(seeds, latents.shape[1:]).to(device)
        prediction = self.architecture.predict_velocity(
            self.transformer, noisy(latents, noise, sigmas), sigmas.to(device), batch
        )
        errors = (prediction.float() - velocity(latents, noise)).square()
        losses = self._means(errors, batch)
        weights = loss_weights(self.timesteps.weighting_scheme, sigmas)
        weighted = losses if weights is None else losses * weights.to(device)
        return BatchLoss(weighted=weighted.mean(), losses=losses.detach(), sigmas=sigmas)

    def _means(self, errors: Tensor, batch: TrainBatch) -> Tensor:
        """(B,): the mean over each sample, or over the part of it that its mask and the family let through."""
        mask = batch.contents.get(LOSS_MASK) if self.masked else None
        given = [weights for weights in (mask, self.architecture.loss_weights(batch)) if weights is not None]
        if not given:
            return errors.flatten(1).mean(dim=1)
        weights = math.prod(w.to(errors.device, torch.float32) for w in given).expand_as(errors).flatten(1)
        return (errors.flatten(1) * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1e-6)
