"""Optimizers by name, as users choose them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

from options.errors import UserError
from options.flags_optimizer import ADAFACTOR, OptimizerFlags
from training.classes import Wanted, accepts, attempt, check_arguments, find_class, shown

WHERE, ARGUMENTS = "--optimizer_type", "--optimizer_args"
AUTOMATIC = ("self", "params", "lr")
ELSEWHERE = {
    name.rpartition(".")[2].lower(): name
    for name in (
        "bitsandbytes.optim.AdEMAMix",
        "bitsandbytes.optim.LAMB",
        "bitsandbytes.optim.LARS",
        "bitsandbytes.optim.Lion",
        "bitsandbytes.optim.PagedAdamW",
        "bitsandbytes.optim.PagedLion",
        "came_pytorch.CAME",
        "dadaptation.DAdaptAdam",
        "dadaptation.DAdaptLion",
        "prodigyopt.Prodigy",
        "prodigyplus.ProdigyPlusScheduleFree",
        "schedulefree.AdamWScheduleFree",
        "schedulefree.RAdamScheduleFree",
        "schedulefree.SGDScheduleFree",
    )
}
"""Optimizers that are often asked for by their bare names."""
WANTED = Wanted(
    where=WHERE,
    noun="an optimizer",
    fits=lambda found: issubclass(found, Optimizer) and found is not Optimizer,
    elsewhere=ELSEWHERE,
)


def create_optimizer(flags: OptimizerFlags, parameter_groups: Sequence[Mapping[str, Any]]) -> Optimizer:
    """The optimizer that the user chose.

    Args:
        parameter_groups: each with `params`, its own `lr` and the `name` that it is logged by.

    Raises:
        UserError: nothing to train, an unknown class, or arguments that it does not take.
    """
    if not parameter_groups:
        remedy = "give --learning_rate 1e-4, say"
        raise UserError("--learning_rate", flags.learning_rate, "a number above 0: nothing would be trained", remedy)
    optimizer_class, arguments = find_optimizer(flags.optimizer_type), flags.optimizer_arguments
    check_arguments(ARGUMENTS, optimizer_class, arguments, automatic=AUTOMATIC)
    what, groups = shown(optimizer_class.__name__, arguments), [dict(group) for group in parameter_groups]
    if accepts(optimizer_class, "lr"):
        arguments["lr"] = None if flags.uses_relative_step else flags.learning_rate
    return attempt(WHERE, what, lambda: optimizer_class(groups, **arguments))


def find_optimizer(name: str) -> type[Optimizer]:
    """The class: names without a dot are Adafactor (transformers), `...8bit` (bitsandbytes) or of torch.optim.

    Raises:
        UserError: there is no such class, or its package cannot be imported.
    """
    name, home = name.strip(), "torch.optim"
    if name.lower() in ADAFACTOR:
        name, home = "Adafactor", "transformers.optimization"
    elif name.lower().endswith("8bit"):
        home = "bitsandbytes.optim"
    return find_class(name, home, WANTED)


def describe(optimizer: Optimizer, arguments: Mapping[str, Any]) -> str:
    """What `ss_optimizer` says: `torch.optim.adamw.AdamW(weight_decay=0.01)`.

    Args:
        arguments: `OptimizerFlags.optimizer_arguments`.
    """
    return shown(f"{type(optimizer).__module__}.{type(optimizer).__name__}", arguments)


def train_mode(optimizer: Optimizer) -> None:
    """Puts the weights of a schedule-free optimizer in the place where it computes gradients; others do nothing."""
    _call(optimizer, "train")


def eval_mode(optimizer: Optimizer) -> None:
    """Puts the weights of a schedule-free optimizer in the place that it has found so far; others do nothing."""
    _call(optimizer, "eval")


@contextmanager
def evaluation_weights(optimizer: Optimizer) -> Iterator[None]:
    """Inside, the parameters are those to save and to sample with; afterwards those to train on, to the last bit.

    `eval_mode` and `train_mode` in turn only come near the old weights: a run with more saves or samples would end in
    other weights. States for resuming are therefore saved outside, and the optimizer must be in `train_mode`.
    """
    if not callable(getattr(optimizer, "eval", None)):
        yield
        return
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    before = [parameter.detach().clone() for parameter in parameters]
    eval_mode(optimizer)
    try:
        yield
    finally:
        train_mode(optimizer)
        with torch.no_grad():
            for parameter, values in zip(parameters, before, strict=True):
                parameter.copy_(values)


def _call(optimizer: Optimizer, mode: str) -> None:
    change = getattr(optimizer, mode, None)
    if callable(change):
        change()
