"""FramePack's models: which files they are, and the transformer from its file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from common.checkpoint_kinds import FRAMEPACK_TRANSFORMER, expect_kind
from common.weights import (
    Checkpoint,
    check_names_and_shapes,
    empty_model,
    fill,
    open_checkpoint,
    without_prefix,
)
from frame_pack.config import FramePackConfig
from frame_pack.image_encoder import build_siglip, open_siglip
from frame_pack.model import FramePackTransformer
from hunyuan_model.text_encoders import build_clip, build_llama, find_tokenizer, open_clip, open_llama
from hunyuan_model.vae import build_vae, open_vae
from modules.block_swap import SwapOptions, attach, swapped_names
from modules.fp8_weights import Fp8Plan, check_mode, common_names, expect_codes, plan_fp8
from networks.lora_merge import LoraMerge, quantise_into_file
from options.errors import UserError
from options.flags_fpack_generate import FramePackModelFlags
from options.fp8 import Fp8Mode
from options.lora import LoraChoice

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


def build_transformer(
    checkpoint: Checkpoint, *, fp8: Fp8Mode = "off", merge: LoraMerge | None = None
) -> FramePackTransformer:
    """The transformer without its weights, with the sizes in the header and the layers that it is going to have.

    Raises:
        UserError: as `check_names_and_shapes`, or the file cannot be used with this `fp8`.
    """
    transformer, plan = _planned(checkpoint, fp8, merge)
    plan.apply_to(transformer)
    return transformer


def _planned(checkpoint: Checkpoint, fp8: Fp8Mode, merge: LoraMerge | None) -> tuple[FramePackTransformer, Fp8Plan]:
    transformer = empty_model(checkpoint, partial(FramePackTransformer, FramePackConfig.from_checkpoint(checkpoint)))
    expect_codes(transformer, checkpoint)
    check_names_and_shapes(transformer, checkpoint)
    check_mode(checkpoint, fp8, FP8_LAYERS)
    merged = merge.weights if merge else ()
    return transformer, plan_fp8(transformer, checkpoint, mode=fp8, layers=FP8_LAYERS, merged=merged)


def load_transformer(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    merge: LoraMerge | None = None,
    fp8: Fp8Mode = "off",
    swap: SwapOptions | None = None,
) -> FramePackTransformer:
    """Builds the transformer and fills it strictly. On the way LoRAs are merged and weights are quantised, one by one.

    Args:
        dtype: that it computes in; weights in fp8 keep theirs.
        fp8: what becomes of 16-bit weights; those that are in fp8 in the file stay so in any case.
        swap: which blocks' weights live in RAM and come to the device in turn.

    Raises:
        UserError: as `build_transformer`.
    """
    transformer, plan = _planned(checkpoint, fp8, merge)
    plan.apply_to(transformer)
    in_ram = swapped_names(transformer, swap) if swap else frozenset()
    with merge.reading(device) if merge else nullcontext(None) as change:
        tensors = plan.read(dtype=dtype, device=device, change=change)
        fill(transformer, checkpoint, tensors, lambda name: "cpu" if name in in_ram else device)
    if swap:
        attach(transformer, swap, torch.device(device))
    return transformer


def save_fp8_transformer(
    checkpoint: Checkpoint,
    choices: Sequence[LoraChoice],
    output: str | Path,
    *,
    mode: Fp8Mode,
    device: torch.device | str,
    flag: str,
) -> None:
    """Writes the transformer with its LoRAs in fp8, a file that loads as `--dit`; see `quantise_into_file`."""
    transformer, _ = _planned(checkpoint, "off", None)
    quantise_into_file(transformer, checkpoint, choices, output, mode=mode, layers=FP8_LAYERS, device=device, flag=flag)
