"""Latents to frames. A video goes section by section with a cross-fade, because the VAE knows only the past.

Neighbouring sections are decoded from overlapping windows of latents; the frames that two windows share are blended.
Windows are decoded from the last to the first, so that each earlier one fades into what follows it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from generation.outputs import to_uint8
from generation.pipeline import Frames
from hunyuan_model import vae as hunyuan_vae

Decode = Callable[[Tensor], Tensor]
"""Latents (C, F, h, w) → pixels (3, 4·(F - 1) + 1, H, W) in [-1, 1]."""


def decode_latents(vae: torch.nn.Module, latents: Tensor, *, window: int, bulk: bool = False) -> Frames:
    """Latents (C, F, h, w) → (frames, H, W, 3) uint8; one latent frame is one picture, more are a video."""

    def decode(part: Tensor) -> Tensor:
        return hunyuan_vae.decode(vae, part[None])[0]

    if latents.shape[1] == 1:
        return decode_frames(decode, latents)
    if bulk:
        return to_uint8(decode(latents).cpu())
    return decode_sections(decode, latents, window)


def decode_windows(num_latents: int, window: int) -> list[tuple[int, int]]:
    """(start, end) of the latents that are decoded together, in time order.

    The first window holds the start frame and two sections, the others two sections, each one section further. A rest
    of less than a section (latents from elsewhere) is within the window before it and gets none of its own.
    """
    if window < 1:
        raise ValueError(f"a window of {window} latent frames")
    windows, start, length = [], 0, 2 * window + 1
    while start == 0 or num_latents - start >= window:
        windows.append((start, min(start + length, num_latents)))
        start += length - window
        length = 2 * window
    return windows


def decode_sections(decode: Decode, latents: Tensor, window: int) -> Frames:
    """(C, F, h, w) → (4·(F - 1) + 1, H, W, 3) uint8. Only frames that will still be blended are held as floats."""
    overlap = 4 * window - 3
    head: Tensor | None = None
    finished: list[np.ndarray] = []
    for start, end in reversed(decode_windows(latents.shape[1], window)):
        pixels = decode(latents[:, start:end]).cpu()
        if head is not None:
            pixels = torch.cat([pixels[:, :-overlap], _cross_fade(pixels[:, -overlap:], head)], dim=1)
        head, tail = pixels[:, :overlap], pixels[:, overlap:]
        finished.append(to_uint8(tail))
    return np.concatenate([to_uint8(head), *reversed(finished)])


def decode_frames(decode: Decode, latents: Tensor) -> Frames:
    """(C, F, h, w) → (F, H, W, 3) uint8, every latent frame as a picture of its own."""
    return np.concatenate([to_uint8(decode(latents[:, [i]]).cpu()) for i in range(latents.shape[1])])


def _cross_fade(earlier: Tensor, later: Tensor) -> Tensor:
    """From all `earlier` in the first frame to all `later` in the last."""
    weight = torch.linspace(1, 0, earlier.shape[1])[None, :, None, None]
    return weight * earlier + (1 - weight) * later
