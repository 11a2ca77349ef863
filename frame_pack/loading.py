"""FramePack's models: which files they are, and the transformer from its file."""

from __future__ import annotations

import re
from dataclasses import dataclass

from common.checkpoint_kinds import FRAMEPACK_TRANSFORMER, expect_kind
from common.weights import Checkpoint, check_names_and_shapes, open_checkpoint, without_prefix
from frame_pack.config import FramePackConfig
from frame_pack.image_encoder import build_siglip, open_siglip
from frame_pack.model import FramePackTransformer
from hunyuan_model.text_encoders import build_clip, build_llama, find_tokenizer, open_clip, open_llama
from hunyuan_model.vae import build_vae, open_vae
from modules.fp8_weights import common_names
from networks.transformer_loading import TransformerLoader
from options.errors import UserError
from options.flags_fpack_generate import FramePackModelFlags
from options.fp8 import Fp8Mode

FP8_LAYERS = re.compile(r"(single_)?transformer_blocks\.\d+\.(?!.*norm).+")
"""Those that fp8 is for. Modulations are computed once for all tokens, and an error in them reaches every one."""


@dataclass(frozen=True, kw_only=True)
class FramePackCheckpoints:
    """The five models' headers; no weight has been read."""

    transformer: Checkpoint
    vae: Checkpoint
    llama: Checkpoint
    clip: Checkpoint
    siglip: Checkpoint


def open_models(flags: FramePackModelFlags, *, fp8: Fp8Mode = "off") -> FramePackCheckpoints:
    """Finds all five and the tokenizers, and checks everything that headers tell.

    Args:
        fp8: how the transformer is going to be loaded.

    Raises:
        UserError: one is not given, missing, damaged, incomplete, or another model than its flag says; or the
            transformer cannot be loaded so.
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
    build_transformer(checkpoints.transformer, fp8=fp8)
    _check_tensors(checkpoints)
    _check_widths(checkpoints)
    return checkpoints


def _check_tensors(checkpoints: FramePackCheckpoints) -> None:
    """Builds the others without weights, so that a wrong tensor in the last file is noticed before the first loads."""
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
    """A FramePack or FramePack-F1 transformer, in 16 bits or fp8: one file, a set of shards, or a snapshot folder."""
    checkpoint = open_checkpoint(path, flag=flag, memmap=memmap)
    expect_kind(checkpoint, FRAMEPACK_TRANSFORMER)
    return common_names(without_prefix(checkpoint, "x_embedder.proj.weight"))


LOADER = TransformerLoader(config=FramePackConfig.from_checkpoint, model=FramePackTransformer, fp8_layers=FP8_LAYERS)
build_transformer, load_transformer, save_fp8_transformer = LOADER.build, LOADER.load, LOADER.save_fp8
