"""The course of the learning rate."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from options.errors import UserError
from options.flags_optimizer import CUSTOM, DECAY, SCHEDULE_FREE, SCHEDULERS, WARMUP, OptimizerFlags
from training.classes import Wanted, attempt, check_arguments, find_class, shown
from training.rex import rex_factor

logger = logging.getLogger(__name__)
ARGUMENTS = "--lr_scheduler_args"
HOME = "torch.optim.lr_scheduler"
METHODS = ("step", "get_last_lr", "state_dict", "load_state_dict")
WANTED = Wanted(
    where="--lr_scheduler_type",
    noun="a scheduler",
    fits=lambda found: found is not LRScheduler and all(hasattr(found, method) for method in METHODS),
)
AUTOMATIC = ("self", "optimizer", "num_warmup_steps", "num_training_steps", "last_epoch")


class Scheduler(Protocol):
    """Sets the learning rates of an optimizer's groups.

    It counts optimizer steps. accelerate, which would step it once for every process, must not wrap it.
    """

    def step(self, loss: float | None = None) -> None:
        """Called after every optimizer step; `loss` is its loss, the same in all processes."""

    def get_last_lr(self) -> list[float]:
        """The learning rate of each group for the next step."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from there, to be called after the optimizer's state is loaded.

        The state of another kind of schedule gives its position where the new kind has one for every step.

        Raises:
            UserError: it has none.
        """


def create_scheduler(flags: OptimizerFlags, optimizer: Optimizer, *, num_steps: int) -> Scheduler:
    """The schedule that the user chose.

    Args:
        num_steps: optimizer steps of the whole run, counted once however many processes take them together.

    Raises:
        UserError: an unknown class, arguments that it does not take, or phases longer than the run.
    """
    kind = flags.scheduler_kind
    if kind in ("constant", "adafactor", SCHEDULE_FREE):
        initial_lr = float(flags.resolved_lr_scheduler.partition(":")[2]) if kind == "adafactor" else None
        return _Unscheduled(optimizer, kind, initial_lr)
    if kind == CUSTOM:
        return _custom(flags, optimizer)
    return _named(kind, flags, optimizer, num_steps)


class _Schedule:
    """A scheduler of a library, whose state also tells its kind and how far it has come."""

    def __init__(self, scheduler: Any, kind: str) -> None:
        self._scheduler = scheduler
        self._kind = kind
        self._num_steps = 0
        parameters = inspect.signature(scheduler.step).parameters.values()
        self._needs_loss = any(parameter.default is parameter.empty for parameter in parameters)

    @property
    def base_lrs(self) -> list[float]:
        """The learning rates that the schedule multiplies, where the library's scheduler has such."""
        return self._scheduler.base_lrs

    @base_lrs.setter
    def base_lrs(self, rates: list[float]) -> None:
        self._scheduler.base_lrs = rates

    @property
    def _last_lr(self) -> list[float]:
        return self._scheduler._last_lr

    @_last_lr.setter
    def _last_lr(self, rates: list[float]) -> None:
        self._scheduler._last_lr = rates

    def step(self, loss: float | None = None) -> None:
        self._num_steps += 1
        if not self._needs_loss:
            self._scheduler.step()
        elif loss is None:
            raise ValueError(f"{self._kind} needs the loss of every step")
        elif math.isfinite(loss):  # a running average of losses would never get over another
            self._scheduler.step(loss)

    def get_last_lr(self) -> list[float]:
        return self._scheduler.get_last_lr()

    def state_dict(self) -> dict[str, Any]:
        return {"kind": self._kind, "num_steps": self._num_steps, "state": self._scheduler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._num_steps = state["num_steps"]
        if state["kind"] == self._kind:
            self._scheduler.load_state_dict(state["state"])
        elif isinstance(self._scheduler, LambdaLR):
            _log_change(state["kind"], self._kind, self._num_steps)
            for group, rate in zip(self._scheduler.optimizer.param_groups, self.base_lrs, strict=True):
                group["lr"] = group["initial_lr"] = rate
            if self._num_steps:
                # One more than the true count: torch warns of a first step without one of the optimizer.
                vars(self._scheduler).update(last_epoch=self._num_steps - 1, _step_count=self._num_steps + 1)
                self._scheduler.step()
        else:
            expected = f"{state['kind']}, as in the state that is resumed"
            raise UserError("--lr_scheduler", self._kind, expected, "give the schedule that the run began with")


class _Unscheduled:
    """No schedule: the learning rate stays, or the optimizer makes its own.

    Args:
        initial_lr: for an Adafactor of relative steps, what it is said to have before its first step.
    """

    def __init__(self, optimizer: Optimizer, kind: str, initial_lr: float | None) -> None:
        self._optimizer = optimizer
        self._kind = kind
        self._is_relative = initial_lr is not None
        for group in optimizer.param_groups if self._is_relative else []:
            group["lr"] = initial_lr
        self._rates = self.get_last_lr()
        self._num_steps = 0

    def step(self, loss: float | None = None) -> None:
        self._num_steps += 1
        for group in self._optimizer.param_groups if self._is_relative else []:
            # For the log only: the optimizer does not read what it is told.
            if state := self._optimizer.state.get(group["params"][0]):
                group["lr"] = float(self._optimizer._get_lr(group, state))

    def get_last_lr(self) -> list[float]:
        return [group["lr"] for group in self._optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        return {"kind": self._kind, "num_steps": self._num_steps, "state": {}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._num_steps = state["num_steps"]
        if state["kind"] != self._kind:
            _log_change(state["kind"], self._kind, self._num_steps)
            for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
                group["lr"] = group["initial_lr"] = rate


def _log_change(before: str, now: str, num_steps: int) -> None:
    logger.info("the learning rate goes on after step %d by %s instead of %s", num_steps, now, before)


def _custom(flags: OptimizerFlags, optimizer: Optimizer) -> Scheduler:
    found, arguments = find_class(flags.lr_scheduler_type.strip(), HOME, WANTED), flags.scheduler_arguments
    check_arguments(ARGUMENTS, found, arguments, automatic=("self", "optimizer", "last_epoch"))
    scheduler = attempt(WANTED.where, shown(found.__name__, arguments), lambda: found(optimizer, **arguments))
    return _Schedule(scheduler, f"{found.__module__}.{found.__name__}")


def _named(kind: str, flags: OptimizerFlags, optimizer: Optimizer, num_steps: int) -> Scheduler:
    target = _target(kind)
    warmup, decay = _phases(kind, flags, num_steps)
    phases = {"num_warmup_steps": warmup, "num_training_steps": num_steps}
    arguments = {**_flag_arguments(kind, flags, decay), **flags.scheduler_arguments}
    check_arguments(ARGUMENTS, target, arguments, automatic=AUTOMATIC)
    known = inspect.signature(target).parameters
    automatic = {name: value for name, value in phases.items() if name in known}
    make = partial(target, optimizer, **automatic, **arguments)
    return _Schedule(attempt("--lr_scheduler", shown(kind, arguments), make), kind)


def _target(kind: str) -> Callable[..., Any]:
    """What makes the scheduler. Two that transformers hides behind `**kwargs` are named directly."""
    if kind == "rex":
        return rex_schedule
    if kind == "reduce_lr_on_plateau":
        return ReduceLROnPlateau
    if kind == "piecewise_constant":
        from diffusers.optimization import get_piecewise_constant_schedule

        return get_piecewise_constant_schedule
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION, GreedyLR, SchedulerType

    return GreedyLR if kind == "greedy" else TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(kind)]


def _flag_arguments(kind: str, flags: OptimizerFlags, decay: int) -> dict[str, Any]:
    """What the flags say of a schedule's shape, under the names that its function has for it."""
    cycles, ratio = flags.lr_scheduler_num_cycles, flags.lr_scheduler_min_lr_ratio
    # A cycle is a whole wave there, of which the first half falls.
    waves = {"num_cycles": cycles / 2}
    lowest = {} if ratio is None else {"min_lr_rate": ratio}
    return {
        "cosine_with_restarts": {"num_cycles": cycles},
        "cosine_with_min_lr": {**waves, **lowest},
        "cosine_warmup_with_min_lr": {**waves, **lowest},
        "polynomial": {"power": flags.lr_scheduler_power},
        "inverse_sqrt": {"timescale": flags.lr_scheduler_timescale},
        "warmup_stable_decay": {**waves, "num_decay_steps": decay, "min_lr_ratio": ratio or 0.0},
        "rex": {} if ratio is None else {"min_ratio": ratio},
    }.get(kind, {})


def _phases(kind: str, flags: OptimizerFlags, num_steps: int) -> tuple[int, int]:
    """Optimizer steps of warmup and decay."""
    warmup = flags.lr_warmup_steps.of(num_steps) if WARMUP in SCHEDULERS[kind] else 0
    decay = flags.lr_decay_steps.of(num_steps) if DECAY in SCHEDULERS[kind] else 0
    if warmup + decay > num_steps and decay:
        got = f"{warmup} steps of warmup and {decay} of decay"
        raise UserError(f"--{DECAY}", got, f"not more than the run's {num_steps} together", "shorten them")
    if warmup >= num_steps and kind == "polynomial":
        raise UserError(f"--{WARMUP}", warmup, f"fewer than the run's {num_steps} steps", "shorten it")
    if warmup >= num_steps:
        logger.warning("--%s: the learning rate rises for %d steps, the run has %d", WARMUP, warmup, num_steps)
    return warmup, decay


def rex_schedule(
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    min_ratio: float = 0.01,
    rex_alpha: float = 0.1,
    rex_beta: float = 0.9,
) -> LambdaLR:
    """A scheduler after `rex_factor`."""
    if min(rex_alpha, rex_beta) < 0 or rex_alpha + rex_beta == 0:
        raise ValueError("rex_alpha and rex_beta must not be negative, nor both 0")
    shape = {"min_ratio": min_ratio, "rex_alpha": rex_alpha, "rex_beta": rex_beta}
    return LambdaLR(
        optimizer, partial(rex_factor, num_steps=num_training_steps, num_warmup_steps=num_warmup_steps, **shape)
    )
