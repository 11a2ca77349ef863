"""Pixels to latents, the same for generation and for caches: what Wan's VAE encodes in one piece, and what alone.

Shapes: B batch, F pixel frames, H W pixel size, C latent channels, F' latent frames, h w latent size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from common.media import to_model_range
from common.pictures import frames_to_pixels
from wan import vae as wan_vae

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan


def encode_pictures(vae: AutoencoderKLWan, pictures: Sequence[np.ndarray]) -> Tensor:
    """(H, W, 3) uint8 pictures of one size → latents (B, C, 1, h, w) float32 on the CPU, each as a clip of its own."""
    return encode_clips(vae, np.stack(pictures)[:, None])


def encode_clips(vae: AutoencoderKLWan, clips: np.ndarray) -> Tensor:
    """(B, F, H, W, 3) uint8, F = 4n + 1 → latents (B, C, F', h, w) float32 on the CPU, by one VAE call."""
    return encode_pixels(vae, to_model_range(clips))


def encode_pixels(vae: AutoencoderKLWan, pixels: np.ndarray) -> Tensor:
    """`encode_clips` of float32 pixels in [-1, 1], where 0 is the grey that no uint8 has."""
    return wan_vae.encode(vae, frames_to_pixels(pixels)).cpu()


def encode_grey(vae: AutoencoderKLWan, height: int, width: int) -> Tensor:
    """The latent (1, C, 1, h, w) of a grey picture, which stands in one-frame mode where the picture is to be made."""
    return encode_pixels(vae, np.zeros((1, 1, height, width, 3), dtype=np.float32))


def start_clip(image: np.ndarray, num_frames: int, end: np.ndarray | None = None) -> np.ndarray:
    """What is encoded to show a model its first frame, and with `end` (flf2v) its last one: grey between them.

    Args:
        image: (H, W, 3) uint8, and so is `end`.
        num_frames: pixel frames, 4n + 1; with `end` at least 5.

    Returns:
        (F, H, W, 3) float32 in [-1, 1].
    """
    clip = np.zeros((num_frames, *image.shape), dtype=np.float32)
    clip[0] = to_model_range(image)
    if end is not None:
        clip[-1] = to_model_range(end)
    return clip
