"""Tries optimizer and schedule on small weights, before anything large is loaded."""

from __future__ import annotations

import io
import logging
import pickle

import torch
from torch import nn

from options.flags_optimizer import OptimizerFlags
from training.classes import attempt, shown
from training.optimizers import create_optimizer, train_mode
from training.schedulers import create_scheduler

logger = logging.getLogger(__name__)
SHAPE = (64, 128)
"""Large enough for 8-bit optimizers to use 8 bits."""


def rehearse(
    flags: OptimizerFlags, *, num_steps: int, device: torch.device | str = "cpu", loraplus_lr_ratio: float | None = None
) -> float:
    """Takes one step, so that a class or argument that cannot work is reported now. Random numbers stay as they are.

    Args:
        num_steps: see `create_scheduler`.
        device: where training will take place; not every optimizer works everywhere.
        loraplus_lr_ratio: LoRA+: there will be a second group of parameters, which learns faster by this.

    Returns:
        The bytes that the optimizer remembers for each trained number, on the device.

    Raises:
        UserError: see `create_optimizer` and `create_scheduler`, or the step fails.
    """
    with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
        ratios = {"unet": 1.0, **({"unet plus": loraplus_lr_ratio} if loraplus_lr_ratio else {})}
        groups = [
            {
                "params": [nn.Parameter(torch.ones(SHAPE, device=device))],
                "lr": flags.learning_rate * ratio,
                "name": name,
            }
            for name, ratio in ratios.items()
        ]
        optimizer = create_optimizer(flags, groups)
        scheduler = create_scheduler(flags, optimizer, num_steps=num_steps)
        train_mode(optimizer)
        for group in optimizer.param_groups:
            for weight in group["params"]:
                weight.grad = torch.full_like(weight, 1e-3)
        what = f"a step of {shown(flags.optimizer_type, flags.optimizer_arguments)} on {device}"
        attempt("--optimizer_type", what, optimizer.step)
        attempt("--lr_scheduler", f"a step of {flags.scheduler_kind}", lambda: scheduler.step(1.0))
    _check_state(type(optimizer).__name__, optimizer.state_dict())
    _check_state(flags.scheduler_kind, scheduler.state_dict())
    return _state_bytes(optimizer) / sum(weight.numel() for group in groups for weight in group["params"])


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of tensors as large as weights; tables that are the same for any weight do not count."""
    states = (value for state in optimizer.state.values() for key, value in state.items() if "qmap" not in key)
    return sum(value.numel() * value.itemsize for value in states if isinstance(value, torch.Tensor))


def _check_state(name: str, state: dict) -> None:
    buffer = io.BytesIO()
    try:
        torch.save(state, buffer)
        torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    except (pickle.UnpicklingError, pickle.PicklingError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        logger.warning("%s: a run with it cannot be resumed, as its state cannot be read back safely: %s", name, reason)
