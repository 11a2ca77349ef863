"""About how much memory Wan's VAE and UMT5 take while they work, beside their weights.

The VAE works on one latent frame at a time. From one to the next it keeps the last frames that each convolution over
time was given, for a clip about half of all that is alive. The rest is the worst moment of a residual block at full
resolution: a norm, which has float32 copies of its input, or a convolution with a padded copy of it. What a GPU's
kernels take for themselves is not in it.

Shapes: F pixel frames, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.weights import Checkpoint
from modules.weight_sizes import weights_with_fp8
from options.geometry import FRAMES_PER_LATENT
from wan.text_encoder import FP8_LAYERS
from wan.vae import encoder_stages

COLOURS = 3
KEPT = 2
"""Frames that a convolution over time keeps."""
FLOAT32 = 4


@dataclass(frozen=True, kw_only=True)
class VaeWork:
    """How a VAE works."""

    width: int
    """Channels at full resolution; 96 in the published one."""
    encoder_kept: float
    decoder_kept: float
    """Numbers that are kept of a frame, for every pixel."""
    itemsize: int
    cache_on_cpu: bool = False

    @classmethod
    def of(cls, checkpoint: Checkpoint, *, itemsize: int, cache_on_cpu: bool = False) -> VaeWork:
        encoder_kept, decoder_kept = _kept(checkpoint)
        return cls(
            width=checkpoint.shape("decoder.conv_out.weight", 5)[1],
            encoder_kept=encoder_kept,
            decoder_kept=decoder_kept,
            itemsize=itemsize,
            cache_on_cpu=cache_on_cpu,
        )


def _kept(checkpoint: Checkpoint) -> tuple[float, float]:
    """Encoder and decoder: the inputs of all convolutions over time, a pixel's share of them at each level."""
    stages = encoder_stages(checkpoint)
    narrow = 4.0 ** -(len(stages) - 1)
    middle = 4 * stages[-1][0] * narrow
    encoder, before = COLOURS + middle + stages[-1][0] * narrow, stages[0][0]
    for level, (width, num_blocks, halves_frames) in enumerate(stages):
        encoder += (before + (2 * num_blocks - 1) * width) / 4**level
        encoder += halves_frames * width / KEPT / 4 ** (level + 1)  # one frame alone, of the smaller size
        before = width
    decoder = checkpoint.shape("decoder.conv_in.weight", 5)[1] * narrow + middle + stages[0][0]
    for level, (width, num_blocks, _) in reversed(list(enumerate(stages))):
        decoder += (before + (2 * num_blocks + 1) * width) / 4**level
        decoder += (level > 0 and stages[level - 1][2]) * width / 4**level
        before = width // 2
    return encoder, decoder


def decode_bytes(work: VaeWork, num_latents: int, height: int, width: int) -> int:
    """Of `num_latents` frames that are decoded together to pictures of this size in pixels."""
    num_frames = FRAMES_PER_LATENT * (num_latents - 1) + 1
    # What a block was given is alive until the whole stage has ended.
    block = _block_bytes(work, num_frames, 3, height, width) + _kept_bytes(work, num_frames, work.decoder_kept)
    decoded = COLOURS * num_frames
    per_pixel = max(block + decoded * work.itemsize, decoded * (work.itemsize + FLOAT32))
    return round(per_pixel * height * width)


def encode_bytes(work: VaeWork, num_frames: int, height: int, width: int) -> int:
    """Of pictures or a clip of this size in pixels, and of what it is in the VAE's type."""
    block = _block_bytes(work, num_frames, 2, height, width) + _kept_bytes(work, num_frames, work.encoder_kept)
    return round((block + COLOURS * num_frames * work.itemsize) * height * width)


def _block_bytes(work: VaeWork, num_frames: int, num_inputs: int, height: int, width: int) -> float:
    """Of a residual block at full resolution, for every pixel.

    Args:
        num_inputs: how many tensors of its input's size are alive throughout.
    """
    frames = min(num_frames, FRAMES_PER_LATENT)
    padded = (frames + 2) * (height + 2) * (width + 2) / (height * width)
    # A clip's frames are joined with those that were kept, and then padded, while others are put aside to be kept.
    joined, aside = (frames, 0) if num_frames == 1 else (frames + 2 * KEPT, KEPT if work.cache_on_cpu else 0)
    inputs = (num_inputs * frames + aside) * work.itemsize
    return work.width * (inputs + max(frames * 2 * FLOAT32, (padded + joined) * work.itemsize))


def _kept_bytes(work: VaeWork, num_frames: int, kept: float) -> float:
    return 0.0 if num_frames == 1 or work.cache_on_cpu else KEPT * kept * work.itemsize


def t5_weights(checkpoint: Checkpoint, *, itemsize: int, fp8: bool) -> int:
    """Bytes of UMT5's encoder."""
    return weights_with_fp8(checkpoint, itemsize=itemsize, fp8_layers=FP8_LAYERS if fp8 else None)


def t5_work(checkpoint: Checkpoint, num_tokens: int, *, itemsize: int, fp8: bool) -> int:
    """Bytes of its attention, which has a bias for every pair of tokens, or its MLP, and of the weight that is made
    whole from fp8.
    """
    width = checkpoint.shape("embed_tokens.weight", 2)[1]
    inner = checkpoint.shape("block.0.layer.1.DenseReluDense.wo.weight", 2)[1]
    num_heads = checkpoint.shape("block.0.layer.0.SelfAttention.relative_attention_bias.weight", 2)[1]
    per_token = 7 * width + max(2 * num_heads * num_tokens, 3 * inner)
    return per_token * num_tokens * itemsize + (width * inner * (itemsize + FLOAT32) if fp8 else 0)
