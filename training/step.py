"""One optimizer step: losses, gradients over all processes, the guard against numbers that are none, the update."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from common.processes import Processes
from dataset.epochs import ItemKey
from dataset.training_dataset import TrainBatch
from networks.network import Network, NormReport
from options.flags_train import TrainFlags
from training.gradients import average_gradients, clip_gradients
from training.objective import BatchLoss, Objective
from training.optimizers import create_optimizer, train_mode
from training.resuming import set_learning_rates
from training.schedulers import create_scheduler
from training.states import RunState

logger = logging.getLogger(__name__)

MAX_OVERFLOWS = 20
"""Steps in a row that fp16 may leave out while it looks for its scale: then 65536 has become less than 1."""


class NotFinite(Exception):
    """A loss or gradient is not a number, and `--on_nan` says to stop. The message names the batch."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step did."""

    batches: tuple[float, ...]
    """The loss of each batch of a process, mean over the processes."""
    samples: tuple[BatchLoss, ...]
    """Of this process's batches."""
    norms: NormReport | None
    """What `--scale_weight_norms` did."""

    @property
    def loss(self) -> float:
        """The mean; not a number when one of them is not."""
        return sum(self.batches) / len(self.batches)


class Stepper:
    """A network's optimizer and all that belongs to it."""

    def __init__(
        self,
        flags: TrainFlags,
        network: Network,
        objective: Objective,
        processes: Processes,
        *,
        num_steps: int,
        device: torch.device,
        scales_loss: bool,
    ) -> None:
        """
        Args:
            network: on its device.
            num_steps: of the whole run.
            scales_loss: for fp16, whose gradients would vanish.
        """
        self._flags, self._network, self._objective, self._processes = flags, network, objective, processes
        groups = network.parameter_groups(flags.optimizer.learning_rate)
        self._parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = create_optimizer(flags.optimizer, groups)
        for group in self.optimizer.param_groups:  # which not every schedule keeps, and a resumed run needs
            group.setdefault("initial_lr", group["lr"])
        self._scheduler = create_scheduler(flags.optimizer, self.optimizer, num_steps=num_steps)
        self._scaler = torch.amp.GradScaler(device.type, enabled=scales_loss)
        self._num_overflows = 0
        """Steps that fp16 has left out since the last one that it took."""
        train_mode(self.optimizer)

    def take(
        self, group: Sequence[TrainBatch], *, step: int, epoch: int, quantiles: Mapping[ItemKey, float] | None
    ) -> StepResult:
        """Takes step number `step` on the mean of these batches; the same number of them in every process.

        Args:
            quantiles: see `Objective`.

        Raises:
            NotFinite: the step cannot be taken, and `--on_nan stop`. Nothing has changed then.
        """
        samples = []
        for batch in group:
            result = self._objective(batch, epoch=epoch, quantiles=quantiles)
            self._scaler.scale(result.weighted / len(group)).backward()
            samples.append(result)
        # Averaged first: an overflow in one process then leaves the step out in all of them.
        average_gradients(self._parameters, self._processes)
        self._scaler.unscale_(self.optimizer)
        norm = clip_gradients(self._parameters, self._flags.optimizer.max_grad_norm)
        losses = torch.stack([result.weighted.detach() for result in samples]).tolist()
        everyones = self._processes.gather(losses)
        batches = tuple(sum(same) / len(same) for same in zip(*everyones, strict=True))
        problem = self._problem(group, losses, everyones, norm)
        norms = None
        if problem is None:
            self._scaler.step(self.optimizer)
            if limit := self._flags.network.scale_weight_norms:
                norms = self._network.scale_weight_norms(limit)
        if self._scaler.is_enabled():
            self._scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if problem is not None:
            self._report(f"step {step}: {problem}")
        self._scheduler.step(sum(batches) / len(batches))
        return StepResult(batches=batches, samples=tuple(samples), norms=norms)

    def _problem(
        self, group: Sequence[TrainBatch], losses: Sequence[float], everyones: Sequence[Sequence[float]], norm: Tensor
    ) -> str | None:
        """Why the step cannot be taken; None in all processes or in none."""
        if not all(math.isfinite(loss) for own in everyones for loss in own):
            bad = [batch for batch, loss in zip(group, losses, strict=True) if not math.isfinite(loss)]
            return f"the loss is not a number, with {_names(bad) or 'the batch of another process'}"
        if bool(norm.isfinite()):
            self._num_overflows = 0
            return None
        self._num_overflows += 1
        # With fp16, gradients overflow now and then: the scaler then leaves the step out and scales less.
        if self._scaler.is_enabled() and self._num_overflows < MAX_OVERFLOWS:
            logger.info("the gradients overflow in fp16 with %s: the step is left out", _names(group))
            return None
        in_a_row = f" in {self._num_overflows} steps in a row, the last" if self._scaler.is_enabled() else ","
        return f"the gradient is not a number{in_a_row} with {_names(group)}"

    def _report(self, message: str) -> None:
        if self._flags.run.on_nan == "stop":
            raise NotFinite(f"{message}; look at its caches, lower --learning_rate, or use --on_nan skip")
        logger.warning("%s; the step is left out", message)

    def forget_gradients(self) -> None:
        """Frees them after a step that could not be finished."""
        self.optimizer.zero_grad(set_to_none=True)

    # ---- states ----

    def state(self) -> dict[str, object]:
        """The fields of a `RunState` that belong to the optimizer."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self._scheduler.state_dict(),
            "grad_scaler": self._scaler.state_dict() if self._scaler.is_enabled() else None,
        }

    def load(self, state: RunState) -> None:
        """Goes on from a state, at the learning rate that the command line says."""
        # The schedule has scaled the rates by now; what it started from is the base.
        rates = [group.get("initial_lr", group["lr"]) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(dict(state.optimizer))
        self._scheduler.load_state_dict(dict(state.scheduler))
        set_learning_rates(self.optimizer, self._scheduler, rates)
        if state.grad_scaler is not None and self._scaler.is_enabled():
            self._scaler.load_state_dict(dict(state.grad_scaler))


def _names(batches: Sequence[TrainBatch]) -> str:
    return ", ".join(" + ".join(key.name for key in batch.items) for batch in batches)
