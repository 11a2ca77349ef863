"""Saved latents to pictures and videos; of all models only the VAE is needed."""

from __future__ import annotations

import logging
from pathlib import Path

from frame_pack.pipeline import Compute, decode_latents
from generation.check import check_output
from generation.metadata import stored_integer
from generation.outputs import check_latents, load_latents, unused_stem
from generation.runner import save_frames
from hunyuan_model.vae import open_vae
from options.errors import UserError
from options.flags_fpack_generate import FramePackGenerateFlags

logger = logging.getLogger(__name__)


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
    for path in output.latent_path:
        check_latents(path)
    check_output(output)
    compute = Compute.from_flags(flags.compute)
    vae = compute.load_vae(open_vae(flags.models.vae, memmap=not flags.models.disable_numpy_memmap))
    for path in output.latent_path:
        latents, metadata = load_latents(path)
        window = stored_integer(metadata, "latent_window_size", flags.request.latent_window_size)
        frames = decode_latents(vae, latents, window=window, bulk=compute.bulk_decode)
        stem = unused_stem(Path(output.save_path), stored_integer(metadata, "seeds", 0))
        save_frames(frames, output, f"{stem}_{Path(path).stem}", fps=flags.request.fps)
    return 0
