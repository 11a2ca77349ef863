"""About how much memory HunyuanVideo's VAE and LLaMA take while they work, beside their weights.

The VAE's worst moments are convolutions at full resolution: each has its input, a padded copy of it, its output, and
what waits for the end of a residual block. What a GPU's convolution kernels take for themselves is not in it.

Shapes: F pixel frames, H W pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.weights import Checkpoint
from hunyuan_model.text_encoders import LLAMA_FP8_LAYERS, LLAMA_LAYERS_LEFT_OUT
from modules.weight_sizes import weights_with_fp8
from options.geometry import FRAMES_PER_LATENT

COLOURS = 3


@dataclass(frozen=True, kw_only=True)
class VaeWork:
    """How a VAE works."""

    widths: tuple[int, int]
    """Channels at full and at half resolution; 128 and 256 in the published one."""
    itemsize: int
    tile_size: int | None = None
    chunk_size: int | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint, *, itemsize: int, tile_size: int | None, chunk_size: int | None) -> VaeWork:
        names = (f"encoder.down_blocks.{i}.resnets.0.conv1.conv.weight" for i in range(2))
        full, half = (checkpoint.shape(name, 5)[0] for name in names)
        return cls(widths=(full, half), itemsize=itemsize, tile_size=tile_size, chunk_size=chunk_size or None)


def decode_bytes(work: VaeWork, num_latents: int, height: int, width: int) -> int:
    """Of `num_latents` frames that are decoded together to pictures of this size in pixels."""
    num_frames = FRAMES_PER_LATENT * (num_latents - 1) + 1
    full, half = work.widths
    rows, columns = _tile(work, height, width)
    pixels = num_frames * rows * columns
    padded = _padded(work, num_frames, rows, columns)
    # A last residual block's first convolution: what it was given twice (once for the end), padded, and its output.
    last = half * (2 + padded) + full + half / 4
    # The enlargement before: frames after the first are copied, enlarged apart and then joined.
    enlarging = half * ((1 if num_frames == 1 else 2) + padded + 1 + 3 / 8)
    return round(max(last, enlarging) * pixels * work.itemsize) + _joined(work, num_frames, height, width)


def encode_bytes(work: VaeWork, num_frames: int, height: int, width: int) -> int:
    """Of pictures or a clip of this size in pixels."""
    rows, columns = _tile(work, height, width)
    # A residual block's second convolution: the block's input, the first one's output and what became of it, padded,
    # and the output.
    per_pixel = work.widths[0] * (4 + _padded(work, num_frames, rows, columns))
    pixels = num_frames * rows * columns
    return round(per_pixel * pixels * work.itemsize) + _joined(work, num_frames, height, width)


def _tile(work: VaeWork, height: int, width: int) -> tuple[int, int]:
    tile = work.tile_size
    return (min(height, tile), min(width, tile)) if tile else (height, width)


def _padded(work: VaeWork, num_frames: int, height: int, width: int) -> float:
    """How much larger than the input its padded copy is; or the copy of a piece of it and what becomes of that."""
    chunk = work.chunk_size
    is_chunked = chunk and width >= 1.5 * chunk
    columns = chunk + 2 if is_chunked else width + 2
    copy = (num_frames + 2) * (height + 2) * columns / (num_frames * height * width)
    return copy + (chunk / width if is_chunked else 0)


def _joined(work: VaeWork, num_frames: int, height: int, width: int) -> int:
    """Of tiles that wait to be put together, and of what becomes of them."""
    is_tiled = work.tile_size is not None and max(height, width) > work.tile_size
    return 3 * COLOURS * num_frames * height * width * work.itemsize // 2 if is_tiled else 0


def llama_weights(checkpoint: Checkpoint, *, itemsize: int, fp8: bool) -> int:
    """Bytes of the layers that are loaded."""
    num_layers = checkpoint.count("layers.{}.self_attn.q_proj.weight")
    unused = (*(f"layers.{num_layers - 1 - i}." for i in range(LLAMA_LAYERS_LEFT_OUT)), "norm.")
    used = checkpoint.rename(lambda name: None if name.startswith(unused) else name)
    return weights_with_fp8(used, itemsize=itemsize, fp8_layers=LLAMA_FP8_LAYERS if fp8 else None)


def llama_work(checkpoint: Checkpoint, num_tokens: int, *, itemsize: int, fp8: bool) -> int:
    """Bytes of its MLP at work, and of the weight that is made whole from fp8."""
    hidden = checkpoint.shape("embed_tokens.weight", 2)[1]
    inner = checkpoint.shape("layers.0.mlp.gate_proj.weight", 2)[0]
    unpacked = hidden * inner * (itemsize + 4) if fp8 else 0
    return (3 * inner + 8 * hidden) * num_tokens * itemsize + unpacked
