"""Pictures and masks as tensors at a VAE's door. Legend: B batch, F frames, H W picture size, h w latent size."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from common.media import mask_to_latent
from options.geometry import VAE_STRIDE


def frames_to_pixels(frames: np.ndarray) -> Tensor:
    """(B, F, H, W, 3) in any type -> (B, 3, F, H, W), without a copy."""
    return torch.from_numpy(frames).permute(0, 4, 1, 2, 3)


def latent_mask(mask: np.ndarray | None) -> Tensor | None:
    """A mask or alpha channel (H, W) uint8 -> (h, w) in [0, 1], 1 keeps; None stays None."""
    if mask is None:
        return None
    height, width = mask.shape
    return torch.from_numpy(mask_to_latent(mask, width // VAE_STRIDE, height // VAE_STRIDE))
