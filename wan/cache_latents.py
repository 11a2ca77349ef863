"""A run of `wan_cache_latents.py`, from flags to cache files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from dataset.caching_run import check_models, run_latents
from dataset.fingerprints import Fingerprint
from options.errors import UserError
from options.flags_wan_cache import WanCacheLatentsFlags, check_wan_context
from options.wan_tasks import WAN21_ONLY
from wan.caching import WanCacheRules, WanLatentEncoder

if TYPE_CHECKING:
    import torch

    from dataset.latent_caching import OpenEncoder

STORED_TYPE = "bfloat16"
"""Of latents, whatever the VAE runs in, unless `--vae_dtype` says otherwise."""


def run(flags: WanCacheLatentsFlags) -> int:
    """See `dataset.caching_run.run_latents`."""
    rules = rules_of(flags)
    check_models(flags.models, ("vae",), flags.preview)
    return run_latents(flags.cache, flags.preview, rules, partial(_open_models, flags, rules))


def rules_of(flags: WanCacheLatentsFlags) -> WanCacheRules:
    """What is cached, from the flags that say so.

    Raises:
        UserError: flags that exclude each other, or pictures to be shown and no CLIP to look at them.
    """
    context, has_clip = flags.context, flags.models.clip is not None
    check_wan_context(context)
    if context.pictures_flag and not has_clip and not flags.preview.debug_mode:
        got = f"{context.pictures_flag} and no --clip"
        remedy = f"give --clip (Wan2.2, which has no CLIP, is {WAN21_ONLY})"
        raise UserError(context.pictures_flag, got, "Wan2.1's CLIP beside it", remedy)
    mode = (context.pictures_flag or ("--i2v" if has_clip else "--t2v")).removeprefix("--")
    return WanCacheRules(mode=mode)


def _open_models(
    flags: WanCacheLatentsFlags, rules: WanCacheRules, device: torch.device
) -> tuple[OpenEncoder, Fingerprint]:
    import torch

    from common.device import pick_dtype
    from common.weights import check_names_and_shapes, fingerprint
    from wan.image_encoder import build_clip, load_clip, open_clip
    from wan.vae import build_vae, load_vae, open_vae

    models = flags.models
    dtype = pick_dtype(models.vae_dtype, on_gpu="bfloat16", device=device)
    stored = pick_dtype(models.vae_dtype or STORED_TYPE, on_gpu=STORED_TYPE, device=device)
    vae, clip = open_vae(models.vae), None
    check_names_and_shapes(build_vae(vae), vae)
    encoders = {"vae": fingerprint(vae), "encoder_dtype": _name(dtype), "latent_dtype": _name(stored)}
    clip_dtype = pick_dtype(None, on_gpu="float16", device=device)
    if rules.mode != "t2v":
        clip = open_clip(models.clip)
        check_names_and_shapes(build_clip(clip), clip)
        encoders |= {"clip": fingerprint(clip), "clip_dtype": _name(clip_dtype)}
    torch.backends.cudnn.enabled = not models.disable_cudnn_backend

    @contextmanager
    def open_encoder() -> Iterator[WanLatentEncoder]:
        yield WanLatentEncoder(
            rules,
            vae=load_vae(vae, dtype=dtype, device=device, cache_on_cpu=models.vae_cache_cpu),
            clip=None if clip is None else load_clip(clip, dtype=clip_dtype, device=device),
            dtype=stored,
        )

    return open_encoder, encoders


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
