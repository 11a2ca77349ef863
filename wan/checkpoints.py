"""Which files Wan's models are, found and checked before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from common.weights import Checkpoint, check_names_and_shapes
from options.errors import UserError
from options.flags_wan_generate import WanModelFlags
from options.fp8 import Fp8Mode
from options.wan_tasks import FLAG, WanTask, check_transformer
from wan.config import WanConfig
from wan.image_encoder import build_clip, open_clip
from wan.loading import build_transformer, open_transformer
from wan.text_encoder import build_t5, find_tokenizer, open_t5
from wan.vae import build_vae, open_vae

RELEASE = {
    "dit": ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model-00001-of-*.safetensors"),
    "vae": ("Wan2.1_VAE.pth",),
    "t5": ("models_t5_umt5-xxl-enc-bf16.pth",),
    "clip": ("models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",),
    "t5_tokenizer": ("google/umt5-xxl",),
}
"""What is in an official release, by flag."""


@dataclass(frozen=True, kw_only=True)
class WanCheckpoints:
    """The models' headers; no weight has been read."""

    transformer: Checkpoint
    vae: Checkpoint
    t5: Checkpoint
    clip: Checkpoint | None
    """None for tasks without a start image."""

    @property
    def all(self) -> list[Checkpoint]:
        return [found for found in vars(self).values() if found is not None]


def from_release(flags: WanModelFlags) -> WanModelFlags:
    """What is not given by itself, from `--ckpt_dir`.

    Raises:
        UserError: there is no such folder.
    """
    if flags.ckpt_dir is None:
        return flags
    folder = Path(flags.ckpt_dir)
    if not folder.is_dir():
        raise UserError("--ckpt_dir", folder, "the folder of an official release", "check the path")
    found = {name: _first(folder, patterns) for name, patterns in RELEASE.items() if getattr(flags, name) is None}
    return replace(flags, **{name: str(file) for name, file in found.items() if file is not None})


def _first(folder: Path, patterns: tuple[str, ...]) -> Path | None:
    return next((file for pattern in patterns for file in sorted(folder.glob(pattern))), None)


def open_task_transformer(flags: WanModelFlags, task: WanTask, *, fp8: Fp8Mode = "off") -> Checkpoint:
    """The transformer's header, checked.

    Raises:
        UserError: none is given, it is not a Wan2.1 transformer, not one for the task, or cannot be loaded with `fp8`.
    """
    checkpoint = open_transformer(_given(flags, "dit"), memmap=not flags.disable_numpy_memmap)
    config = WanConfig.from_checkpoint(checkpoint)
    check_transformer(task, config.kind, config.in_channels, where=f"{checkpoint.flag} {checkpoint.path}")
    build_transformer(checkpoint, fp8=fp8)
    return checkpoint


def open_models(flags: WanModelFlags, task: WanTask, *, fp8: Fp8Mode = "off") -> WanCheckpoints:
    """Finds all models and the tokenizer, and checks everything that headers tell.

    Args:
        flags: with what an official release has, see `from_release`.
        fp8: how the transformer is going to be loaded.

    Raises:
        UserError: one is not given, missing, damaged, incomplete, another model than its flag says, or not made for
            the task's transformer.
    """
    memmap = not flags.disable_numpy_memmap
    if task.takes_image and flags.clip is None:
        expected = f"the CLIP image encoder, which {FLAG} {task.name} needs"
        raise UserError("--clip", "nothing", expected, "give --clip")
    checkpoints = WanCheckpoints(
        transformer=open_task_transformer(flags, task, fp8=fp8),
        vae=open_vae(_given(flags, "vae"), memmap=memmap),
        t5=open_t5(_given(flags, "t5"), memmap=memmap),
        clip=open_clip(flags.clip, memmap=memmap) if task.takes_image else None,
    )
    find_tokenizer(given=flags.t5_tokenizer, checkpoint=checkpoints.t5)
    check_names_and_shapes(build_vae(checkpoints.vae), checkpoints.vae)
    check_names_and_shapes(build_t5(checkpoints.t5), checkpoints.t5)
    if checkpoints.clip is not None:
        check_names_and_shapes(build_clip(checkpoints.clip), checkpoints.clip)
    _check_widths(checkpoints)
    return checkpoints


def _given(flags: WanModelFlags, name: str) -> str:
    """The path of a model.

    Raises:
        UserError: nothing is given, and `--ckpt_dir` has none.
    """
    path = getattr(flags, name)
    if path is not None:
        return path
    if flags.ckpt_dir is not None:
        got, expected = f"{flags.ckpt_dir} without {RELEASE[name][0]}", "the folder of an official release"
        raise UserError("--ckpt_dir", got, expected, f"give --{name}")
    raise UserError(f"--{name}", "nothing", "a checkpoint file or folder", f"give --{name}")


def _check_widths(checkpoints: WanCheckpoints) -> None:
    """Raises UserError when an encoder is not of the kind that the transformer was trained with."""
    config = WanConfig.from_checkpoint(checkpoints.transformer)
    widths = [
        (checkpoints.t5, "embed_tokens.weight", 2, 1, config.text_width),
        (checkpoints.vae, "post_quant_conv.weight", 5, 0, config.latent_channels),
    ]
    if checkpoints.clip is not None:
        widths.append((checkpoints.clip, "embeddings.patch_embedding.weight", 4, 0, config.image_width))
    for checkpoint, name, num_dims, axis, wanted in widths:
        width = checkpoint.shape(name, num_dims)[axis]
        if width != wanted:
            expected = f"width {wanted}, as {checkpoints.transformer.flag} was trained with"
            raise UserError(checkpoint.flag, f"{checkpoint.path}, width {width}", expected, "give its own encoders")
