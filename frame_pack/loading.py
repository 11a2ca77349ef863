"""FramePack's models: which files they are, and the transformer from its file."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from common.checkpoint_kinds import expect_kind
from common.weights import Checkpoint, load_weights, open_checkpoint
from frame_pack.image_encoder import open_siglip
from frame_pack.model import FramePackConfig, FramePackTransformer
from hunyuan_model.text_encoders import open_clip, open_llama
from hunyuan_model.vae import open_vae
from options.errors import UserError
from options.flags_fpack_generate import FramePackModelFlags


@dataclass(frozen=True, kw_only=True)
class FramePackCheckpoints:
    """The five models' headers; no weight has been read."""

    transformer: Checkpoint
    vae: Checkpoint
    llama: Checkpoint
    clip: Checkpoint
    siglip: Checkpoint


def open_models(flags: FramePackModelFlags) -> FramePackCheckpoints:
    """Finds all five and looks at their headers.

    Raises:
        UserError: one is not given, missing, damaged, or another model than its flag says.
    """
    for name in ("dit", "vae", "text_encoder1", "text_encoder2", "image_encoder"):
        if getattr(flags, name) is None:
            raise UserError(f"--{name}", "nothing", "a checkpoint file or folder", f"give --{name}")
    memmap = not flags.disable_numpy_memmap
    return FramePackCheckpoints(
        transformer=open_transformer(flags.dit, memmap=memmap),
        vae=open_vae(flags.vae, memmap=memmap),
        llama=open_llama(flags.text_encoder1, memmap=memmap),
        clip=open_clip(flags.text_encoder2, memmap=memmap),
        siglip=open_siglip(flags.image_encoder, memmap=memmap),
    )


def open_transformer(path: str, *, flag: str = "--dit", memmap: bool = True) -> Checkpoint:
    """A FramePack or FramePack-F1 transformer: one file, a set of shards, or a snapshot folder."""
    checkpoint = open_checkpoint(path, flag=flag, memmap=memmap)
    expect_kind(checkpoint, "FramePack transformer")
    return checkpoint


def load_transformer(
    checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device | str
) -> FramePackTransformer:
    """Builds the transformer from the sizes in the header and fills it strictly."""
    config = FramePackConfig.from_checkpoint(checkpoint.shapes, checkpoint.config)
    with torch.device("meta"):
        transformer = FramePackTransformer(config).eval()
    load_weights(transformer, checkpoint, dtype=dtype, device=device)
    return transformer
