"""The pictures and labels that previews of every model are made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from dataset.jobs import Sample
from dataset.loss_masks import latent_loss_mask
from options.geometry import VAE_STRIDE

if TYPE_CHECKING:
    from torch import Tensor

Cell = tuple[str, Image.Image]

HIDDEN = np.array([24, 24, 72], dtype=np.float32)
"""Masked parts fade into this dark blue, so that they show in dark pictures too."""
HIDDEN_SHARE = 0.75


def target_cell(sample: Sample, place: str) -> Cell:
    """The image of a data set, with where its loss does not count."""
    target = sample.frames[0]
    if sample.job.item.mask_path is None:
        return f"target @ {place}", Image.fromarray(target)
    (left,) = latent_loss_mask(sample.loss_mask)[0]
    return f"target @ {place}, loss masked", dimmed(target, left.astype(np.float32))


def dimmed(rgb: np.ndarray, left: np.ndarray) -> Image.Image:
    """The picture (H, W, 3) where `left` (h, w) is 1, and dark where it is 0, in steps of latent pixels."""
    share = np.kron(left, np.ones((VAE_STRIDE, VAE_STRIDE), dtype=np.float32))[..., None]
    share = 1 - HIDDEN_SHARE * (1 - share)
    return Image.fromarray((rgb * share + HIDDEN * (1 - share)).round().astype(np.uint8))


def squeezed(rgb: np.ndarray, side: int) -> Image.Image:
    """The picture as an image encoder sees it: square, whatever it was."""
    return Image.fromarray(rgb).resize((side, side), Image.Resampling.BICUBIC)


def span(indices: Tensor) -> str:
    """`10-18`; for a single one `10`."""
    values = indices.tolist()
    return str(values[0]) if len(values) == 1 else f"{values[0]}-{values[-1]}"


def spread(first: int, last: int, count: int) -> Sequence[int]:
    """`count` integers from `first` to `last`; `first` alone for one."""
    return np.linspace(first, last, count).round().astype(int).tolist()
