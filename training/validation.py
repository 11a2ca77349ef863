"""The loss on items that are not trained on, always with the same noise and at the same noise levels."""

from __future__ import annotations

import math

import torch

from common.processes import Processes
from dataset.epochs import Position, epoch_batches
from dataset.training_dataset import TrainBatch, TrainingDataset
from training.objective import Objective
from training.timesteps import item_seed

SIGMAS = (0.125, 0.375, 0.625, 0.875)
"""The middles of four equal parts."""
SEED = 0
"""Not the run's, so that runs can be compared."""


def validation_loss(objective: Objective, dataset: TrainingDataset, processes: Processes) -> float:
    """The mean over all items and `SIGMAS`, without weighting; every process takes its share of the batches."""
    reader, losses = dataset.reader(), []
    for batch in processes.share(epoch_batches(dataset.buckets, seed=SEED, epoch=0)):
        items = TrainBatch(contents=reader.read(batch), items=batch, after=Position())
        for sigma in SIGMAS:
            seeds = [item_seed(SEED, round(1000 * sigma), key) for key in batch]
            with torch.no_grad():
                losses += objective.at(items, torch.full((len(batch),), sigma), seeds).losses.tolist()
    everyones = [loss for own in processes.gather(losses) for loss in own]
    return math.fsum(everyones) / len(everyones)
