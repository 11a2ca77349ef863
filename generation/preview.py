"""Small pictures straight from latents, without the VAE: a linear map from latent channels to colours.

The map is fitted to the request's own input images, whose latents and pixels are both known.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.files import atomic_file
from generation.outputs import write_png

logger = logging.getLogger(__name__)

FRAMES_PER_ROW = 10
RIDGE = 0.01
MINIMUM_SIDE = 128
"""Pixels; smaller frames are enlarged by a whole number."""


@dataclass(frozen=True)
class Preview:
    """The fitted map."""

    weights: Tensor
    """(C, 3) float64"""
    offset: Tensor
    """(3,) float64"""

    @classmethod
    def fit(cls, pictures: Sequence[tuple[Tensor, np.ndarray]]) -> Preview | None:
        """Ridge regression over all latent pixels of all pictures: latents (C, h, w) to RGB (h, w, 3) in [0, 1].

        None without pictures.
        """
        if not pictures:
            logger.warning("--preview: no input image to learn colours from; no preview is saved")
            return None
        latents = torch.cat([_rows(latents) for latents, _ in pictures])
        colours = torch.cat([torch.from_numpy(rgb).double().flatten(0, 1) for _, rgb in pictures])
        centre, mean_colour = latents.mean(dim=0), colours.mean(dim=0)
        centred = latents - centre
        covariance = centred.T @ centred / len(centred)
        # Generated latents leave the range of the inputs; the ridge keeps channels that hardly vary there quiet.
        ridge = RIDGE * covariance.diagonal().mean().clamp(min=1e-12) * torch.eye(len(covariance)).double()
        weights = torch.linalg.solve(covariance + ridge, centred.T @ (colours - mean_colour) / len(centred))
        return cls(weights, mean_colour - centre @ weights)

    def frames(self, latents: Tensor) -> np.ndarray:
        """(C, F, h, w) → (F, h, w, 3) uint8."""
        frames = [_rows(frame) @ self.weights + self.offset for frame in latents.unbind(dim=1)]
        levels = torch.stack(frames).clamp(0, 1).unflatten(1, latents.shape[2:])
        return (levels * 255).to(torch.uint8).numpy()

    def save(self, latents: Tensor, folder: Path, stem: str, *, settings: str | None = None) -> Path:
        """Writes all frames, in rows, as `{stem}_preview.png` over the one of the section before."""
        frames = self.frames(latents)
        height, width = frames.shape[1:3]
        scale = max(1, -(-MINIMUM_SIDE // min(height, width)))
        columns = min(len(frames), FRAMES_PER_ROW)
        sheet = Image.new("RGB", (columns * width * scale, -(-len(frames) // columns) * height * scale))
        for i, frame in enumerate(frames):
            picture = Image.fromarray(frame).resize((width * scale, height * scale), Image.Resampling.BICUBIC)
            sheet.paste(picture, (i % columns * width * scale, i // columns * height * scale))
        path = folder / f"{stem}_preview.png"
        with atomic_file(path) as temporary:
            write_png(temporary, sheet, settings)
        return path


def _rows(latents: Tensor) -> Tensor:
    """(C, h, w) → (h·w, C) float64"""
    return latents.detach().cpu().double().flatten(1).T
