"""Pixels to latents, the same for generation and for caches.

Shapes: B batch, F pixel frames, H W pixel size, C latent channels, F' latent frames, h w latent size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from common.media import to_model_range
from common.pictures import frames_to_pixels
from common.pictures import latent_mask as latent_mask
from hunyuan_model import vae as hunyuan_vae

if TYPE_CHECKING:
    from diffusers import AutoencoderKLHunyuanVideo


def encode_pictures(vae: AutoencoderKLHunyuanVideo, pictures: Sequence[np.ndarray]) -> Tensor:
    """(H, W, 3) uint8 pictures of one size → scaled latents (B, C, 1, h, w) float32 on the CPU, by one VAE call."""
    return encode_clips(vae, np.stack(pictures)[:, None])


def encode_clips(vae: AutoencoderKLHunyuanVideo, clips: np.ndarray) -> Tensor:
    """(B, F, H, W, 3) uint8, F = 4n + 1 → scaled latents (B, C, F', h, w) float32 on the CPU, by one VAE call."""
    return encode_pixels(vae, to_model_range(clips))


def encode_pixels(vae: AutoencoderKLHunyuanVideo, pixels: np.ndarray) -> Tensor:
    """`encode_clips` of float32 pixels in [-1, 1], where 0 is the grey that no uint8 has."""
    return hunyuan_vae.encode(vae, frames_to_pixels(pixels)).cpu()
