"""Linear layers whose frozen weights are kept in 8 bits, and what that does to a weight.

A weight (out, in) is stored as float8_e4m3fn codes and scales: weight = code · scale, one scale for 64 neighbours of a
row. Without scales the codes are the weight. Layers make it whole again each time they compute, so that everything
else (LoRA, attention, gradients) never sees 8 bits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

E4M3 = torch.float8_e4m3fn
MAX_CODE = torch.finfo(E4M3).max
BLOCK = 64
"""Inputs that share a scale."""
MIN_SCALE = 1e-8
"""A block of zeros needs one, too."""


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Of the scales of a new weight (out, in): (out, in / 64, 1), or (out, 1) where 64 does not divide the inputs."""
    rows, columns = shape
    return (rows, columns // BLOCK, 1) if columns % BLOCK == 0 else (rows, 1)


def scale_type(stored: torch.dtype) -> torch.dtype:
    """Of the scales of a weight that was stored so.

    bfloat16 is what other programs write beside bfloat16 weights; float16 cannot hold the small ones.
    """
    return torch.bfloat16 if stored == torch.bfloat16 else torch.float32


def quantised(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (out, in) and float32 scales for a weight; the largest number of a block becomes the largest code.

    Source: musubi-tuner's block-wise fp8 format.

    Raises:
        ValueError: some number in it is not finite.
    """
    rows, columns = weight.shape
    groups = weight.float().reshape(rows, -1, BLOCK if columns % BLOCK == 0 else columns)
    scale = (groups.abs().amax(dim=-1, keepdim=True) / MAX_CODE).clamp(min=MIN_SCALE)
    if not bool(scale.isfinite().all()):
        raise ValueError("weights that are not finite")
    codes = (groups / scale).clamp_(-MAX_CODE, MAX_CODE).to(E4M3)
    return codes.reshape(rows, columns), scale.reshape(scale_shape((rows, columns)))


def cast(weight: Tensor) -> Tensor:
    """A weight as codes without scales. What is beyond the largest code becomes that one.

    Raises:
        ValueError: some number in it is not finite.
    """
    if not bool(weight.isfinite().all()):
        raise ValueError("weights that are not finite")
    # Older versions of torch cast what is beyond to NaN.
    return weight.clamp(-MAX_CODE, MAX_CODE).to(E4M3)


def dequantised(codes: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight in `dtype`. The product is made in the type of the scales, as other programs do.

    Args:
        scale: one for all, (out,) or (out, 1), or (out, blocks, 1); None where the codes are the weight.
    """
    if scale is None:
        return codes.to(dtype)
    weight = codes.to(scale.dtype, copy=True)
    if scale.numel() == 1:
        weight *= scale.reshape(())
    else:
        weight.view(len(weight), scale[0].numel(), -1).mul_(scale.reshape(len(weight), -1, 1))
    return weight.to(dtype)


class _Product(torch.autograd.Function):
    """x · weightᵀ + bias that keeps the codes for the backward pass, and never the weight that they stand for."""

    @staticmethod
    def forward(x: Tensor, codes: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        return F.linear(x, dequantised(codes, scale, x.dtype), bias)

    @staticmethod
    def setup_context(ctx, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
        _, codes, scale, _ = inputs
        ctx.save_for_backward(codes, scale)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        codes, scale = ctx.saved_tensors
        return gradient @ dequantised(codes, scale, gradient.dtype), None, None, None


class Fp8Linear(nn.Linear):
    """A frozen linear layer whose weight is codes, and which computes in its input's type. `become_fp8` makes one.

    Its state dict has `scale_weight` beside `weight` where there are scales.
    """

    scale_weight: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self.weight, self.scale_weight, self.bias)


def become_fp8(
    layer: nn.Linear,
    *,
    codes: torch.dtype = E4M3,
    scale: tuple[tuple[int, ...], torch.dtype] | None = None,
) -> None:
    """Makes `layer`, which has no weights yet, an `Fp8Linear` that waits for its tensors.

    Args:
        codes: another 8-bit type for files that were made with it.
        scale: shape and type of the scales; None for none.
    """
    layer.__class__ = Fp8Linear
    layer.weight = nn.Parameter(torch.empty_like(layer.weight, dtype=codes, device="meta"), requires_grad=False)
    empty = None if scale is None else torch.empty(scale[0], dtype=scale[1], device="meta")
    layer.register_buffer("scale_weight", empty)
