"""diffusers' FramePack at a size for tests of LoRA files."""

from __future__ import annotations

import torch
from diffusers import HunyuanVideoFramepackTransformer3DModel
from torch import nn


def build_small() -> HunyuanVideoFramepackTransformer3DModel:
    """Two heads of 16 channels, and the same weights every time."""
    torch.manual_seed(1)
    return HunyuanVideoFramepackTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        has_image_proj=True,
        has_clean_x_embedder=True,
        rope_axes_dim=(4, 6, 6),
        text_embed_dim=24,
        pooled_projection_dim=20,
        image_proj_dim=28,
    ).eval()


def small_shapes() -> dict[str, tuple[int, ...]]:
    """Dotted module name -> shape of its weight, for all linear layers and convolutions."""
    with torch.device("meta"):
        modules = build_small().named_modules()
    return {name: tuple(m.weight.shape) for name, m in modules if isinstance(m, nn.Linear | nn.Conv3d)}
