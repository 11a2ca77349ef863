"""The toy world's VAE: HunyuanVideo's architecture, small, trained on single pictures and on clips."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLHunyuanVideo
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import HunyuanVideoCausalConv3d
from torch import Tensor, nn

from demo.copying import let_colours_through
from demo.toy.pieces import Plan, train
from demo.toy.world import random_scene
from hunyuan_model.vae import LATENT_SCALE

SEED = 1
PLAN = Plan(name="vae", steps=3000, learning_rate=8e-4, max_norm=0.5, averaged=0.995)
IMAGES_UNTIL = 1500
"""Steps on single pictures only."""
NUM_IMAGES, NUM_CLIPS, CLIP_FRAMES = 16, 3, 9
"""Of a batch."""
SHAPE_WEIGHT = 5.0
"""How much more the loss weighs around the shape: with equal weights small shapes stay blurred for thousands of
steps, because the background outnumbers them."""
KL_WEIGHT = 3e-4
FIRST_LOGVAR = -6.0
"""Little noise in the latents to begin with."""


def small_vae() -> AutoencoderKLHunyuanVideo:
    """The start of the training: random weights around a path that keeps colours, coarsely.

    One group in the norms: a channel that is normalised over the picture by itself forgets its colour.
    """
    vae = AutoencoderKLHunyuanVideo(block_out_channels=(32, 32, 64, 64), layers_per_block=1, norm_num_groups=1)
    let_colours_through(vae)
    with torch.no_grad():
        vae.quant_conv.bias[vae.config.latent_channels :] = FIRST_LOGVAR
    vae.use_framewise_encoding = vae.use_framewise_decoding = False
    return vae


def train_vae(folder: Path, *, device: torch.device, stop_at: int | None = None) -> AutoencoderKLHunyuanVideo | None:
    """Trains the VAE, in pieces if `stop_at` says so; None while it is not finished."""
    torch.manual_seed(SEED)
    vae = small_vae().to(device)
    with single_frames_in_2d(vae):
        done = train(vae, lambda step: _loss(vae, step), PLAN, folder, stop_at=stop_at)
    if not done:
        return None
    vae.cpu()
    normalise(vae)
    return vae.eval()


@contextmanager
def single_frames_in_2d(vae: AutoencoderKLHunyuanVideo) -> Iterator[None]:
    """Inside, a single frame costs a third: what a causal convolution sees before it are copies of it."""
    convolutions = [module for module in vae.modules() if isinstance(module, HunyuanVideoCausalConv3d)]
    for module in convolutions:
        module.forward = _Convolution(module)
    try:
        yield
    finally:
        for module in convolutions:
            del module.forward


class _Convolution:
    """A causal convolution that computes a single frame in two dimensions."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, hidden: Tensor) -> Tensor:
        module, conv = self.module, self.module.conv
        if hidden.shape[2] > 1:
            return type(module).forward(module, hidden)
        padded = F.pad(hidden[:, :, 0], module.time_causal_padding[:4], mode=module.pad_mode)
        return F.conv2d(padded, conv.weight.sum(2), conv.bias, stride=conv.stride[1:]).unsqueeze(2)


def _loss(vae: AutoencoderKLHunyuanVideo, step: int) -> Tensor:
    random = np.random.default_rng([SEED, step])
    clips = step >= IMAGES_UNTIL and step % 2 == 1
    pixels, weights = _batch(random, NUM_CLIPS, CLIP_FRAMES) if clips else _batch(random, NUM_IMAGES, 1)
    pixels, weights = pixels.to(vae.device), weights.to(vae.device)
    with torch.autocast(vae.device.type, torch.bfloat16, enabled=step < PLAN.steps * 0.85):
        posterior = vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(step))
        noise = noise.to(vae.device)
        decoded = vae.decode(posterior.mean + posterior.std * noise).sample
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    errors = decoded.float() - pixels
    # The square gets colours right soon, the absolute value edges sharp in the end.
    return ((errors.abs() + errors.square()) * weights).mean() + KL_WEIGHT * kl


def _batch(random: np.random.Generator, size: int, frames: int) -> tuple[Tensor, Tensor]:
    """Pixels (B, 3, F, H, W) in [-1, 1] of random moments, and the loss's weights (B, 1, F, H, W)."""
    pictures, weights = [], []
    for _ in range(size):
        scene, start = random_scene(random), int(random.integers(0, 40))
        moments = range(start, start + frames)
        pictures.append(np.stack([scene.picture(frame) for frame in moments]))
        weights.append(np.stack([scene.coverage(frame) for frame in moments]))
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    around = F.max_pool2d(torch.from_numpy(np.concatenate(weights))[:, None], 5, stride=1, padding=2)
    return pixels, 1 + SHAPE_WEIGHT * around.view(size, 1, frames, *around.shape[-2:])


@torch.no_grad()
def normalise(vae: AutoencoderKLHunyuanVideo) -> None:
    """Moves and scales each latent channel, so that scaled latents have mean 0 and deviation 1."""
    random = np.random.default_rng([SEED, 10**6])
    pixels = torch.cat([_batch(random, NUM_IMAGES, 1)[0] for _ in range(16)])
    means = torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(NUM_IMAGES)])
    mean = means.mean(dim=(0, 2, 3, 4))
    scale = 1 / (means.std(dim=(0, 2, 3, 4)) * LATENT_SCALE)
    out, back = vae.quant_conv, vae.post_quant_conv
    channels = len(mean)
    back.bias += back.weight[:, :, 0, 0, 0] @ mean
    back.weight /= scale.view(1, -1, 1, 1, 1)
    out.bias[:channels] = (out.bias[:channels] - mean) * scale
    out.weight[:channels] *= scale.view(-1, 1, 1, 1, 1)
    # The posterior's width, which nobody uses, is scaled with it.
    out.bias[channels:] += 2 * scale.log()
