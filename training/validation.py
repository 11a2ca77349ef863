"""The loss on items that are not trained on, always with the same noise and at the same noise levels."""

from __future__ import annotations

import math
from collections.abc import Callable

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


def validation_loss(
    objective: Objective,
    dataset: TrainingDataset,
    processes: Processes,
    *,
    is_stopping: Callable[[], bool] = lambda: False,
) -> float | None:
    """The mean over all items and `SIGMAS`, without weighting; every process takes its share of the batches.

    Args:
        is_stopping: asked before each batch; None is returned when it was true in any process.
    """
    reader, losses, is_whole = dataset.reader(), [], True
    for batch in processes.share(epoch_batches(dataset.buckets, seed=SEED, epoch=0)):
        if is_stopping():
            is_whole = False
            break
        items = TrainBatch(contents=reader.read(batch), items=batch, after=Position())
        for sigma in SIGMAS:
            seeds = [item_seed(SEED, round(1000 * sigma), key) for key in batch]
            with torch.no_grad():
                losses += objective.at(items, torch.full((len(batch),), sigma), seeds).losses.tolist()
    if not all(processes.gather(is_whole)):
        return None
    everyones = [loss for own in processes.gather(losses) for loss in own]
    return math.fsum(everyones) / len(everyones)
