"""Wan2.1's VAE: diffusers' `AutoencoderKLWan`, from the official file or in diffusers' layout.

Shapes: B batch, C channels, F pixel frames, H W pixel size; latents have F' = (F - 1) / 4 + 1 frames of H/8 x W/8.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from common.checkpoint_kinds import WAN_VAE, expect_kind
from common.weights import Checkpoint, empty_model, load_weights, open_checkpoint, without_prefix
from options.geometry import FRAMES_PER_LATENT

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

LATENT_MEAN = (
    *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
    *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
LATENT_STD = (
    *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
    *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)

OFFICIAL_FIRST, DIFFUSERS_FIRST = "encoder.conv1.weight", "encoder.conv_in.weight"
PARTS = {
    "conv1": "quant_conv",
    "conv2": "post_quant_conv",
    "encoder.conv1": "encoder.conv_in",
    "encoder.head.0": "encoder.norm_out",
    "encoder.head.2": "encoder.conv_out",
    "decoder.conv1": "decoder.conv_in",
    "decoder.head.0": "decoder.norm_out",
    "decoder.head.2": "decoder.conv_out",
}
"""Modules by their official names and by diffusers'."""
MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
LAYERS = {
    "residual.0": "norm1",
    "residual.2": "conv1",
    "residual.3": "norm2",
    "residual.6": "conv2",
    "shortcut": "conv_shortcut",
}
"""The same of what layers are made of."""
NAME = re.compile(r"(?P<half>encoder|decoder)\.(?P<part>middle|downsamples|upsamples)\.(?P<index>\d+)\.(?P<layer>.+)")


def open_vae(path: str | Path, *, flag: str = "--vae", memmap: bool = True) -> Checkpoint:
    """Reads the header of a VAE: the official `.pth`, its `.safetensors`, or diffusers' file or snapshot with `vae/`.

    Returns:
        With diffusers' names.

    Raises:
        UserError: nothing there, a damaged file, or not a Wan2.1 VAE.
    """
    checkpoint = open_checkpoint(path, flag=flag, subfolder="vae", memmap=memmap)
    expect_kind(checkpoint, WAN_VAE)
    checkpoint = without_prefix(without_prefix(checkpoint, OFFICIAL_FIRST), DIFFUSERS_FIRST)
    if OFFICIAL_FIRST not in checkpoint.tensors:
        return checkpoint
    # The official decoder is one list, in which a layer that enlarges the picture ends a block.
    enlarges = "decoder.upsamples.{}.resample.1.weight".format
    block_length = next((i + 1 for i in range(len(checkpoint.tensors)) if enlarges(i) in checkpoint.tensors), 1)
    return checkpoint.rename(partial(_diffusers_name, block_length=block_length))


def _diffusers_name(name: str, *, block_length: int) -> str:
    """The name of an official tensor in diffusers' layout.

    Args:
        block_length: layers of a block of the decoder, with the one that enlarges.
    """
    module, _, leaf = name.rpartition(".")
    if module in PARTS:
        return f"{PARTS[module]}.{leaf}"
    found = NAME.fullmatch(module)
    if not found:
        return name
    half, part, index, layer = found.group("half", "part", "index", "layer")
    layer = LAYERS.get(layer, layer)
    if part == "middle":
        return f"{half}.mid_block.{MIDDLE.get(index, index)}.{layer}.{leaf}"
    if part == "downsamples":
        return f"{half}.down_blocks.{index}.{layer}.{leaf}"
    block, position = divmod(int(index), block_length)
    place = "upsamplers.0" if layer in ("resample.1", "time_conv") else f"resnets.{position}"
    return f"{half}.up_blocks.{block}.{place}.{layer}.{leaf}"


def load_vae(
    checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device | str, cache_on_cpu: bool = False
) -> AutoencoderKLWan:
    """Builds the VAE with the checkpoint's dimensions and loads it strictly.

    Args:
        cache_on_cpu: what convolutions over time remember of earlier frames waits in RAM; the result is the same.

    Raises:
        UserError: a tensor is missing, unexpected or of another shape.
    """
    vae = build_vae(checkpoint)
    load_weights(vae, checkpoint, dtype=dtype, device=device)
    vae.cache_on_cpu = cache_on_cpu
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKLWan, pixels: Tensor) -> Tensor:
    """Normalised latents: the posterior's mean, never a sample, so that equal pixels give equal latents.

    Args:
        vae: from `load_vae`.
        pixels: (B, 3, F, H, W) in [-1, 1] on any device; F = 4n + 1, H and W multiples of 8.

    Returns:
        (B, 16, F', H/8, W/8) float32 on the VAE's device.
    """
    pixels = pixels.to(vae.device, vae.dtype)
    num_groups = (pixels.shape[2] - 1) // FRAMES_PER_LATENT
    parts = pixels.split([1] + [FRAMES_PER_LATENT] * num_groups, dim=2)
    moments = vae.quant_conv(_in_turn(vae, vae.encoder, parts))
    mean, deviation = _statistics(vae)
    return (moments.chunk(2, dim=1)[0].float() - mean) / deviation


@torch.no_grad()
def decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """The pixels of normalised `latents` (B, 16, F', h, w): (B, 3, 4F' - 3, 8h, 8w) float32 in [-1, 1]."""
    mean, deviation = _statistics(vae)
    latents = (latents.to(vae.device, torch.float32) * deviation + mean).to(vae.dtype)
    pixels = _in_turn(vae, vae.decoder, vae.post_quant_conv(latents).split(1, dim=2))
    return pixels.float().clamp_(-1, 1)


def _in_turn(vae: AutoencoderKLWan, coder: nn.Module, parts: Sequence[Tensor]) -> Tensor:
    """What encoder or decoder makes of parts of a clip, one after another, joined along time.

    A single picture needs no memory of earlier frames, which would be most of what is alive at the end.
    """
    if len(parts) == 1:
        return coder(parts[0])
    memory = [None] * len(list(coder.modules()))  # more than there are convolutions over time
    if vae.cache_on_cpu:
        memory = FeaturesInRam(memory, vae.device)
    return torch.cat([coder(part, feat_cache=memory, feat_idx=[0]) for part in parts], dim=2)


class FeaturesInRam(list):
    """What convolutions over time remember of earlier frames: put away in RAM, and lent to the device while it is read.

    diffusers reads an entry up to three times before it replaces it; that is one copy.
    """

    def __init__(self, entries: Iterable[Tensor | str | None], device: torch.device) -> None:
        super().__init__(entries)
        self._device = device
        self._lent: tuple[int | None, Tensor | None] = (None, None)

    def __setitem__(self, index: int, entry: Tensor | str | None) -> None:
        self._lent = (None, None)
        super().__setitem__(index, entry.to("cpu") if isinstance(entry, Tensor) else entry)

    def __getitem__(self, index: int) -> Tensor | str | None:
        entry = super().__getitem__(index)
        if not isinstance(entry, Tensor):
            return entry
        if self._lent[0] != index:
            self._lent = (index, entry.to(self._device))
        return self._lent[1]


def _statistics(vae: AutoencoderKLWan) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every latent channel, (C, 1, 1, 1) float32."""
    numbers = (vae.config.latents_mean, vae.config.latents_std)
    mean, deviation = (torch.tensor(values, device=vae.device).view(-1, 1, 1, 1) for values in numbers)
    return mean, deviation


def build_vae(checkpoint: Checkpoint) -> AutoencoderKLWan:
    """The VAE without its weights, for comparison with the header."""
    return empty_model(checkpoint, partial(_build, checkpoint))


def _build(checkpoint: Checkpoint) -> AutoencoderKLWan:
    from diffusers import AutoencoderKLWan

    base = checkpoint.shape("encoder.conv_in.weight", 5)[0]
    num_channels = checkpoint.shape("post_quant_conv.weight", 5)[0]
    stages = encoder_stages(checkpoint)
    statistics = _own_statistics(checkpoint, num_channels)
    return AutoencoderKLWan(
        base_dim=base,
        decoder_base_dim=checkpoint.shape("decoder.conv_out.weight", 5)[1] * base // stages[0][0],
        z_dim=num_channels,
        dim_mult=[width // base for width, _, _ in stages],
        num_res_blocks=stages[0][1],
        temperal_downsample=[halves_frames for _, _, halves_frames in stages[:-1]],
        in_channels=checkpoint.shape("encoder.conv_in.weight", 5)[1],
        out_channels=checkpoint.shape("decoder.conv_out.weight", 5)[0],
        **statistics,
    )


def _own_statistics(checkpoint: Checkpoint, num_channels: int) -> dict[str, list[float]]:
    """Of the latents: from the `config.json`, else the published ones; neutral where these do not fit."""
    published = {"latents_mean": list(LATENT_MEAN), "latents_std": list(LATENT_STD)}
    config = checkpoint.config if checkpoint.config.get("_class_name") == "AutoencoderKLWan" else {}
    found = {name: config.get(name, numbers) for name, numbers in published.items()}
    if all(isinstance(numbers, list) and len(numbers) == num_channels for numbers in found.values()):
        return found
    return {"latents_mean": [0.0] * num_channels, "latents_std": [1.0] * num_channels}


def encoder_stages(checkpoint: Checkpoint) -> list[tuple[int, int, bool]]:
    """Width and number of residual blocks of the encoder's stages, and whether each ends with half as many frames."""
    stages, width, num_blocks = [], 0, 0
    for i in itertools.count():
        name = f"encoder.down_blocks.{i}."
        if name + "conv1.weight" in checkpoint.tensors:
            width, num_blocks = checkpoint.shape(name + "conv1.weight", 5)[0], num_blocks + 1
            continue
        stages.append((width, num_blocks, name + "time_conv.weight" in checkpoint.tensors))
        width, num_blocks = 0, 0
        if name + "resample.1.weight" not in checkpoint.tensors:
            return stages
