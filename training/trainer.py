"""The training loop: batches, gradients, steps, and what happens between steps.

What a step sees is a function of the seed, the epoch and its items; so a run that was stopped and goes on from a state
ends as one that was not, and several processes do what one does with batches as large as theirs together.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from common.processes import Processes
from dataset.epochs import ItemKey, Position, stable_number
from dataset.training_dataset import BatchLoader, TrainBatch
from modules.checkpointing import Checkpointing
from options.errors import UserError, one_line
from options.flags_train import TrainFlags
from training.architecture import Architecture
from training.checkpoints import CheckpointWriter, Save
from training.facts import training_facts
from training.interruption import Interruption, listening
from training.loss_report import LossReport
from training.metadata import ModelIdentity, Session, run_clock, run_metadata
from training.objective import Objective
from training.optimizers import evaluation_weights
from training.plan import TrainPlan
from training.random_state import random_state, restore_random_state
from training.resuming import changed_settings, remove_leftovers
from training.sampling import Samples, epoch_due, sample_due
from training.states import RunState, load_state, save_state
from training.step import NotFinite, Stepper, StepResult
from training.timesteps import stratified_quantiles
from training.tracking import LossAverage, Trackers, loggable_config, open_trackers, step_values
from training.upload import Uploader
from training.validation import validation_loss

logger = logging.getLogger(__name__)


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
        self._interruption = Interruption()
        self._step_with_state: int | None = None
        """The last step whose state is on the disk."""

        transformer = architecture.load_transformer(dtype=plan.dtype, device=plan.device, merge=plan.merge)
        self.network = plan.network.to(plan.device).train()
        self.network.compute_in(plan.compute_dtype)
        self.network.apply_to(transformer)
        num_blocks = flags.memory.num_checkpointed(transformer.num_blocks)
        transformer.checkpointing = Checkpointing(num_blocks=num_blocks, has_dropout=self.network.has_dropout)
        self.transformer = transformer

        torch.manual_seed(stable_number("dropout", plan.seed, processes.rank))
        self._objective = Objective(
            architecture=architecture,
            transformer=transformer,
            timesteps=flags.timesteps,
            seed=plan.seed,
            masked=flags.data.masked_loss,
        )
        self._stepper = Stepper(
            flags,
            self.network,
            self._objective,
            processes,
            num_steps=plan.num_steps,
            device=plan.device,
            scales_loss=plan.mixed_precision == "fp16",
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
            self._interruption = interruption
            if self.step == 0:
                self._sample(epoch_end=None)
                self._validate(epoch_end=None)
            while self.step < self._plan.num_steps:
                if self._is_interrupted() or self._epoch():
                    logger.warning("stopped after step %d of %d", self.step, self._plan.num_steps)
                    return interruption.exit_code
            self._save(self._plan.saves.at_end())
            self._draw_report()
        return 0

    def _epoch(self) -> bool:
        """Trains to the end of the epoch or of the run. Returns whether it was interrupted."""
        epoch = self.position.epoch
        quantiles = self._quantiles(epoch)
        batches = self._loader.epoch(self.position)
        first = self.position.batch // self._processes.world
        groups = self._groups(batches, first)
        while self.step < self._plan.num_steps:
            with self._rescuing():
                place, group = next(groups, (0, None))
                if group is None:
                    return False
                result = self._stepper.take(group, step=self.step + 1, epoch=epoch, quantiles=quantiles)
            self.step += 1
            self.position = group[-1].after
            self._log(result, place)
            epoch_end = epoch + 1 if self.position.epoch > epoch else None
            if epoch_end is not None:
                self._trackers.log_epoch({"loss/epoch": self._average.value}, epoch=epoch_end, step=self.step)
            self._save_if_due(epoch_end)
            if self._saved_for_interruption():
                return True
            self._sample(epoch_end=epoch_end)
            self._validate(epoch_end=epoch_end)
            if self._saved_for_interruption():
                return True
        return False

    def _saved_for_interruption(self) -> bool:
        """Whether the run was asked to stop; then what is needed to go on is saved. The last step ends it anyway."""
        if self.step == self._plan.num_steps or not self._is_interrupted():
            return False
        self._save_progress()
        return True

    def _save_progress(self) -> None:
        """Makes sure that file and state of this step are there."""
        if self.step and self._step_with_state != self.step:
            self._save(self._plan.saves.when_interrupted(self.step))

    @contextmanager
    def _rescuing(self) -> Iterator[None]:
        """Saves what was trained before a step that cannot be made: too little memory, a cache that is gone.

        Of several processes the others know nothing of it, so that only what all of them notice can be saved.
        """
        try:
            yield
        except NotFinite:
            self._save_progress()
            raise
        except Exception as error:
            self._stepper.forget_gradients()
            if self._processes.world == 1:
                self._save_progress()
            if isinstance(error, torch.OutOfMemoryError):
                expected = "memory for this step"
                remedy = "use --gradient_checkpointing, a smaller batch_size or resolution, or a smaller --network_dim"
                raise UserError(f"step {self.step + 1}", one_line(str(error))[:200], expected, remedy) from error
            raise

    def _groups(self, batches: Iterator[TrainBatch], first: int) -> Iterator[tuple[int, list[TrainBatch]]]:
        """(number in the epoch of its first batch, batches of one optimizer step); the last one may be smaller."""
        size = self._plan.batches_per_step
        for place in itertools.count(first, size):
            group = list(itertools.islice(batches, size))
            if not group:
                return
            yield place, group

    def _quantiles(self, epoch: int) -> Mapping[ItemKey, float] | None:
        """With `--num_timestep_buckets`, which part of the noise levels each item of an epoch sees."""
        if (num_buckets := self._flags.timesteps.num_strata) is None:
            return None
        keys = [key for bucket in self._plan.dataset.buckets for key in bucket.keys]
        return stratified_quantiles(keys, seed=self._plan.seed, epoch=epoch, num_buckets=num_buckets)

    def _is_interrupted(self) -> bool:
        """Whether any process was asked to stop; then all of them were."""
        interruption = self._interruption
        heard = next((number for number in self._processes.gather(interruption.number) if number is not None), None)
        if heard is not None and interruption.number is None:
            interruption.hear(heard, None)
        return heard is not None

    # ---- between steps ----

    def _log(self, result: StepResult, place: int) -> None:
        for number, loss in enumerate(result.batches):
            self._average.add(place + number, loss)
        for batch in result.samples:
            self._report.add(self.step, batch.sigmas.tolist(), batch.losses.tolist())
        self._bar.update(1)
        self._bar.set_postfix({"avr_loss": f"{self._average.value:.4f}"}, refresh=False)
        groups = self._stepper.optimizer.param_groups
        values = step_values(loss=result.loss, average=self._average.value, groups=groups, norms=result.norms)
        self._trackers.log(values, step=self.step)

    def _save_if_due(self, epoch: int | None) -> None:
        saves = self._plan.saves
        due = [saves.after_step(self.step), saves.after_epoch(epoch) if epoch is not None else None]
        for save in filter(None, due):
            self._save(save)

    def _save(self, save: Save) -> None:
        """All processes come here; the first one writes."""
        rng = self._processes.gather(random_state(self._plan.device)) if save.has_state else []
        reports = self._processes.gather(self._report.state()) if save.has_state else []

        def write() -> bool:
            state = self._state(tuple(rng), reports) if save.has_state else None
            return self._writer.write(save, self._write_file, lambda folder: save_state(folder, state))

        if self._processes.in_main(write) and save.has_state:
            self._step_with_state = self.step

    def _write_file(self, path: Path) -> None:
        flags, plan, architecture = self._flags, self._plan, self._architecture
        metadata = run_metadata(
            training_facts(flags, plan, architecture, self._stepper.optimizer),
            self._session,
            ModelIdentity(architecture=architecture.model_name, implementation=architecture.implementation),
            flags.modelspec,
            finished_at=self._clock(),
            step=self.step,
            epoch=self.position.epoch + (self.position.batch > 0),
            timestep_range=(flags.timesteps.min_timestep, flags.timesteps.max_timestep),
        )
        with evaluation_weights(self._stepper.optimizer):
            self.network.save(path, dtype=getattr(torch, flags.saving.dtype_name), metadata=metadata)

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        """The network as it would be saved, without dropout, and nothing random spent."""
        self.network.eval()
        try:
            with evaluation_weights(self._stepper.optimizer):
                yield
        finally:
            self.network.train()

    def _sample(self, *, epoch_end: int | None) -> None:
        if self._samples is None or not sample_due(self._flags.samples, step=self.step, epoch_end=epoch_end):
            return
        with self._evaluating():
            self._samples.make(
                self.transformer,
                step=self.step,
                epoch=epoch_due(self._flags.samples, epoch_end),
                session=self._session.id,
                is_stopping=lambda: self._interruption.number is not None,
            )
        self._processes.gather(None)

    def _validate(self, *, epoch_end: int | None) -> None:
        if self._plan.validation is None or not self._flags.validation.is_due(step=self.step, epoch_end=epoch_end):
            return
        with self._evaluating():
            loss = validation_loss(
                self._objective,
                self._plan.validation,
                self._processes,
                is_stopping=lambda: self._interruption.number is not None,
            )
        if loss is None:
            return
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
            **self._stepper.state(),
            rng=rng,
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
        self.network.load_state_dict(dict(state.network))
        self._stepper.load(state)
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
