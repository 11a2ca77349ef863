"""The one loop of every generation: encode all requests, then denoise, decode and save one after the other."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from generation.jobs import Job
from generation.outputs import SETTINGS_KEY, save_latents, save_pictures, save_video, unused_stem
from generation.pipeline import Conditioning, Denoise, Failure, Frames, OnProgress, Pipeline, Progress
from generation.preview import Preview
from generation.settings import Provenance
from options.errors import UserError, one_line
from options.flags_generate import OutputFlags

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of a job."""

    job: Job
    stem: str
    paths: tuple[Path, ...]
    """Files and folders that were saved."""
    frames: Frames | None
    """The decoded pictures; None when only latents were asked for."""


def run(
    pipeline: Pipeline,
    jobs: Sequence[Job],
    output: OutputFlags,
    *,
    provenance: Provenance,
    on_result: Callable[[Result], None] = lambda result: None,
) -> int:
    """Generates and saves all jobs; one that fails is reported and the others go on.

    Args:
        on_result: called after each job that was saved.

    Returns:
        How many failed.
    """
    if not jobs:
        return 0
    report = Report()
    settings: dict[int, str] = {}
    for number, job in enumerate(jobs):  # before encoding: what is encoded is what the settings say
        with report.of(job):
            settings[number] = provenance.settings(job.request)
    known = [(number, job) for number, job in enumerate(jobs) if number in settings]
    with pipeline.encoder() as encode:
        encoded = list(encode([job.request for _, job in known]))
    ready: list[tuple[Job, Conditioning, str]] = []
    for (number, job), conditioning in zip(known, encoded, strict=True):
        with report.of(job):
            if isinstance(conditioning, Failure):
                raise conditioning.error
            if provenance.settings(job.request) != settings[number]:
                raise UserError("input images", "one that changed meanwhile", "unchanged files", "run it again")
            ready.append((job, conditioning, settings[number]))
    to_save: list[_Generated] = []

    def save() -> None:
        for generated in to_save:
            with report.of(generated.job):
                on_result(generated.save(pipeline))
        to_save.clear()

    with pipeline.denoiser() if ready else nullcontext() as denoise:
        for job, conditioning, text in ready:
            save()
            with report.of(job):
                to_save.append(_generate(denoise, job, conditioning, _Writer(job, output, text)))
    save()  # The last one is decoded when the transformer has left: a single prompt never holds both.
    return report.failed


def log_remarks(job: Job) -> None:
    for remark in job.request.remarks():
        logger.warning("%s: %s", job.where, remark)


class Report:
    """Counts failures and says each in one line; the traceback is for the debug log."""

    failed = 0

    @contextmanager
    def of(self, job: Job) -> Iterator[None]:
        """What fails inside is reported and goes no further."""
        try:
            yield
        except Exception as error:  # one job must not take the others with it
            self.add(job, error)

    def add(self, job: Job, error: Exception) -> None:
        self.failed += 1
        if isinstance(error, UserError):
            logger.error("%s: %s", job.where, error)
            return
        frames = traceback.extract_tb(error.__traceback__)
        place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
        logger.error("%s failed: %s: %s%s", job.where, type(error).__name__, one_line(str(error)), place)
        logger.debug("%s", job.where, exc_info=error)


@dataclass(frozen=True, kw_only=True)
class _Generated:
    """A job whose latents are ready."""

    job: Job
    writer: _Writer
    latents: Tensor
    """(C, F, h, w)"""

    def save(self, pipeline: Pipeline) -> Result:
        return self.writer.save(self.latents, lambda: pipeline.decode(self.job.request, self.latents))


def _generate(denoise: Denoise, job: Job, conditioning: Conditioning, writer: _Writer) -> _Generated:
    log_remarks(job)
    with writer.progress(conditioning) as on_progress:
        return _Generated(job=job, writer=writer, latents=denoise(job.request, conditioning, on_progress))


class _Writer:
    """Everything that one job leaves on disk; its name is chosen when the job begins."""

    def __init__(self, job: Job, output: OutputFlags, settings: str) -> None:
        self._job = job
        # A single frame is a picture, whatever a video would be saved as.
        default = "images" if job.request.is_picture else "video"
        self._output = replace(output, output_type=output.output_type or default)
        self._folder = Path(output.save_path)
        self._stem = unused_stem(self._folder, job.request.seed)
        self._settings = None if output.no_metadata else settings

    @contextmanager
    def progress(self, conditioning: Conditioning) -> Iterator[OnProgress]:
        """Bars, and a preview after every section if one is wanted."""
        preview = Preview.fit(conditioning.pictures) if self._output.preview else None
        with progress_bars() as show_bar:

            def on_progress(progress: Progress) -> None:
                show_bar(progress)
                if preview and progress.latents is not None:
                    preview.save(progress.latents, self._folder, self._stem, settings=self._settings)

            yield on_progress

    def save(self, latents: Tensor, decode: Callable[[], Frames]) -> Result:
        """Saves what was asked for. When decoding fails, the latents are saved instead: they took the time."""
        output, paths, frames = self._output, [], None
        if output.saves_latents:
            paths.append(self._save_latents(latents))
        if output.saves_video or output.saves_pictures:
            try:
                frames = decode()
                fps = self._job.request.fps
                paths.append(save_frames(frames, output, self._stem, fps=fps, settings=self._settings))
            except Exception:
                kept = paths[0] if paths else self._save_latents(latents)
                logger.error("the latents are safe: decode them with --latent_path %s", kept)
                raise
        return Result(job=self._job, stem=self._stem, paths=tuple(paths), frames=frames)

    def _save_latents(self, latents: Tensor) -> Path:
        settings = {} if self._settings is None else {SETTINGS_KEY: self._settings}
        metadata = {} if self._settings is None else self._job.request.incumbent_metadata() | settings
        path = save_latents(latents, self._folder, self._stem, metadata=metadata)
        logger.info("saved %s", path)
        return path


def save_frames(frames: Frames, output: OutputFlags, stem: str, *, fps: int, settings: str | None) -> Path:
    """Saves decoded frames as a video, as one picture, or as a folder of pictures, and returns which."""
    folder = Path(output.save_path)
    if output.saves_video:
        path = save_video(frames, folder, stem, fps=fps, settings=settings)
    else:
        paths = save_pictures(frames, folder, stem, settings=settings)
        path = paths[0] if len(paths) == 1 else paths[0].parent
    logger.info("saved %s", path)
    return path


@contextmanager
def progress_bars() -> Iterator[OnProgress]:
    """One bar per section, counting steps."""
    bar: tqdm | None = None

    def on_progress(progress: Progress) -> None:
        nonlocal bar
        if progress.step == 0:
            if bar is not None:
                bar.close()
            title = f"section {progress.section + 1}/{progress.num_sections}" if progress.num_sections > 1 else "steps"
            bar = tqdm(total=progress.num_steps, desc=title, unit="step")
        bar.update(progress.step - bar.n)

    try:
        yield on_progress
    finally:
        if bar is not None:
            bar.close()
