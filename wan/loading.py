"""Wan2.1's transformer from its file."""

from __future__ import annotations

import re

from common.checkpoint_kinds import WAN_TRANSFORMER, expect_kind
from common.weights import Checkpoint, open_checkpoint, without_prefix
from modules.fp8_weights import common_names
from networks.transformer_loading import TransformerLoader
from networks.wan_names import IGNORED, WAN_NAMES
from options.errors import UserError
from options.wan_tasks import WAN21_ONLY
from wan.config import WanConfig
from wan.model import WanTransformer

FP8_LAYERS = re.compile(r"blocks\.\d+\.(?!.*norm).+")
"""Those that fp8 is for."""
FLOAT32 = re.compile(r"(blocks\.\d+|head)\.modulation|blocks\.\d+\.norm3\.(weight|bias)")
"""Small tensors whose rounding would reach every token."""
DIFFUSERS_MARK = "condition_embedder.time_proj.weight"
OFFICIAL = WAN_NAMES.from_diffusers
UNUSED = re.compile(re.escape(IGNORED).replace(r"\{\}", r"\d+") + r"\..+")

LOADER = TransformerLoader(
    config=WanConfig.from_checkpoint, model=WanTransformer, fp8_layers=FP8_LAYERS, float32=FLOAT32
)
build_transformer, load_transformer, save_fp8_transformer = LOADER.build, LOADER.load, LOADER.save_fp8


def open_transformer(path: str, *, flag: str = "--dit", memmap: bool = True) -> Checkpoint:
    """A transformer of Wan2.1 in the official layout, ComfyUI's or diffusers', in 16 bits or fp8, with official names.

    Args:
        path: one file, a set of shards, or a folder, which may be a snapshot with `transformer/` in it.

    Raises:
        UserError: it cannot be read, or is something else; Wan2.2's transformers are told where shapes tell them.
    """
    checkpoint = open_checkpoint(path, flag=flag, subfolder="transformer", memmap=memmap)
    expect_kind(checkpoint, WAN_TRANSFORMER)
    checkpoint = common_names(without_prefix(checkpoint, "patch_embedding.weight"))
    if DIFFUSERS_MARK in checkpoint.tensors:
        checkpoint = checkpoint.rename(_official_name)
    _expect_wan21(checkpoint)
    return checkpoint


def _official_name(name: str) -> str | None:
    if UNUSED.fullmatch(name):
        return None
    module, _, leaf = name.rpartition(".")
    whole = OFFICIAL(name)
    return whole if whole != name else f"{OFFICIAL(module)}.{leaf}" if module else name


def _expect_wan21(checkpoint: Checkpoint) -> None:
    """Raises UserError for Wan2.2's models for pictures, which take no CLIP features, and for its 5B model."""
    in_channels = checkpoint.shape("patch_embedding.weight", 5)[1]
    takes_image = "img_emb.proj.1.weight" in checkpoint.tensors
    if in_channels != 16 and not takes_image:
        got = f"{checkpoint.path}, a transformer of Wan2.2 ({in_channels} channels, and nothing for CLIP features)"
        raise UserError(checkpoint.flag, got, "a transformer of Wan2.1", WAN21_ONLY)
