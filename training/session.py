"""A training script's run, from checked flags to the exit code."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from common.processes import joined_processes
from options.flags_train import TrainFlags
from training.architecture import Architecture
from training.plan import plan_run
from training.trainer import NotFinite, Trainer

logger = logging.getLogger(__name__)

Flags = TypeVar("Flags", bound=TrainFlags)


def run_training(flags: Flags, open_architecture: Callable[[Flags], Architecture]) -> int:
    """Plans, checks and trains; or only shows how timesteps are drawn.

    Args:
        open_architecture: checks the models' headers; no weight is read before everything is checked.

    Returns:
        The exit code: 1 when a loss was no number and the run stopped there.
    """
    _set_backends(flags)
    with joined_processes() as processes:
        if not processes.is_main:
            logging.getLogger().setLevel(logging.WARNING)
        architecture = open_architecture(flags)
        plan = plan_run(architecture, flags, processes)
        for line in plan.dataset.summary():
            logger.info("%s", line)
        try:
            return Trainer(architecture, flags, plan, processes).run()
        except NotFinite as error:
            logger.error("%s", error)
            return 1


def _set_backends(flags: TrainFlags) -> None:
    if flags.devices.cuda_allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = flags.devices.cuda_cudnn_benchmark
