"""SigLIP so400m (patch 14, 384 pixels), which shows FramePack the start image; through transformers."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from common.checkpoint_kinds import SIGLIP, expect_kind
from common.weights import Checkpoint, empty_model, load_weights, open_checkpoint

if TYPE_CHECKING:
    import numpy as np
    from transformers import SiglipVisionModel

HEAD_DIM = 72
IMAGE_SIZE = 384
"""27 x 27 patches of 14 pixels; the 6 pixels left over are not seen."""


def open_siglip(path: str | Path, *, flag: str = "--image_encoder", memmap: bool = True) -> Checkpoint:
    """Reads the header of a SigLIP image encoder: a file, or a snapshot folder with `image_encoder/`.

    Raises:
        UserError: nothing there, a damaged file, or not a SigLIP image encoder.
    """
    checkpoint = open_checkpoint(path, flag=flag, subfolder="image_encoder", memmap=memmap)
    expect_kind(checkpoint, SIGLIP)
    return checkpoint.rename(_own_name)


def _own_name(name: str) -> str | None:
    """The name in transformers 5, which has no prefix and does not store the position numbers."""
    name = name.removeprefix("vision_model.")
    return None if name == "embeddings.position_ids" else name


def load_siglip(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device | str) -> SiglipVisionModel:
    """Builds SigLIP, with its pooling head when the file has one, and loads it strictly.

    Raises:
        UserError: a tensor is missing, unexpected or of another shape.
    """
    model = build_siglip(checkpoint)
    load_weights(model, checkpoint, dtype=dtype, device=device)
    return model


def build_siglip(checkpoint: Checkpoint) -> SiglipVisionModel:
    """SigLIP without its weights, for comparison with the header."""
    return empty_model(checkpoint, partial(_build, checkpoint))


def _build(checkpoint: Checkpoint) -> SiglipVisionModel:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = checkpoint.config if checkpoint.config.get("model_type") == "siglip_vision_model" else {}
    hidden_size, num_channels, patch_size, _ = checkpoint.shape("embeddings.patch_embedding.weight", 4)
    return SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=hidden_size,
            num_channels=num_channels,
            patch_size=patch_size,
            image_size=config.get("image_size", IMAGE_SIZE),
            num_hidden_layers=checkpoint.count("encoder.layers.{}.self_attn.q_proj.weight"),
            num_attention_heads=config.get("num_attention_heads", hidden_size // HEAD_DIM),
            intermediate_size=checkpoint.shape("encoder.layers.0.mlp.fc1.weight", 2)[0],
            hidden_act=config.get("hidden_act", "gelu_pytorch_tanh"),
            layer_norm_eps=config.get("layer_norm_eps", 1e-6),
            vision_use_head=any(name.startswith("head.") for name in checkpoint.tensors),
        )
    )


def encode_image(model: SiglipVisionModel, image: np.ndarray) -> Tensor:
    """`encode_images` of one image (H, W, 3): (729, 1152)."""
    return encode_images(model, [image])[0]


@torch.no_grad()
def encode_images(model: SiglipVisionModel, images: Sequence[np.ndarray]) -> Tensor:
    """The last hidden states (B, 729, 1152) of images (H, W, 3) uint8 of any sizes, each squeezed to 384 x 384.

    Returns:
        In the model's type on its device.
    """
    from transformers import SiglipImageProcessorPil

    size = model.config.image_size
    processor = SiglipImageProcessorPil(size={"height": size, "width": size})
    pixels = processor(images=list(images), input_data_format="channels_last", return_tensors="pt")["pixel_values"]
    return model(pixel_values=pixels.to(model.device, model.dtype)).last_hidden_state
