"""FramePack's saved latents to pictures and videos."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn

from common.residency import Resident
from common.weights import check_names_and_shapes
from frame_pack.compute import Compute
from frame_pack.decoding import decode_latents
from generation.decode_saved import SavedDecoder
from generation.decode_saved import decode_saved as decode
from generation.pipeline import Frames
from generation.settings import stored_integer
from hunyuan_model.vae import build_vae, open_vae
from options.flags_fpack_generate import FramePackGenerateFlags

DECODING = ("vae_spatial_tile_sample_min_size", "vae_chunk_size", "bulk_decode")
"""Compute settings that matter to it."""


def decode_saved(flags: FramePackGenerateFlags) -> int:
    """See `generation.decode_saved`; the window comes from the file, too."""
    return decode(flags, vae=flags.models.vae, open_decoder=partial(_open, flags))


def _open(flags: FramePackGenerateFlags) -> SavedDecoder:
    compute = Compute.from_flags(flags.compute)
    checkpoint = open_vae(flags.models.vae, memmap=not flags.models.disable_numpy_memmap)
    check_names_and_shapes(build_vae(checkpoint), checkpoint)
    recorded = compute.recorded()

    def decode_one(vae: nn.Module, latents: Tensor, metadata: Mapping[str, str]) -> Frames:
        given, limits = flags.request.latent_window_size, flags.request.limits["latent_window_size"]
        window = stored_integer(metadata, "latent_window_size", given, limits=limits)
        return decode_latents(vae, latents, window=window, bulk=compute.bulk_decode)

    return SavedDecoder(
        checkpoint=checkpoint,
        vae=Resident("VAE", partial(compute.load_vae, checkpoint), compute.device, keep=False),
        decode=decode_one,
        recorded={name: recorded[name] for name in DECODING},
    )
