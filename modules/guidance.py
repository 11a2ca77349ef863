"""Classifier-free guidance."""

from torch import Tensor


def guided(positive: Tensor, negative: Tensor, scale: float, rescale: float = 0.0) -> Tensor:
    """negative + scale·(positive - negative), optionally pulled back to the positive's contrast.

    Args:
        rescale: phi in [0, 1]; 0 leaves the result, 1 gives it the standard deviation of `positive` per sample.

    Source: Ho & Salimans 2022; Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed", 2023.
    """
    result = negative + scale * (positive - negative)
    if rescale == 0:
        return result
    axes = tuple(range(1, result.ndim))
    ratio = positive.std(dim=axes, keepdim=True) / result.std(dim=axes, keepdim=True)
    return rescale * (result * ratio) + (1 - rescale) * result
