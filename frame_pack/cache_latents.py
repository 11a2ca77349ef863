"""A run of `fpack_cache_latents.py`, from flags to cache files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from dataset.caching_run import check_models, run_latents
from dataset.fingerprints import Fingerprint
from frame_pack.caching import FramePackCacheRules, FramePackLatentEncoder
from options.errors import UserError
from options.flags_fpack_cache import ContextFlags, FramePackCacheLatentsFlags
from options.flags_generate import check_vae_memory

if TYPE_CHECKING:
    import torch

    from dataset.latent_caching import OpenEncoder


def run(flags: FramePackCacheLatentsFlags) -> int:
    """See `dataset.caching_run.run_latents`."""
    rules = rules_of(flags.context)
    check_vae_memory(flags.vae_memory)
    if flags.models.vae_dtype is not None:
        remedy = "leave it out: the VAE runs in float16 on a GPU, in float32 on a CPU"
        raise UserError("--vae_dtype", flags.models.vae_dtype, "nothing", remedy)
    check_models(flags.models, ("vae", "image_encoder"), flags.preview)
    return run_latents(flags.cache, flags.preview, rules, partial(_open_models, flags, rules))


def rules_of(flags: ContextFlags) -> FramePackCacheRules:
    """What is cached, from the flags that say so.

    Raises:
        UserError: flags that exclude each other, or no window.
    """
    if flags.f1 and flags.one_frame:
        raise UserError("--f1", "--f1 and --one_frame", "one of them", "F1 has no one-frame training")
    for name in ("one_frame_no_2x", "one_frame_no_4x"):
        if getattr(flags, name) and not flags.one_frame:
            raise UserError(f"--{name}", "no --one_frame", "--one_frame", "add --one_frame or leave it out")
    if flags.latent_window_size is not None and not 1 <= flags.latent_window_size <= 999:
        raise UserError("--latent_window_size", flags.latent_window_size, "1 to 999", "FramePack's own is 9")
    mode = "one_frame" if flags.one_frame else "f1" if flags.f1 else "sections"
    return FramePackCacheRules(
        mode=mode, no_2x=flags.one_frame_no_2x, no_4x=flags.one_frame_no_4x, window=flags.latent_window_size
    )


def _open_models(
    flags: FramePackCacheLatentsFlags, rules: FramePackCacheRules, device: torch.device
) -> tuple[OpenEncoder, Fingerprint]:
    import torch

    from common.device import pick_dtype
    from common.weights import check_names_and_shapes, fingerprint
    from frame_pack.image_encoder import build_siglip, load_siglip, open_siglip
    from hunyuan_model.vae import build_vae, load_vae, open_vae

    dtype = pick_dtype(None, on_gpu="float16", device=device)
    vae, siglip = open_vae(flags.models.vae), open_siglip(flags.models.image_encoder)
    check_names_and_shapes(build_vae(vae), vae)
    check_names_and_shapes(build_siglip(siglip), siglip)
    torch.backends.cudnn.enabled = not flags.models.disable_cudnn_backend
    memory = flags.vae_memory

    @contextmanager
    def open_encoder() -> Iterator[FramePackLatentEncoder]:
        place = {"dtype": dtype, "device": device}
        yield FramePackLatentEncoder(
            rules,
            vae=load_vae(vae, chunk_size=memory.vae_chunk_size, tile_size=memory.tile_size, **place),
            siglip=load_siglip(siglip, **place),
        )

    encoders = {
        "vae": fingerprint(vae),
        "image_encoder": fingerprint(siglip),
        "encoder_dtype": str(dtype).removeprefix("torch."),
        "vae_tile_size": str(memory.tile_size or "none"),
    }
    return open_encoder, encoders
