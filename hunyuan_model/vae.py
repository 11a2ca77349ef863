"""HunyuanVideo's VAE: diffusers' `AutoencoderKLHunyuanVideo`, with ways to use less memory that change no result.

Shapes: B batch, C channels, F pixel frames, H W pixel size; latents have F' = (F - 1) / 4 + 1 frames of H/8 x W/8.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.checkpoint_kinds import HUNYUAN_VAE, expect_kind
from common.weights import Checkpoint, empty_model, load_weights, open_checkpoint

if TYPE_CHECKING:
    from diffusers import AutoencoderKLHunyuanVideo
    from diffusers.models.attention_processor import Attention

LATENT_SCALE = 0.476986
NORM_GROUPS = 32


def open_vae(path: str | Path, *, flag: str = "--vae", memmap: bool = True) -> Checkpoint:
    """Reads the header of a VAE: a file, the official `.pt`, or a snapshot folder with `vae/`.

    Raises:
        UserError: nothing there, a damaged file, or not a HunyuanVideo VAE.
    """
    checkpoint = open_checkpoint(path, flag=flag, subfolder="vae", memmap=memmap)
    if any(name.startswith("vae.") for name in checkpoint.tensors):
        checkpoint = checkpoint.rename(lambda name: name.removeprefix("vae.") if name.startswith("vae.") else None)
    expect_kind(checkpoint, HUNYUAN_VAE)
    return checkpoint


def load_vae(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    chunk_size: int | None = None,
    tile_size: int | None = None,
) -> AutoencoderKLHunyuanVideo:
    """Builds the VAE with the checkpoint's dimensions and loads it strictly.

    Args:
        chunk_size: convolutions work on pieces of this width; the result is the same.
        tile_size: pixel size of spatial tiles, a multiple of 32, blended over a quarter; used on larger images only.

    Raises:
        UserError: a tensor is missing, unexpected or of another shape.
    """
    vae = build_vae(checkpoint)
    load_weights(vae, checkpoint, dtype=dtype, device=device)
    vae.use_framewise_encoding = vae.use_framewise_decoding = False  # temporal tiles would change the result
    for coder in (vae.encoder, vae.decoder):
        coder.mid_block = CausalMidBlock(coder.mid_block)
    if chunk_size:
        _chunk_convolutions(vae, chunk_size)
    if tile_size:
        stride = tile_size * 3 // 4
        vae.enable_tiling(
            tile_sample_min_height=tile_size,
            tile_sample_min_width=tile_size,
            tile_sample_stride_height=stride,
            tile_sample_stride_width=stride,
        )
    return vae


@torch.no_grad()
def encode(vae: AutoencoderKLHunyuanVideo, pixels: Tensor) -> Tensor:
    """Scaled latents: the posterior's mean, never a sample, so that equal pixels give equal latents.

    Args:
        pixels: (B, 3, F, H, W) in [-1, 1] on any device; F = 4n + 1, H and W multiples of 8.

    Returns:
        (B, 16, F', H/8, W/8) float32 on the VAE's device.
    """
    posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
    return posterior.mean.float() * LATENT_SCALE


@torch.no_grad()
def decode(vae: AutoencoderKLHunyuanVideo, latents: Tensor) -> Tensor:
    """The pixels of scaled `latents` (B, 16, F', h, w): (B, 3, 4F' - 3, 8h, 8w) float32, about [-1, 1], not clamped."""
    latents = latents.to(vae.device, torch.float32) / LATENT_SCALE
    return vae.decode(latents.to(vae.dtype)).sample.float()


def build_vae(checkpoint: Checkpoint) -> AutoencoderKLHunyuanVideo:
    """The VAE without its weights, for comparison with the header."""
    return empty_model(checkpoint, partial(_build, checkpoint))


def _build(checkpoint: Checkpoint) -> AutoencoderKLHunyuanVideo:
    from diffusers import AutoencoderKLHunyuanVideo

    # Shapes do not tell in how many groups channels are normalised.
    is_own = checkpoint.config.get("_class_name") == "AutoencoderKLHunyuanVideo"
    num_groups = checkpoint.config.get("norm_num_groups", NORM_GROUPS) if is_own else NORM_GROUPS
    num_blocks = checkpoint.count("encoder.down_blocks.{}.resnets.0.conv1.conv.weight")
    widths = [f"encoder.down_blocks.{i}.resnets.0.conv1.conv.weight" for i in range(num_blocks)]
    return AutoencoderKLHunyuanVideo(
        in_channels=checkpoint.shape("encoder.conv_in.conv.weight", 5)[1],
        out_channels=checkpoint.shape("decoder.conv_out.conv.weight", 5)[0],
        latent_channels=checkpoint.shape("post_quant_conv.weight", 5)[0],
        down_block_types=("HunyuanVideoDownBlock3D",) * num_blocks,
        up_block_types=("HunyuanVideoUpBlock3D",) * num_blocks,
        block_out_channels=tuple(checkpoint.shape(name, 5)[0] for name in widths),
        layers_per_block=checkpoint.count("encoder.down_blocks.0.resnets.{}.conv1.conv.weight"),
        norm_num_groups=num_groups,
        scaling_factor=LATENT_SCALE,
    )


class CausalMidBlock(nn.Module):
    """diffusers' `HunyuanVideoMidBlock3D` without its mask of (F' * h * w)^2 entries: 29 GB for 19 frames of 640 x 640.

    Keys and results are the same. Takes over the modules of `block`.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.resnets = block.resnets
        self.attentions = block.attentions

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, C, F', h, w) to the same shape."""
        hidden = self.resnets[0](hidden)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            hidden = resnet(_attend_causally(attention, hidden))
        return hidden


def _attend_causally(attention: Attention, hidden: Tensor) -> Tensor:
    """Residual one-head attention in which a frame sees itself and all earlier frames.

    Frame by frame, the keys and values are simply cut after the frame, so no mask is needed.
    """
    height, width = hidden.shape[-2:]
    tokens = attention.group_norm(hidden.flatten(2)).transpose(1, 2)  # (B, F' * h * w, C); the norm is over all frames
    query, key, value = (project(tokens).unsqueeze(1) for project in (attention.to_q, attention.to_k, attention.to_v))
    frame = height * width
    attended = torch.empty_like(query)
    for end in range(frame, tokens.shape[1] + 1, frame):
        attended[:, :, end - frame : end] = F.scaled_dot_product_attention(
            query[:, :, end - frame : end], key[:, :, :end], value[:, :, :end]
        )
    return hidden + attention.to_out[0](attended.squeeze(1)).transpose(1, 2).unflatten(2, hidden.shape[2:])


def _chunk_convolutions(vae: AutoencoderKLHunyuanVideo, chunk_size: int) -> None:
    """Lets every causal convolution work in pieces; the modules stay, so keys and types do too."""
    from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoCausalConv3d

    for module in vae.modules():
        if isinstance(module, HunyuanVideoCausalConv3d):
            module.forward = partial(_convolve_in_chunks, module, chunk_size=chunk_size)


def _convolve_in_chunks(causal_conv: nn.Module, hidden: Tensor, *, chunk_size: int) -> Tensor:
    """A causal convolution (B, C, F, H, W), cut along the width into pieces that overlap by what the kernel reads.

    Only a piece is ever padded (replicated borders), never the whole input.
    """
    conv, (left, right, *others) = causal_conv.conv, causal_conv.time_causal_padding
    width = hidden.shape[-1]
    if width < 1.5 * chunk_size:
        return conv(F.pad(hidden, (left, right, *others), mode=causal_conv.pad_mode))
    kernel, stride = conv.kernel_size[-1], conv.stride[-1]
    out_width = (width + left + right - kernel) // stride + 1
    step = max(chunk_size // stride, 1)
    out = None
    for start in range(0, out_width, step):
        stop = min(start + step, out_width)
        begin, end = start * stride - left, (stop - 1) * stride + kernel - left  # in the input; outside it is padding
        piece = hidden[..., max(begin, 0) : min(end, width)]
        piece = F.pad(piece, (max(-begin, 0), max(end - width, 0), *others), mode=causal_conv.pad_mode)
        result = conv(piece)
        if out is None:
            out = result.new_empty(*result.shape[:-1], out_width)
        out[..., start:stop] = result
    return out
