"""Saved latents to pictures and videos; of all models only the VAE is needed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from common.residency import Resident
from common.weights import Checkpoint, fingerprint
from generation.check import check_output
from generation.outputs import SETTINGS_KEY, check_latents, load_latents, unused_stem
from generation.pipeline import Frames
from generation.runner import save_frames
from generation.series import GenerateFlags
from generation.settings import recorded_integer, settings_of_decoding, stored_integer
from options.errors import UserError
from options.request_rules import COMMON_LIMITS, check_numbers

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SavedDecoder:
    """A family's VAE, its header checked."""

    checkpoint: Checkpoint
    vae: Resident
    decode: Callable[[nn.Module, Tensor, Mapping[str, str]], Frames]
    """(VAE, latents (C, F, h, w), the file's metadata) → pictures."""
    recorded: Mapping[str, object]
    """Compute settings that matter to decoding, as results say them."""
    request: Mapping[str, object] = field(default_factory=dict)
    """What flags ask for instead of what the latents were made for, as results say it."""


def decode_saved(flags: GenerateFlags, *, vae: str | None, open_decoder: Callable[[], SavedDecoder]) -> int:
    """Decodes every file of `--latent_path`. Seed and rate come from the files' settings where they have some.

    Args:
        vae: the value of `--vae`.
        open_decoder: called when everything else is in order.

    Returns:
        The exit code.

    Raises:
        UserError: a file without latents, no VAE, or an output type that would save nothing new.
    """
    output = flags.output
    if output.output_type == "latent":
        raise UserError("--output_type", "latent", "video or images with --latent_path", "choose one of them")
    if vae is None:
        raise UserError("--vae", "nothing", "the VAE, to decode --latent_path", "give --vae")
    check_numbers(flags.request)
    for path in output.latent_path:
        check_latents(path)
    check_output(output)
    saved = [load_latents(path) for path in output.latent_path]
    decoder = open_decoder()
    if flags.series.check:
        logger.info("checked: %d latents, the VAE's header and the output folder are in order", len(saved))
        return 0
    vae_fingerprint = fingerprint(decoder.checkpoint)
    with decoder.vae.use():
        for path, (latents, metadata) in zip(output.latent_path, saved, strict=True):
            frames = decoder.decode(decoder.vae.model, latents, metadata)
            stem = unused_stem(Path(output.save_path), stored_integer(metadata, "seeds", 0))
            made = metadata.get(SETTINGS_KEY)
            fps = _rate(flags, made)
            asked = {"fps": fps, **decoder.request}
            now = settings_of_decoding(made, vae=vae_fingerprint, decoding=decoder.recorded, request=asked)
            settings = None if output.no_metadata else now
            form = (
                output if output.output_type else replace(output, output_type="images" if len(frames) == 1 else "video")
            )
            save_frames(frames, form, f"{stem}_{Path(path).stem}", fps=fps, settings=settings)
    return 0


def _rate(flags: GenerateFlags, made: str | None) -> int:
    """The family's default rate, given explicitly or not, gives way to the one that the latents were made for."""
    given = flags.request.fps
    recorded = recorded_integer(made, "fps", limits=COMMON_LIMITS["fps"])
    return recorded or given if given == type(flags.request).fps else given
