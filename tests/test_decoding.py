"""Windows of a video's latents and their cross-fade, against the rule written out directly."""

import numpy as np
import pytest
import torch

from frame_pack.decoding import decode_frames, decode_sections, decode_windows
from generation.outputs import to_uint8


def smooth_decode(latents: torch.Tensor) -> torch.Tensor:
    """A stand-in for a VAE that depends on its window: (C, F, h, w) → (3, 4·(F - 1) + 1, h, w)."""
    drift = latents.mean() * 0.3
    repeated = latents[:3].repeat_interleave(4, dim=1)[:, 3:]
    return (repeated + drift).clamp(-1, 1)


def reference(latents: torch.Tensor, window: int, num_sections: int) -> torch.Tensor:
    """The published rule: sections from last to first, two sections per window, soft append."""
    overlap, windows, start = 4 * window - 3, [], 0
    for k in range(num_sections):
        length = 2 * window + 1 if k == 0 else 2 * window
        windows.append(latents[:, start : start + length])
        start += window + 1 if k == 0 else window
    history = None
    for part in reversed(windows):
        current = smooth_decode(part)
        if history is None:
            history = current
            continue
        weights = torch.linspace(1, 0, overlap).view(1, -1, 1, 1)
        blended = weights * current[:, -overlap:] + (1 - weights) * history[:, :overlap]
        history = torch.cat([current[:, :-overlap], blended, history[:, overlap:]], dim=1)
    return history


def test_windows_of_four_sections_are_the_reference_ones():
    assert decode_windows(37, 9) == [(0, 19), (10, 28), (19, 37), (28, 37)]
    assert decode_windows(10, 9) == [(0, 10)]


@pytest.mark.parametrize(("num_sections", "window"), [(1, 9), (2, 9), (3, 4), (8, 9), (3, 1)])
def test_sections_are_cross_faded_as_published_and_none_is_lost(num_sections, window):
    """Eight sections must not decode to four."""
    num_latents = num_sections * window + 1
    latents = torch.rand(16, num_latents, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    frames = decode_sections(smooth_decode, latents, window)
    assert frames.shape == (4 * (num_latents - 1) + 1, 4, 4, 3)
    expected = to_uint8(reference(latents, window, num_sections))
    assert np.abs(frames.astype(int) - expected).max() <= 1  # truncation may fall on either side of an integer


def test_latents_that_are_no_whole_number_of_sections_decode_completely():
    latents = torch.zeros(16, 14, 4, 4)
    assert len(decode_sections(smooth_decode, latents, 9)) == 4 * 13 + 1


def test_single_frames_are_decoded_one_by_one():
    latents = torch.linspace(-1, 1, 2).view(1, 2, 1, 1).expand(16, 2, 4, 4)
    frames = decode_frames(lambda part: part[:3], latents)
    assert frames[:, 0, 0, 0].tolist() == [0, 255]
