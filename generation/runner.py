"""The one loop of every generation: encode all requests, then denoise, decode and save one after the other."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from generation.metadata import latent_metadata
from generation.outputs import save_latents, save_pictures, save_video, unused_stem
from generation.pipeline import Failure, Frames, OnProgress, Pipeline, Progress
from options.flags_fpack_generate import OutputFlags
from options.request import GenerationRequest

logger = logging.getLogger(__name__)


def run(pipeline: Pipeline, requests: Sequence[GenerationRequest], output: OutputFlags) -> int:
    """Generates and saves all requests; one that fails is reported and the others go on.

    Returns:
        How many failed.
    """
    with pipeline.encoder() as encode:
        conditionings = list(encode(requests))
    failed = 0
    with pipeline.denoiser() as denoise:
        for number, (request, conditioning) in enumerate(zip(requests, conditionings, strict=True), 1):
            try:
                if isinstance(conditioning, Failure):
                    raise conditioning.error
                with progress_bars() as on_progress:
                    latents = denoise(request, conditioning, on_progress)
                _save(pipeline, request, latents, output)
            except Exception:
                failed += 1
                logger.exception("prompt %d of %d failed", number, len(requests))
    return failed


def _save(pipeline: Pipeline, request: GenerationRequest, latents: Tensor, output: OutputFlags) -> None:
    """Latents first, so that a failure while decoding loses nothing."""
    folder = Path(output.save_path)
    stem = unused_stem(folder, request.seed)
    if output.saves_latents:
        settings = {} if output.no_metadata else latent_metadata(request)
        logger.info("saved %s", save_latents(latents, folder, stem, metadata=settings))
    if output.saves_video or output.saves_pictures:
        save_frames(pipeline.decode(request, latents), output, stem, fps=request.fps)


def save_frames(frames: Frames, output: OutputFlags, stem: str, *, fps: int) -> None:
    """Saves decoded frames as a video or as pictures."""
    folder = Path(output.save_path)
    if output.saves_video:
        logger.info("saved %s", save_video(frames, folder, stem, fps=fps))
    else:
        paths = save_pictures(frames, folder, stem)
        logger.info("saved %s", paths[0] if len(paths) == 1 else paths[0].parent)


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
