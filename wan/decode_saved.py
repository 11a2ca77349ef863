"""Wan's saved latents to pictures and videos."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn

from common.residency import Resident
from common.weights import check_names_and_shapes
from generation.decode_saved import SavedDecoder
from generation.decode_saved import decode_saved as decode
from generation.outputs import SETTINGS_KEY, check_latents
from generation.pipeline import Frames
from generation.settings import recorded_integer
from options.errors import UserError
from options.flags_wan_generate import WanGenerateFlags
from options.geometry import FRAMES_PER_LATENT
from wan.checkpoints import from_release
from wan.compute import Compute
from wan.pipeline import decode_latents
from wan.vae import build_vae, load_vae, open_vae


def decode_saved(flags: WanGenerateFlags) -> int:
    """See `generation.decode_saved`. What is trimmed comes from the files' settings, too, where no flag says it."""
    models, trim = from_release(flags.models), flags.request.trim_tail_frames

    def open_decoder() -> SavedDecoder:
        for path in flags.output.latent_path:
            _check_trim(trim, path)
        compute = Compute.from_flags(flags.compute)
        checkpoint = open_vae(models.vae, memmap=not models.disable_numpy_memmap)
        check_names_and_shapes(build_vae(checkpoint), checkpoint)
        settings = {"dtype": compute.vae_dtype, "cache_on_cpu": compute.vae_cache_cpu}
        load = partial(load_vae, checkpoint, device=compute.device, **settings)
        return SavedDecoder(
            checkpoint=checkpoint,
            vae=Resident("VAE", load, compute.device, keep=False),
            decode=partial(_decode, trim=trim),
            recorded={"vae_dtype": compute.recorded()["vae_dtype"]},
            request={"trim_tail_frames": trim} if trim else {},
        )

    return decode(flags, vae=models.vae, open_decoder=open_decoder)


def _check_trim(trim: int, path: str) -> None:
    """Raises UserError when nothing would be left."""
    num_frames = FRAMES_PER_LATENT * (check_latents(path)[1] - 1) + 1
    if trim >= num_frames:
        raise UserError("--trim_tail_frames", trim, f"less than the {num_frames} frames of {path}", "use 0, say")


def _decode(vae: nn.Module, latents: Tensor, metadata: Mapping[str, str], *, trim: int) -> Frames:
    frames = decode_latents(vae, latents)
    recorded = recorded_integer(metadata.get(SETTINGS_KEY), "trim_tail_frames", limits=(0, len(frames) - 1))
    return frames[: len(frames) - (trim or recorded or 0)]
