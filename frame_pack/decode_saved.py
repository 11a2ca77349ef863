"""Saved latents to pictures and videos; of all models only the VAE is needed."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

from common.residency import Resident
from common.weights import check_names_and_shapes, fingerprint
from frame_pack.pipeline import Compute, decode_latents
from generation.check import check_output
from generation.outputs import SETTINGS_KEY, check_latents, load_latents, unused_stem
from generation.runner import save_frames
from generation.settings import recorded_fps, settings_of_decoding, stored_integer
from hunyuan_model.vae import build_vae, open_vae
from options.errors import UserError
from options.flags_fpack_generate import FramePackGenerateFlags
from options.flags_generate import RequestFlags
from options.request import check_numbers

logger = logging.getLogger(__name__)

DEFAULT_FPS = RequestFlags.fps
"""Given explicitly or not, this rate gives way to the one that the latents were made for."""


def decode_saved(flags: FramePackGenerateFlags) -> int:
    """Decodes every file of `--latent_path`. Seed and window come from the files' settings where they have some.

    Returns:
        The exit code.

    Raises:
        UserError: a file without latents, no VAE, or an output type that would save nothing new.
    """
    output = flags.output
    if output.output_type == "latent":
        raise UserError("--output_type", "latent", "video or images with --latent_path", "choose one of them")
    if flags.models.vae is None:
        raise UserError("--vae", "nothing", "the VAE, to decode --latent_path", "give --vae")
    check_numbers(flags.request)
    for path in output.latent_path:
        check_latents(path)
    check_output(output)
    saved = [load_latents(path) for path in output.latent_path]
    compute = Compute.from_flags(flags.compute)
    checkpoint = open_vae(flags.models.vae, memmap=not flags.models.disable_numpy_memmap)
    check_names_and_shapes(build_vae(checkpoint), checkpoint)
    if flags.series.check:
        logger.info("checked: %d latents, the VAE's header and the output folder are in order", len(saved))
        return 0
    vae = Resident("VAE", partial(compute.load_vae, checkpoint), compute.device, keep=False)
    vae_fingerprint = fingerprint(checkpoint)
    with vae.use():
        for path, (latents, metadata) in zip(output.latent_path, saved, strict=True):
            window = stored_integer(metadata, "latent_window_size", flags.request.latent_window_size)
            frames = decode_latents(vae.model, latents, window=window, bulk=compute.bulk_decode)
            stem = unused_stem(Path(output.save_path), stored_integer(metadata, "seeds", 0))
            made = metadata.get(SETTINGS_KEY)
            fps = recorded_fps(made) or flags.request.fps if flags.request.fps == DEFAULT_FPS else flags.request.fps
            now = settings_of_decoding(made, vae=vae_fingerprint, compute=compute.recorded(), fps=fps)
            settings = None if output.no_metadata else now
            save_frames(frames, output, f"{stem}_{Path(path).stem}", fps=fps, settings=settings)
    return 0
