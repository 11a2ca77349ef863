"""A training script's run, from checked flags to the exit code."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch

from common.processes import PATIENCE, Processes, joined_processes
from options.flags_train import TrainFlags
from training.architecture import Architecture
from training.plan import TrainPlan, plan_run
from training.sampling import Samples, sample_jobs
from training.step import NotFinite
from training.timestep_plots import show_timesteps
from training.trainer import Trainer

logger = logging.getLogger(__name__)

MAX_MINUTES = 10**7
Flags = TypeVar("Flags", bound=TrainFlags)


def run_training(flags: Flags, open_architecture: Callable[[Flags], Architecture]) -> int:
    """Plans, checks and trains; or only shows how timesteps are drawn.

    Args:
        open_architecture: checks the models' headers; no weight is read before everything is checked.

    Returns:
        The exit code: 1 when a loss was no number and the run stopped there.
    """
    if flags.timesteps.show_timesteps is not None:
        show_timesteps(flags.timesteps, folder=flags.saving.output_dir)
        return 0
    _set_backends(flags)
    minutes = flags.devices.ddp_timeout
    with joined_processes(timedelta(minutes=min(minutes, MAX_MINUTES)) if minutes else PATIENCE) as processes:
        if not processes.is_main:
            logging.getLogger().setLevel(logging.WARNING)
        architecture = open_architecture(flags)
        plan = plan_run(architecture, flags, processes)
        for line in plan.dataset.summary():
            logger.info("%s", line)
        if flags.run.plan is not None:
            _show_plan(architecture, flags, plan, processes)
            return 0
        samples = _open_samples(architecture, flags, plan, processes)
        try:
            return Trainer(architecture, flags, plan, processes, samples).run()
        except NotFinite as error:
            logger.error("%s", error)
            return 1


def _open_samples(
    architecture: Architecture, flags: TrainFlags, plan: TrainPlan, processes: Processes
) -> Samples | None:
    """Checks and encodes the sample prompts, before the transformer takes the memory."""
    if flags.samples.sample_prompts is None or flags.samples.trigger is None:
        return None
    jobs = sample_jobs(flags.samples.sample_prompts, architecture.sample_defaults, seed=plan.seed)
    samples = Samples(
        architecture,
        jobs,
        folder=Path(flags.saving.output_dir) / "sample",
        name=flags.saving.output_name,
        dtype=plan.dtype,
        device=plan.device,
        processes=processes,
    )
    samples.encode()
    return samples


def _show_plan(architecture: Architecture, flags: TrainFlags, plan: TrainPlan, processes: Processes) -> None:
    """Prints what a step will cost; on a machine without a GPU as one would do it, unless `--device` says otherwise."""
    is_elsewhere = flags.devices.device is None and plan.device.type == "cpu"
    cost = architecture.training_plan(
        plan.dataset,
        plan.network,
        dtype=torch.bfloat16 if is_elsewhere else plan.dtype,
        state_bytes=plan.state_bytes,
        merge=plan.merge,
    )
    text = replace(cost, num_steps=plan.num_steps, batches_per_step=plan.batches_per_step).text(flags.run.plan)
    if processes.is_main:
        sys.stdout.write(f"{text}\n")


def _set_backends(flags: TrainFlags) -> None:
    if flags.devices.cuda_allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = flags.devices.cuda_cudnn_benchmark
