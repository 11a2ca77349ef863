"""The flags of training that say how weights are changed: optimizer, learning rate and its schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields

from options.errors import UserError, did_you_mean
from options.flag_fields import flag
from options.key_values import read_literals
from options.step_count import StepCount

WARMUP, DECAY, CYCLES = "lr_warmup_steps", "lr_decay_steps", "lr_scheduler_num_cycles"
POWER, TIMESCALE, MIN_RATIO = "lr_scheduler_power", "lr_scheduler_timescale", "lr_scheduler_min_lr_ratio"
SCHEDULERS: Mapping[str, tuple[str, ...]] = {
    "adafactor": (),
    "constant": (),
    "constant_with_warmup": (WARMUP,),
    "cosine": (WARMUP,),
    "cosine_warmup_with_min_lr": (WARMUP, CYCLES, MIN_RATIO),
    "cosine_with_min_lr": (WARMUP, CYCLES, MIN_RATIO),
    "cosine_with_restarts": (WARMUP, CYCLES),
    "greedy": (),
    "inverse_sqrt": (WARMUP, TIMESCALE),
    "linear": (WARMUP,),
    "piecewise_constant": (),
    "polynomial": (WARMUP, POWER),
    "reduce_lr_on_plateau": (),
    "rex": (WARMUP, MIN_RATIO),
    "warmup_stable_decay": (WARMUP, DECAY, CYCLES, MIN_RATIO),
}
"""Values of `--lr_scheduler`, and the flags that each one heeds."""
SCHEDULE_FREE, CUSTOM = "schedule-free", "custom"
"""Kinds of schedule that `--lr_scheduler` does not name."""
ADAFACTOR = ("adafactor", "transformers.adafactor", "transformers.optimization.adafactor")


@dataclass(frozen=True, kw_only=True)
class OptimizerFlags:
    """How weights are changed."""

    optimizer_type: str = flag(
        "AdamW, AdamW8bit or another 8bit of bitsandbytes, Adafactor, a class of torch.optim, or package.Class",
        default="AdamW",
    )
    optimizer_args: tuple[str, ...] = flag("its arguments: weight_decay=0.01 betas=0.9,0.99", default=())
    learning_rate: float = flag("learning rate", default=2e-6)
    max_grad_norm: float = flag("limit of the norm of all gradients together; 0 is none", default=1.0)
    lr_scheduler: str = flag(f"course of the learning rate: {', '.join(SCHEDULERS)}", default="constant")
    lr_warmup_steps: StepCount = flag("optimizer steps (100) or share (0.1, 10%) of warmup", default=StepCount())
    lr_decay_steps: StepCount = flag("the same of the decay of warmup_stable_decay", default=StepCount())
    lr_scheduler_num_cycles: int = flag("restarts of cosine_with_restarts; half waves of other cosines", default=1)
    lr_scheduler_power: float = flag("power of polynomial", default=1.0)
    lr_scheduler_timescale: int | None = flag("timescale of inverse_sqrt (default: the warmup)")
    lr_scheduler_min_lr_ratio: float | None = flag("where rex and the cosines end, as a part of the learning rate")
    lr_scheduler_type: str = flag("instead: a class of torch.optim.lr_scheduler, or package.Class", default="")
    lr_scheduler_args: tuple[str, ...] = flag("arguments of the scheduler: T_max=100 eta_min=1e-6", default=())

    @property
    def optimizer_arguments(self) -> dict[str, object]:
        """What the optimizer is given besides parameters and learning rate.

        Raises:
            UserError: `--optimizer_args` cannot be read.
        """
        arguments = read_literals(self.optimizer_args, "--optimizer_args")
        if self.optimizer_type.lower() in ADAFACTOR:
            relative = bool(arguments.get("warmup_init") or arguments.get("relative_step", True))
            return {**arguments, "relative_step": relative}
        return arguments

    @property
    def scheduler_arguments(self) -> dict[str, object]:
        """`--lr_scheduler_args`; raises UserError when they cannot be read."""
        return read_literals(self.lr_scheduler_args, "--lr_scheduler_args")

    @property
    def uses_relative_step(self) -> bool:
        """Whether Adafactor finds the size of its steps by itself; the learning rate has no effect then."""
        return self.optimizer_type.lower() in ADAFACTOR and bool(self.optimizer_arguments["relative_step"])

    @property
    def is_schedule_free(self) -> bool:
        return self.optimizer_type.lower().endswith("schedulefree")

    @property
    def resolved_lr_scheduler(self) -> str:
        """`--lr_scheduler`, or what takes its place for an Adafactor with relative steps."""
        if self.uses_relative_step and not self.lr_scheduler.startswith("adafactor:"):
            return f"adafactor:{self.learning_rate}"
        return self.lr_scheduler

    @property
    def scheduler_kind(self) -> str:
        """A key of SCHEDULERS, SCHEDULE_FREE or CUSTOM."""
        if self.is_schedule_free:
            return SCHEDULE_FREE
        if self.lr_scheduler_type:
            return CUSTOM
        return self.resolved_lr_scheduler.partition(":")[0]

    def hints(self) -> list[str]:
        """What has no effect although it was given, and what is rarely meant."""
        return [*_scheduler_hints(self), *_adafactor_hints(self)]


def check_optimizer(flags: OptimizerFlags) -> None:
    """Raises UserError for what cannot work, as far as that can be told without torch."""
    _check_numbers(flags)
    if not flags.optimizer_type.strip():
        raise UserError("--optimizer_type", "an empty text", "the name of an optimizer", "use AdamW, say")
    for own in {"lr", "params"} & set(flags.optimizer_arguments):
        remedy = "use --learning_rate" if own == "lr" else "remove it"
        raise UserError("--optimizer_args", own, "arguments besides parameters and learning rate", remedy)
    if flags.is_schedule_free or flags.lr_scheduler_type:
        _ = flags.scheduler_arguments
        return
    _check_scheduler(flags)


def _check_numbers(flags: OptimizerFlags) -> None:
    rules = {
        "learning_rate": ("a number above 0: nothing is trained with 0", lambda rate: 0 < rate < math.inf),
        "max_grad_norm": ("a number from 0", lambda norm: norm >= 0),
        CYCLES: ("1 or more", lambda cycles: cycles >= 1),
        POWER: ("a number from 0", lambda power: 0 <= power < math.inf),
        TIMESCALE: ("1 or more", lambda timescale: timescale >= 1),
        MIN_RATIO: ("a part of the learning rate, from 0 to 1", lambda ratio: 0 <= ratio <= 1),
    }
    for name, (expected, holds) in rules.items():
        value = getattr(flags, name)
        if value is not None and not holds(value):
            raise UserError(f"--{name}", value, expected, "change it")


def _check_scheduler(flags: OptimizerFlags) -> None:
    kind, arguments = flags.scheduler_kind, flags.scheduler_arguments
    if kind not in SCHEDULERS:
        remedy = did_you_mean(kind.lower(), SCHEDULERS, "for a class use --lr_scheduler_type")
        raise UserError("--lr_scheduler", flags.lr_scheduler, f"one of {', '.join(SCHEDULERS)}", remedy)
    if kind == "adafactor":
        _check_adafactor_schedule(flags)
    if kind in ("adafactor", "constant") and arguments:
        raise UserError("--lr_scheduler_args", ", ".join(arguments), f"none with a {kind} schedule", "remove them")
    if flags.lr_warmup_steps and kind == "constant":
        expected, remedy = "0 with --lr_scheduler constant", "use --lr_scheduler constant_with_warmup"
        raise UserError(f"--{WARMUP}", flags.lr_warmup_steps, expected, remedy)
    lowest = (flags.lr_scheduler_min_lr_ratio, arguments.get("min_lr"), arguments.get("min_lr_rate"))
    if kind in ("cosine_with_min_lr", "cosine_warmup_with_min_lr") and lowest == (None, None, None):
        raise UserError(f"--{MIN_RATIO}", "nothing", f"a value with --lr_scheduler {kind}", "give 0.1, say")
    if kind == "piecewise_constant" and "step_rules" not in arguments:
        remedy = "give step_rules=1:100,0.1:200,0.01 (factor:until this step, the last factor for the rest)"
        raise UserError("--lr_scheduler_args", "no step_rules", "step_rules with piecewise_constant", remedy)


def _check_adafactor_schedule(flags: OptimizerFlags) -> None:
    text = flags.resolved_lr_scheduler
    if not flags.uses_relative_step:
        expected = "an Adafactor optimizer with relative_step=True beside it"
        raise UserError("--lr_scheduler", text, expected, "use constant_with_warmup, say")
    if flags.lr_warmup_steps:
        remedy = "leave it out, or add relative_step=False to --optimizer_args"
        raise UserError(f"--{WARMUP}", flags.lr_warmup_steps, "0 with an Adafactor of relative steps", remedy)
    try:
        float(text.partition(":")[2])
    except ValueError:
        raise UserError("--lr_scheduler", text, "a number behind the colon", "write adafactor:1e-4, say") from None


def _scheduler_hints(flags: OptimizerFlags) -> Iterator[str]:
    kind = flags.scheduler_kind
    shaping = (WARMUP, DECAY, CYCLES, POWER, TIMESCALE, MIN_RATIO)
    defaults = {field.name: field.default for field in fields(flags)}
    for name in shaping:
        if getattr(flags, name) != defaults[name] and name not in SCHEDULERS.get(kind, ()):
            yield f"--{name} has no effect with a {kind} schedule"
    if kind == SCHEDULE_FREE and (flags.lr_scheduler != "constant" or flags.lr_scheduler_type):
        yield f"{flags.optimizer_type} needs no schedule: --lr_scheduler and --lr_scheduler_type have no effect"
    if kind == SCHEDULE_FREE and flags.lr_warmup_steps:
        yield "a schedule-free optimizer has a warmup of its own: --optimizer_args warmup_steps=100, say"
    if kind == CUSTOM and flags.lr_scheduler != "constant":
        yield "--lr_scheduler has no effect beside --lr_scheduler_type"
    if kind == "warmup_stable_decay" and not (flags.lr_decay_steps or "num_decay_steps" in flags.scheduler_arguments):
        yield f"warmup_stable_decay without --{DECAY} does not decay"


def _adafactor_hints(flags: OptimizerFlags) -> Iterator[str]:
    if flags.optimizer_type.lower() not in ADAFACTOR:
        return
    if flags.max_grad_norm:
        yield "Adafactor clips its updates itself: --max_grad_norm 0 is recommended with it"
    if flags.uses_relative_step:
        yield "Adafactor sets the size of its steps itself; relative_step=False makes it heed --learning_rate"
        if not flags.lr_scheduler.startswith(("constant", "adafactor:")):
            yield f"--lr_scheduler {flags.lr_scheduler} has no effect on an Adafactor of relative steps"
