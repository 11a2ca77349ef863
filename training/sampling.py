"""Samples while training: pictures and videos by the generation pipeline, with the transformer as it is trained.

Nothing here stops a training: what fails is logged in one line, and the next sample has its chance.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from common.device import release_memory
from common.media import image_size
from common.processes import Processes
from dataset.epochs import stable_number
from generation.check import check_jobs
from generation.jobs import Job, single_job
from generation.outputs import save_pictures, save_video
from generation.pipeline import Conditioning, Denoise, Failure, Frames, Pipeline
from generation.runner import Report, progress_bars
from options.errors import UserError
from options.flags_generate import RequestFlags
from options.flags_train import SampleFlags
from options.sample_prompts import SamplePrompt, each, sample_prompts
from training.random_state import random_state, restore_random_state
from training.sample_sheets import TRAINING_KEY, SampleSheet, sample_name
from training.tracking import Trackers

if TYPE_CHECKING:
    from training.architecture import Architecture

logger = logging.getLogger(__name__)


# ---- which samples, and when ----


def sample_jobs(path: str, defaults: RequestFlags, *, seed: int) -> tuple[Job, ...]:
    """The prompts of a file, resolved and checked, with advice about them in the log.

    Args:
        defaults: what the prompts leave open.
        seed: of the run. A prompt without a seed has one that depends on this and on its number.

    Raises:
        UserError: no such file, or not one of prompts.
        UserErrors: one line for each prompt that cannot be generated.
    """

    def job(prompt: SamplePrompt) -> Job:
        own = stable_number("sample", seed, prompt.number) % 2**32

        def resolve(flags: RequestFlags) -> Job:
            return single_job(replace(flags, seed=own if flags.seed is None else flags.seed), image_size, prompt.where)

        return prompt.resolve(defaults, resolve)

    prompts = sample_prompts(path, defaults.sample_options)
    jobs = tuple(each(prompts, job))
    for prompt, made in zip(prompts, jobs, strict=True):
        own = prompt.over(defaults).remarks_on_samples(made.request, prompt.named("of"))
        for remark in (*made.request.remarks(), *own):
            logger.warning("%s: %s", prompt.where, prompt.in_its_terms(remark))
    return jobs


def sample_due(flags: SampleFlags, *, step: int, epoch_end: int | None) -> bool:
    """Whether to make samples now.

    Args:
        step: how many were made; 0 is before the first.
        epoch_end: the epoch that has just ended, from 1; None inside of one.
    """
    if step == 0:
        return flags.sample_at_first
    by_step = flags.sample_every_n_steps and step % flags.sample_every_n_steps == 0
    return bool(by_step) or epoch_due(flags, epoch_end) is not None


def epoch_due(flags: SampleFlags, epoch_end: int | None) -> int | None:
    """The epoch that has just ended if its end is a time for samples, else None."""
    every = flags.sample_every_n_epochs
    return epoch_end if every and epoch_end is not None and epoch_end % every == 0 else None


# ---- making them ----


@dataclass(frozen=True, kw_only=True)
class _Encoded:
    """A prompt that waits for its turns."""

    number: int
    """From 0."""
    job: Job
    conditioning: Conditioning
    """On the CPU."""
    settings: Mapping[str, object]
    """Those that a result of generation would carry."""
    sheet: SampleSheet


@dataclass(frozen=True, kw_only=True)
class _Occasion:
    """One time at which all prompts are sampled."""

    step: int
    epoch: int | None
    session: int

    def about(self, job: Job) -> Job:
        """The job, with the step in its messages."""
        return replace(job, where=f"{job.where}, sample at step {self.step}")

    def settings(self, before: Mapping[str, object], name: str) -> str:
        """What the sample carries: generation's settings, and which training at which step made it."""
        models = {**before["models"], "--lora_weight": f"{name}, at step {self.step} of its training"}
        made = {"session": self.session, "step": self.step, "epoch": self.epoch}
        return json.dumps({**before, "models": models, TRAINING_KEY: made}, ensure_ascii=False, sort_keys=True)


class Samples:
    """The samples of a run. Every process makes those of its own share of the prompts.

    Args:
        jobs: see `sample_jobs`.
        folder: where samples and sheets go.
        name: what their names begin with.
        dtype: of the transformer.
        tracker: of the main process; it may be set later.
    """

    def __init__(
        self,
        architecture: Architecture,
        jobs: Sequence[Job],
        *,
        folder: Path,
        name: str,
        dtype: torch.dtype,
        device: torch.device,
        processes: Processes,
        tracker: Trackers | None = None,
    ) -> None:
        self._architecture, self._jobs, self._folder, self._name = architecture, jobs, folder, name
        self._dtype, self._device, self._processes = dtype, device, processes
        self.tracker = Trackers({}) if tracker is None else tracker
        self._encoded: list[_Encoded] = []
        self._pipeline: tuple[nn.Module, Pipeline] | None = None

    def encode(self) -> None:
        """Encodes the prompts, once and before the transformer is loaded; the encoders are gone afterwards.

        What cannot be encoded is logged, and is in no sample.

        Raises:
            UserError: a model is missing, damaged, or another one than its flag says.
        """
        own = self._processes.share(list(enumerate(self._jobs)))
        if not own:
            return
        with _same_random_numbers(self._device):
            try:
                self._encoded = self._encode(own)
            except UserError:
                raise
            except Exception as error:  # no memory for an encoder, say: a training without samples is better than none
                Report().add(replace(own[0][1], where="samples"), error)
        release_memory(self._device)

    def _encode(self, own: Sequence[tuple[int, Job]]) -> list[_Encoded]:
        pipeline = self._open(None)
        check_jobs(pipeline, [job for _, job in own])
        provenance, report, encoded = pipeline.provenance(with_paths=False), Report(), []
        with pipeline.encoder() as encode:
            results = encode([job.request for _, job in own])
            for (number, job), conditioning in zip(own, results, strict=True):
                with report.of(job):
                    if isinstance(conditioning, Failure):
                        raise conditioning.error
                    sheet = SampleSheet(self._folder, self._name, number, title=job.request.title)
                    settings = json.loads(provenance.settings(job.request))
                    encoded.append(
                        _Encoded(number=number, job=job, conditioning=conditioning, settings=settings, sheet=sheet)
                    )
        return encoded

    def make(
        self,
        transformer: nn.Module,
        *,
        step: int,
        epoch: int | None = None,
        session: int,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """Generates and saves a sample of every prompt; all processes call it. Random numbers are as they were.

        Args:
            transformer: with the network applied, in evaluation mode; it stays where it is.
            epoch: the one that ended with this step, from 1; None inside of one.
            session: of the run, so that its sheets show its own samples only; the main process's counts.
            is_stopping: asked before each prompt; the rest is left out when it is true.
        """
        session = self._processes.gather(session)[0]
        with _same_random_numbers(self._device):
            made = self._make_own(transformer, _Occasion(step=step, epoch=epoch, session=session), is_stopping)
        everyones = [sample for samples in self._processes.gather(made) for sample in samples]
        for number, path in sorted(everyones):
            if path.is_file():  # another machine's may not be here
                self.tracker.log_sample(number, path, step=step)

    def _make_own(
        self, transformer: nn.Module, occasion: _Occasion, is_stopping: Callable[[], bool]
    ) -> list[tuple[int, Path]]:
        """(number of the prompt, file) of what was made."""
        report, made = Report(), []
        if not self._encoded:
            return made
        with report.of(replace(self._encoded[0].job, where=f"samples at step {occasion.step}")):
            pipeline = self._lent(transformer)
            with pipeline.denoiser() as denoise:
                for encoded in self._encoded:
                    if is_stopping():
                        break
                    with report.of(occasion.about(encoded.job)):
                        path = self._make_one(pipeline, denoise, encoded, occasion)
                        made.append((encoded.number, path))
                        encoded.sheet.add(path, step=occasion.step, session=occasion.session)
        return made

    def _make_one(self, pipeline: Pipeline, denoise: Denoise, encoded: _Encoded, occasion: _Occasion) -> Path:
        request = encoded.job.request
        bars = progress_bars() if self._processes.is_main else nullcontext(lambda progress: None)
        with bars as on_progress:
            latents = denoise(request, encoded.conditioning, on_progress)
        path = self._save(pipeline.decode(request, latents), encoded, occasion)
        logger.info("saved %s", path)
        return path

    def _save(self, frames: Frames, encoded: _Encoded, occasion: _Occasion) -> Path:
        request, time = encoded.job.request, f"{datetime.now():%Y%m%d%H%M%S}"
        when = {"step": occasion.step, "epoch": occasion.epoch, "time": time}
        stem = sample_name(self._name, encoded.number, seed=request.seed, **when)
        settings = occasion.settings(encoded.settings, self._name)
        if len(frames) == 1:
            return save_pictures(frames, self._folder, f"{stem}_000", settings=settings)[0]
        return save_video(frames, self._folder, stem, fps=request.fps, settings=settings)

    def _lent(self, transformer: nn.Module) -> Pipeline:
        """The pipeline around `transformer`, kept for the next time: its VAE then need not be read again."""
        if self._pipeline is None or self._pipeline[0] is not transformer:
            self._pipeline = (transformer, self._open(transformer))
        return self._pipeline[1]

    def _open(self, transformer: nn.Module | None) -> Pipeline:
        return self._architecture.pipeline(dtype=self._dtype, device=self._device, transformer=transformer)


@contextmanager
def _same_random_numbers(device: torch.device) -> Iterator[None]:
    """Afterwards all generators are as they were: a training draws the same numbers with and without samples."""
    state = random_state(device)
    try:
        yield
    finally:
        restore_random_state([state], 0, device)
