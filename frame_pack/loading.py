"""FramePack's models: which files they are, and the transformer from its file."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch

from common.checkpoint_kinds import FRAMEPACK_TRANSFORMER, expect_kind
from common.weights import (
    Checkpoint,
    check_names_and_shapes,
    empty_model,
    load_weights,
    open_checkpoint,
    without_prefix,
)
from frame_pack.config import FramePackConfig
from frame_pack.image_encoder import build_siglip, open_siglip
from frame_pack.model import FramePackTransformer
from hunyuan_model.text_encoders import build_clip, build_llama, find_tokenizer, open_clip, open_llama
from hunyuan_model.vae import build_vae, open_vae
from networks.lora_merge import LoraMerge
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
    """Finds all five and the tokenizers, and checks everything that headers tell.

    Raises:
        UserError: one is not given, missing, damaged, incomplete, or another model than its flag says.
    """
    for name in ("dit", "vae", "text_encoder1", "text_encoder2", "image_encoder"):
        if getattr(flags, name) is None:
            raise UserError(f"--{name}", "nothing", "a checkpoint file or folder", f"give --{name}")
    memmap = not flags.disable_numpy_memmap
    checkpoints = FramePackCheckpoints(
        transformer=open_transformer(flags.dit, memmap=memmap),
        vae=open_vae(flags.vae, memmap=memmap),
        llama=open_llama(flags.text_encoder1, memmap=memmap),
        clip=open_clip(flags.text_encoder2, memmap=memmap),
        siglip=open_siglip(flags.image_encoder, memmap=memmap),
    )
    find_tokenizer("llama", given=flags.tokenizer1, checkpoint=checkpoints.llama)
    find_tokenizer("clip", given=flags.tokenizer2, checkpoint=checkpoints.clip)
    _check_tensors(checkpoints)
    _check_widths(checkpoints)
    return checkpoints


def _check_tensors(checkpoints: FramePackCheckpoints) -> None:
    """Builds every model without weights, so that a wrong tensor in the last file is noticed before the first loads."""
    check_names_and_shapes(build_transformer(checkpoints.transformer), checkpoints.transformer)
    check_names_and_shapes(build_vae(checkpoints.vae), checkpoints.vae)
    check_names_and_shapes(build_llama(checkpoints.llama), checkpoints.llama)
    check_names_and_shapes(build_clip(checkpoints.clip), checkpoints.clip)
    check_names_and_shapes(build_siglip(checkpoints.siglip), checkpoints.siglip)


def _check_widths(checkpoints: FramePackCheckpoints) -> None:
    """Raises UserError when an encoder is not of the kind that the transformer was trained with."""
    config = FramePackConfig.from_checkpoint(checkpoints.transformer)
    widths = (
        (checkpoints.llama, "embed_tokens.weight", 2, 1, config.text_width),
        (checkpoints.clip, "embeddings.token_embedding.weight", 2, 1, config.pooled_width),
        (checkpoints.siglip, "embeddings.patch_embedding.weight", 4, 0, config.image_width),
        (checkpoints.vae, "post_quant_conv.weight", 5, 0, config.latent_channels),
    )
    for checkpoint, name, num_dims, axis, wanted in widths:
        width = checkpoint.shape(name, num_dims)[axis]
        if width != wanted:
            expected = f"width {wanted}, as {checkpoints.transformer.flag} was trained with"
            raise UserError(checkpoint.flag, f"{checkpoint.path}, width {width}", expected, "give its own encoders")


def open_transformer(path: str, *, flag: str = "--dit", memmap: bool = True) -> Checkpoint:
    """A FramePack or FramePack-F1 transformer: one file, a set of shards, or a snapshot folder."""
    checkpoint = open_checkpoint(path, flag=flag, memmap=memmap)
    expect_kind(checkpoint, FRAMEPACK_TRANSFORMER)
    return without_prefix(checkpoint, "x_embedder.proj.weight")


def build_transformer(checkpoint: Checkpoint) -> FramePackTransformer:
    """The transformer without its weights, with the sizes in the header."""
    return empty_model(checkpoint, partial(FramePackTransformer, FramePackConfig.from_checkpoint(checkpoint)))


def load_transformer(
    checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device | str, merge: LoraMerge | None = None
) -> FramePackTransformer:
    """Builds the transformer and fills it strictly, merging LoRAs on the way."""
    transformer = build_transformer(checkpoint)
    if merge is None:
        load_weights(transformer, checkpoint, dtype=dtype, device=device)
        return transformer
    with merge.reading(device) as change:
        load_weights(transformer, checkpoint, dtype=dtype, device=device, change=change)
    return transformer
