"""The training loop: batches, gradients, steps, and what happens between steps.

What a step sees is a function of the seed, the epoch and its items; so a run that was stopped and goes on from a state
ends as one that was not, and several processes do what one does with batches as large as theirs together.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from common.processes import Processes
from dataset.epochs import ItemKey, Position, stable_number
from dataset.training_dataset import BatchLoader, TrainBatch
from modules.checkpointing import Checkpointing
from networks.network import NormReport
from options.errors import UserError, UserErrors
from options.flags_train import TrainFlags
from training.architecture import Architecture
from training.checkpoints import CheckpointWriter, Save
from training.facts import training_facts
from training.gradients import average_gradients, clip_gradients
from training.interruption import Interruption, listening
from training.loss_report import LossReport
from training.metadata import ModelIdentity, Session, run_clock, run_metadata
from training.objective import BatchLoss, Objective
from training.optimizers import create_optimizer, evaluation_weights, train_mode
from training.plan import TrainPlan
from training.random_state import random_state, restore_random_state
from training.resuming import changed_settings, remove_leftovers, set_learning_rates
from training.sampling import Samples, sample_due
from training.schedulers import create_scheduler
from training.states import RunState, load_state, save_state
from training.timesteps import stratified_quantiles
from training.tracking import LossAverage, Trackers, loggable_config, open_trackers, step_values
from training.upload import Uploader
from training.validation import validation_loss

logger = logging.getLogger(__name__)


class NotFinite(Exception):
    """A loss or gradient is not a number, and `--on_nan` says to stop."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """What one optimizer step did."""

    loss: float
    """Mean of the batches' losses, over all processes; NaN when the step was skipped."""
    norms: NormReport | None


class Trainer:
    """A run from its first step, or from a state, to its end."""

    def __init__(
        self,
        architecture: Architecture,
        flags: TrainFlags,
        plan: TrainPlan,
        processes: Processes,
        samples: Samples | None = None,
    ) -> None:
        """Loads the transformer; `plan` has checked everything else.

        Args:
            samples: whose prompts are encoded already.
        """
        self._architecture, self._flags, self._plan, self._processes = architecture, flags, plan, processes
        self._samples = samples
        self._clock = run_clock()
        self._session = Session.start(self._clock(), seed=plan.seed)
        self.step, self.position = 0, Position()
        self._average, self._report = LossAverage(), LossReport()

        transformer = architecture.load_transformer(dtype=plan.dtype, device=plan.device, merge=plan.merge)
        self.network = plan.network.to(plan.device).train()
        self.network.compute_in(plan.compute_dtype)
        self.network.apply_to(transformer)
        num_blocks = flags.memory.num_checkpointed(transformer.num_blocks)
        transformer.checkpointing = Checkpointing(num_blocks=num_blocks, has_dropout=self.network.has_dropout)
        self.transformer = transformer

        groups = self.network.parameter_groups(flags.optimizer.learning_rate)
        self._parameters = [parameter for group in groups for parameter in group["params"]]
        self._optimizer = create_optimizer(flags.optimizer, groups)
        self._scheduler = create_scheduler(flags.optimizer, self._optimizer, num_steps=plan.num_steps)
        self._scaler = torch.amp.GradScaler(plan.device.type, enabled=plan.mixed_precision == "fp16")
        train_mode(self._optimizer)
        torch.manual_seed(stable_number("dropout", plan.seed, processes.rank))
        self._objective = Objective(
            architecture=architecture,
            transformer=transformer,
            timesteps=flags.timesteps,
            seed=plan.seed,
            masked=flags.data.masked_loss,
        )
        self._loader = BatchLoader(
            plan.dataset,
            seed=plan.seed,
            num_workers=flags.data.workers,
            rank=processes.rank,
            world=processes.world,
        )
        self._resume()

    # ---- the run ----

    def run(self) -> int:
        """Trains to the end, or until a signal asks to stop.

        Returns:
            The exit code: 0, or 128 and the signal's number.

        Raises:
            NotFinite: a loss is no number and `--on_nan stop`; what was trained before is saved.
            UserError: the last save failed, or a cache cannot be read any more.
        """
        with (
            self._writing() as self._writer,
            self._tracking() as self._trackers,
            listening() as interruption,
            self._progress() as self._bar,
        ):
            if self.step == 0:
                self._sample(epoch_end=None)
                self._validate(epoch_end=None)
            while self.step < self._plan.num_steps:
                if self._epoch(interruption):
                    logger.warning("stopped after step %d of %d", self.step, self._plan.num_steps)
                    return interruption.exit_code
            self._save(self._plan.saves.at_end())
            self._draw_report()
        return 0

    def _epoch(self, interruption: Interruption) -> bool:
        """Trains to the end of the epoch or of the run. Returns whether it was interrupted."""
        epoch = self.position.epoch
        quantiles = self._quantiles(epoch)
        batches = self._loader.epoch(self.position)
        first = self.position.batch // self._processes.world
        for place, group in self._groups(batches, first):
            result = self._train_step(group, place, epoch, quantiles)
            self.step += 1
            self.position = group[-1].after
            self._log(result)
            is_epoch_end = self.position.epoch > epoch
            if is_epoch_end:
                self._trackers.log_epoch({"loss/epoch": self._average.value}, epoch=epoch + 1, step=self.step)
            self._save_if_due(epoch + 1 if is_epoch_end else None)
            self._sample(epoch_end=epoch + 1 if is_epoch_end else None)
            self._validate(epoch_end=epoch + 1 if is_epoch_end else None)
            if self._is_interrupted(interruption) and self.step < self._plan.num_steps:
                self._save(self._plan.saves.when_interrupted(self.step))
                return True
            if self.step == self._plan.num_steps:
                break
        return False

    def _groups(self, batches: Iterator[TrainBatch], first: int) -> Iterator[tuple[int, list[TrainBatch]]]:
        """(number in the epoch of its first batch, batches of one optimizer step); the last one may be smaller."""
        size = self._plan.batches_per_step
        for place in itertools.count(first, size):
            group = list(itertools.islice(batches, size))
            if not group:
                return
            yield place, group

    # ---- a step ----

    def _train_step(
        self, group: Sequence[TrainBatch], place: int, epoch: int, quantiles: Mapping[ItemKey, float] | None
    ) -> StepResult:
        results = []
        for batch in group:
            result = self._objective(batch, epoch=epoch, quantiles=quantiles)
            self._scaler.scale(result.weighted / len(group)).backward()
            results.append(result)
        self._scaler.unscale_(self._optimizer)
        average_gradients(self._parameters, self._processes)
        norm = clip_gradients(self._parameters, self._flags.optimizer.max_grad_norm)
        losses = torch.stack([result.weighted.detach() for result in results]).tolist()
        everyones = self._processes.gather(losses)
        is_sound = self._check_finite(group, losses, everyones, norm)
        norms = None
        if is_sound:
            self._scaler.step(self._optimizer)
            self._scaler.update()
            if limit := self._flags.network.scale_weight_norms:
                norms = self.network.scale_weight_norms(limit)
        elif self._scaler.is_enabled():
            self._scaler.update()
        mean = sum(map(sum, everyones)) / sum(map(len, everyones))
        self._scheduler.step(mean)
        self._optimizer.zero_grad(set_to_none=True)
        self._count(place, results, everyones)
        return StepResult(loss=mean, norms=norms)

    def _check_finite(
        self, group: Sequence[TrainBatch], losses: Sequence[float], everyones: Sequence[Sequence[float]], norm: Tensor
    ) -> bool:
        """Whether the step can be taken, the same in all processes. A batch with a loss that is no number is named.

        Raises:
            NotFinite: it cannot, and the run is to stop.
        """
        bad = [batch for batch, loss in zip(group, losses, strict=True) if not _is_finite(loss)]
        everyones_bad = any(not _is_finite(loss) for losses in everyones for loss in losses)
        # With fp16, gradients overflow now and then: the scaler then leaves the step out and scales less.
        is_overflow = not everyones_bad and not self._scaler.is_enabled() and not bool(norm.isfinite())
        if not (everyones_bad or is_overflow):
            return True
        what = "loss" if everyones_bad else "gradient"
        named = (
            ", ".join(_names(batch) for batch in (bad or group)) if bad or is_overflow else "another process's batch"
        )
        message = f"step {self.step + 1}: the {what} is not a number, with {named}"
        if self._flags.run.on_nan == "skip":
            logger.warning("%s; the step is left out", message)
            return False
        self._optimizer.zero_grad(set_to_none=True)
        if self.step:
            self._save(self._plan.saves.when_interrupted(self.step))
        raise NotFinite(f"{message}; look at its caches, lower --learning_rate, or use --on_nan skip")

    def _count(self, place: int, results: Sequence[BatchLoss], everyones: Sequence[Sequence[float]]) -> None:
        for number, losses in enumerate(zip(*everyones, strict=False)):
            self._average.add(place + number, sum(losses) / len(losses))
        for result in results:
            self._report.add(self.step + 1, result.sigmas.tolist(), result.losses.tolist())

    def _quantiles(self, epoch: int) -> Mapping[ItemKey, float] | None:
        """With `--num_timestep_buckets`, which part of the noise levels each item of an epoch sees."""
        if (num_buckets := self._flags.timesteps.num_strata) is None:
            return None
        keys = [key for bucket in self._plan.dataset.buckets for key in bucket.keys]
        return stratified_quantiles(keys, seed=self._plan.seed, epoch=epoch, num_buckets=num_buckets)

    def _is_interrupted(self, interruption: Interruption) -> bool:
        """Whether any process was asked to stop."""
        return any(self._processes.gather(interruption.number is not None))

    # ---- between steps ----

    def _log(self, result: StepResult) -> None:
        self._bar.update(1)
        self._bar.set_postfix({"avr_loss": f"{self._average.value:.4f}"}, refresh=False)
        values = step_values(
            loss=result.loss, average=self._average.value, groups=self._optimizer.param_groups, norms=result.norms
        )
        self._trackers.log(values, step=self.step)

    def _save_if_due(self, epoch: int | None) -> None:
        saves = self._plan.saves
        due = [saves.after_step(self.step), saves.after_epoch(epoch) if epoch is not None else None]
        for save in filter(None, due):
            if self.step < self._plan.num_steps or save.name != self._flags.saving.output_name:
                self._save(save)

    def _save(self, save: Save) -> None:
        """All processes come here; the first one writes."""
        rng = self._processes.gather(random_state(self._plan.device)) if save.has_state else []
        extra = self._processes.gather(self._report.state())
        failure: UserError | None = None
        if self._processes.is_main:
            state = self._state(tuple(rng), extra) if save.has_state else None
            try:
                self._writer.write(save, self._write_file, lambda folder: save_state(folder, state))
            except UserError as error:
                failure = error
        # Told to all, or the others would wait for the first process for ever.
        told = next(filter(None, self._processes.gather(failure and str(failure))), None)
        if told is not None:
            raise failure or UserErrors([told])

    def _write_file(self, path: Path) -> None:
        flags, plan, architecture = self._flags, self._plan, self._architecture
        metadata = run_metadata(
            training_facts(flags, plan, architecture, self._optimizer),
            self._session,
            ModelIdentity(architecture=architecture.model_name, implementation=architecture.implementation),
            flags.modelspec,
            finished_at=self._clock(),
            step=self.step,
            epoch=self.position.epoch + (self.position.batch > 0),
            timestep_range=(flags.timesteps.min_timestep, flags.timesteps.max_timestep),
        )
        with evaluation_weights(self._optimizer):
            self.network.save(path, dtype=getattr(torch, flags.saving.dtype_name), metadata=metadata)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """The network as it would be saved, without dropout, and nothing random spent."""
        self.network.eval()
        try:
            with evaluation_weights(self._optimizer):
                yield
        finally:
            self.network.train()

    def _sample(self, *, epoch_end: int | None) -> None:
        if self._samples is None or not sample_due(self._flags.samples, step=self.step, epoch_end=epoch_end):
            return
        with self._evaluating():
            self._samples.make(self.transformer, step=self.step, epoch=epoch_end, session=self._session.id)
        self._processes.gather(None)

    def _validate(self, *, epoch_end: int | None) -> None:
        if self._plan.validation is None or not self._flags.validation.is_due(step=self.step, epoch_end=epoch_end):
            return
        with self._evaluating():
            loss = validation_loss(self._objective, self._plan.validation, self._processes)
        if self._processes.is_main:
            self._report.add_validation(self.step, loss)
        self._trackers.log({"loss/validation": loss}, step=self.step)
        logger.info("step %d: validation loss %.5f", self.step, loss)

    def _draw_report(self) -> None:
        states = self._processes.gather(self._report.state())
        if not (self._flags.run.loss_report and self._processes.is_main):
            return
        path = Path(self._flags.saving.output_dir) / f"{self._flags.saving.output_name}_loss.png"
        LossReport.merged(states).save(path, title=self._flags.saving.output_name)
        logger.info("saved %s", path)

    # ---- states ----

    def _state(self, rng: tuple[Mapping[str, object], ...], reports: Sequence[Mapping[str, object]]) -> RunState:
        return RunState(
            network=self.network.state_dict(),
            optimizer=self._optimizer.state_dict(),
            scheduler=self._scheduler.state_dict(),
            rng=rng,
            grad_scaler=self._scaler.state_dict() if self._scaler.is_enabled() else None,
            global_step=self.step,
            position=self.position,
            session=self._session,
            fingerprint=self._plan.fingerprint,
            settings=self._plan.settings,
            extra={"average": self._average.state(), "reports": list(reports)},
        )

    def _resume(self) -> None:
        plan = self._plan
        if self._processes.is_main:
            remove_leftovers(self._flags.saving.output_dir, self._flags.saving.output_name, keep=plan.resume)
        if plan.resume is None:
            return
        state = load_state(plan.resume, plan.fingerprint)
        for change in changed_settings(state.settings, plan.settings):
            logger.warning("%s", change)
        # The scheduler has been at the rates already: a warmup begins with less.
        rates = [group.get("initial_lr", group["lr"]) for group in self._optimizer.param_groups]
        self.network.load_state_dict(dict(state.network))
        self._optimizer.load_state_dict(dict(state.optimizer))
        self._scheduler.load_state_dict(dict(state.scheduler))
        set_learning_rates(self._optimizer, self._scheduler, rates)
        if state.grad_scaler is not None and self._scaler.is_enabled():
            self._scaler.load_state_dict(dict(state.grad_scaler))
        restore_random_state(state.rng, self._processes.rank, plan.device)
        self.step, self.position, self._session = state.global_step, state.position, state.session
        self._average.load_state(state.extra["average"])
        reports = state.extra["reports"]
        if self._processes.is_main:  # all of them: the number of processes may have changed
            self._report = LossReport.merged(reports)
        epoch = self.position.epoch + 1
        logger.info("going on from %s: step %d of %d, epoch %d", plan.resume, self.step, plan.num_steps, epoch)

    # ---- what is open while the run lasts ----

    @contextmanager
    def _writing(self) -> Iterator[CheckpointWriter]:
        """What was saved is uploaded to its end, however the run ends."""
        folder, flags = self._flags.saving.output_dir, self._flags.upload
        if flags.huggingface_repo_id is None or not self._processes.is_main:
            yield CheckpointWriter(folder)
            return
        uploads = Uploader(flags)
        try:
            yield CheckpointWriter(folder, uploads=uploads, upload_states=flags.save_state_to_huggingface)
        finally:
            uploads.close()

    @contextmanager
    def _tracking(self) -> Iterator[Trackers]:
        if not self._processes.is_main:
            yield Trackers({})
            return
        flags = self._flags.tracking
        config = loggable_config(self._flags) if flags.log_config else None
        trackers = open_trackers(flags, started_at=self._session.started_at, step=self.step, config=config)
        if self._samples is not None:
            self._samples.tracker = trackers
        try:
            yield trackers
        finally:
            trackers.close()

    @contextmanager
    def _progress(self) -> Iterator[tqdm]:
        total, is_main = self._plan.num_steps, self._processes.is_main
        with tqdm(total=total, initial=self.step, desc="steps", disable=None if is_main else True) as bar:
            yield bar


def _is_finite(loss: float) -> bool:
    return loss == loss and abs(loss) != float("inf")


def _names(batch: TrainBatch) -> str:
    return " + ".join(key.name for key in batch.items)
