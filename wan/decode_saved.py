"""Wan's saved latents to pictures and videos."""

from __future__ import annotations

from functools import partial

from common.residency import Resident
from common.weights import check_names_and_shapes
from generation.decode_saved import SavedDecoder
from generation.decode_saved import decode_saved as decode
from options.flags_wan_generate import WanGenerateFlags
from wan.checkpoints import from_release
from wan.compute import Compute
from wan.pipeline import decode_latents
from wan.vae import build_vae, load_vae, open_vae


def decode_saved(flags: WanGenerateFlags) -> int:
    """See `generation.decode_saved`."""
    models = from_release(flags.models)

    def open_decoder() -> SavedDecoder:
        compute = Compute.from_flags(flags.compute)
        checkpoint = open_vae(models.vae, memmap=not models.disable_numpy_memmap)
        check_names_and_shapes(build_vae(checkpoint), checkpoint)
        settings = {"dtype": compute.vae_dtype, "cache_on_cpu": compute.vae_cache_cpu}
        load = partial(load_vae, checkpoint, device=compute.device, **settings)
        return SavedDecoder(
            checkpoint=checkpoint,
            vae=Resident("VAE", load, compute.device, keep=False),
            decode=lambda vae, latents, metadata: decode_latents(vae, latents),
            recorded={"vae_dtype": compute.recorded()["vae_dtype"]},
        )

    return decode(flags, vae=models.vae, open_decoder=open_decoder)
