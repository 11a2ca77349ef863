"""Masks that say where the loss of an image counts: what is cached of them, and what they have to be."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.media import load_mask
from dataset.items import MediaItem
from options.errors import UserError
from options.geometry import VAE_STRIDE

if TYPE_CHECKING:
    from torch import Tensor

LOSS_MASK = "latents_loss_mask"
"""The content of a latent cache: (1, F, h, w) in [0, 1]; 1 where the loss counts in full."""
WHITE = 255

Size = tuple[int, int]


def latent_loss_mask(mask: np.ndarray) -> np.ndarray:
    """(H, W) uint8, white where the loss counts -> (1, 1, h, w) float16: the mean over each latent pixel's square.

    Not LANCZOS, as of the masks that hide parts of controls: weights must neither overshoot nor shift.
    """
    height, width = (side // VAE_STRIDE for side in mask.shape)
    means = mask.reshape(height, VAE_STRIDE, width, VAE_STRIDE).mean(axis=(1, 3), dtype=np.float32)
    return (means / WHITE).astype(np.float16)[None, None]


def mask_tensors(mask: np.ndarray | None) -> dict[str, Tensor]:
    """What a latent cache of one picture holds of its mask (H, W): content -> (1, 1, h, w); nothing without a mask."""
    import torch

    return {} if mask is None else {LOSS_MASK: torch.from_numpy(latent_loss_mask(mask))}


def load_loss_mask(item: MediaItem, size: Size) -> np.ndarray | None:
    """(H, W) uint8 of an item, resized and cropped as its image: white without a mask; None if nothing has a mask.

    Args:
        size: (width, height) of the bucket.

    Raises:
        UserError: it cannot be read, or lets nothing count.
    """
    width, height = size
    if not item.is_masked:
        return None
    if item.mask_path is None:
        return np.full((height, width), WHITE, np.uint8)
    mask = load_mask(item.mask_path, width=width, height=height, flag=str(item.mask_path))
    if not mask.any():
        got = f"the mask {item.mask_path}, black all over the part of the image that is used"
        raise UserError(str(item.mask_path), got, "white where the loss counts", "correct it or take it out")
    return mask


def check_mask_size(path: Path, size: Size, image_size: Size) -> None:
    """Raises UserError for a mask with other proportions than its image: it would be cropped to another part of it.

    Args:
        size: (width, height) of the mask.
    """
    (width, height), (image_width, image_height) = size, image_size
    # A copy in another size is off by less than a pixel on each side.
    if abs(width * image_height - height * image_width) > max(*size, *image_size):
        got, expected = f"the mask {path} of {width}x{height}", f"the proportions of the image, {image_width}x"
        raise UserError(str(path), got, f"{expected}{image_height}", "make it from the image, upright as the image is")
