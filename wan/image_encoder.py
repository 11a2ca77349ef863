"""CLIP ViT-H/14, which shows Wan its start image, through transformers.

The features are what comes out of the last block but one, so that the last one and the norm behind it are not loaded.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.checkpoint_kinds import WAN_CLIP, expect_kind
from common.weights import Checkpoint, TensorInfo, check_names_and_shapes, empty_model, load_weights, open_checkpoint

if TYPE_CHECKING:
    from transformers import CLIPVisionModel

HEAD_DIM = 80
PUBLISHED = {"hidden_act": "gelu", "layer_norm_eps": 1e-5}
PIXEL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXEL_STD = (0.26862954, 0.26130258, 0.27577711)

PARTS = {
    "patch_embedding.weight": "embeddings.patch_embedding.weight",
    **{f"pre_norm.{leaf}": f"pre_layrnorm.{leaf}" for leaf in ("weight", "bias")},
    **{f"post_norm.{leaf}": f"post_layernorm.{leaf}" for leaf in ("weight", "bias")},
}
LAYERS = {
    "norm1": "layer_norm1",
    "attn.proj": "self_attn.out_proj",
    "norm2": "layer_norm2",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}
"""Parts of a block by their official names and by transformers'."""
BLOCK = re.compile(r"transformer\.(?P<index>\d+)\.(?P<layer>.+)\.(?P<leaf>weight|bias)")
UNUSED = ("head", "visual_projection.weight", "embeddings.position_ids")
"""Projections of the joint model, and the position numbers that an old transformers wrote."""


def open_clip(path: str | Path, *, flag: str = "--clip", memmap: bool = True) -> Checkpoint:
    """Reads the header of a CLIP image encoder: the official `.pth`, a file in its or in transformers' layout, or a
    snapshot folder with `image_encoder/`.

    Returns:
        With the names and shapes of transformers' model.

    Raises:
        UserError: nothing there, a damaged file, or not a CLIP image encoder.
    """
    checkpoint = open_checkpoint(path, flag=flag, subfolder="image_encoder", memmap=memmap)
    expect_kind(checkpoint, WAN_CLIP)
    if any(name.startswith("visual.") for name in checkpoint.tensors):  # beside it is the text model
        checkpoint = checkpoint.rename(lambda name: name[7:] if name.startswith("visual.") else None)
    tensors = (pair for name, info in checkpoint.tensors.items() for pair in _in_transformers(name, info))
    return replace(checkpoint, tensors=dict(tensors))


def _in_transformers(name: str, info: TensorInfo) -> Iterator[tuple[str, TensorInfo]]:
    """Under which names, and cut how, transformers has a tensor of any of the layouts."""
    name = name.removeprefix("vision_model.")
    block = BLOCK.fullmatch(name)
    if block and block["layer"] == "attn.to_qkv":
        place = f"encoder.layers.{block['index']}.self_attn"
        num_rows = info.shape[0] // 3 if info.shape else 0
        for i, letter in enumerate("qkv"):
            part = replace(info, shape=(num_rows, *info.shape[1:]), rows=(i * num_rows, (i + 1) * num_rows))
            yield f"{place}.{letter}_proj.{block['leaf']}", part
    elif block:
        layer = LAYERS.get(block["layer"], block["layer"])
        yield f"encoder.layers.{block['index']}.{layer}.{block['leaf']}", info
    elif name == "cls_embedding":
        yield "embeddings.class_embedding", _squeezed(info)
    elif name == "pos_embedding":
        yield "embeddings.position_embedding.weight", _squeezed(info)
    elif name not in UNUSED:
        yield PARTS.get(name, name), info


def _squeezed(info: TensorInfo) -> TensorInfo:
    return replace(info, shape=tuple(size for size in info.shape if size != 1))


def load_clip(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device | str) -> CLIPVisionModel:
    """Builds the image encoder and loads it strictly, all blocks but the last.

    Its last hidden state is the whole model's `hidden_states[-2]`.

    Raises:
        UserError: a tensor is missing, unexpected or of another shape, also in what is left out.
    """
    model = build_clip(checkpoint)
    check_names_and_shapes(model, checkpoint)
    model.encoder.layers = model.encoder.layers[:-1]
    model.config.num_hidden_layers = len(model.encoder.layers)
    model.post_layernorm = nn.Identity()
    used = model.state_dict().keys()
    part = checkpoint.rename(lambda name: name if name in used else None)
    load_weights(model, part, dtype=dtype, device=device)
    return model


def build_clip(checkpoint: Checkpoint) -> CLIPVisionModel:
    """The image encoder without its weights, all blocks, for comparison with the header."""
    return empty_model(checkpoint, partial(_build, checkpoint))


def _build(checkpoint: Checkpoint) -> CLIPVisionModel:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = checkpoint.config if checkpoint.config.get("model_type") == "clip_vision_model" else {}
    hidden_size, num_channels, patch_size, _ = checkpoint.shape("embeddings.patch_embedding.weight", 4)
    if hidden_size % HEAD_DIM and "num_attention_heads" not in config:
        raise ValueError(f"{HEAD_DIM}, the width of a head, does not divide {hidden_size}")
    num_patches = checkpoint.shape("embeddings.position_embedding.weight", 2)[0] - 1
    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=hidden_size,
            num_channels=num_channels,
            patch_size=patch_size,
            image_size=math.isqrt(max(num_patches, 0)) * patch_size,
            num_hidden_layers=checkpoint.count("encoder.layers.{}.self_attn.q_proj.weight"),
            num_attention_heads=config.get("num_attention_heads", hidden_size // HEAD_DIM),
            intermediate_size=checkpoint.shape("encoder.layers.0.mlp.fc1.weight", 2)[0],
            **{key: config.get(key, published) for key, published in PUBLISHED.items()},
        )
    )


@torch.no_grad()
def encode_pictures(model: CLIPVisionModel, pictures: Sequence[np.ndarray]) -> Tensor:
    """CLIP's features (B, 257, width) of pictures (H, W, 3) uint8 of any sizes, each squeezed to 224 x 224.

    Args:
        model: from `load_clip`.

    Returns:
        float32 on the model's device.
    """
    pixels = torch.cat([_prepared(picture, model.config.image_size, model.device) for picture in pictures])
    return model(pixel_values=pixels.to(model.dtype)).last_hidden_state.float()


def _prepared(picture: np.ndarray, size: int, device: torch.device) -> Tensor:
    """A picture as CLIP wants it, (1, 3, size, size) float32: bicubic without antialiasing, as the official code."""
    whole = torch.from_numpy(picture.copy()).to(device)  # pictures may be flipped views, or read-only
    pixels = whole.permute(2, 0, 1).unsqueeze(0).float() / 127.5 - 1
    pixels = F.interpolate(pixels, size=(size, size), mode="bicubic", align_corners=False)
    mean, deviation = (torch.tensor(values, device=device).view(3, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    return (pixels * 0.5 + 0.5 - mean) / deviation
