"""How far one forward of FramePack's transformer in fp8 is from the one in 16 bits, and how much memory weights take.

    python -m benchmarks.fp8_error
    python -m benchmarks.fp8_error --dit FramePackI2V_HY_bf16.safetensors --size 640
    python -m benchmarks.fp8_error --width 3072 --double_blocks 20 --single_blocks 40 --size 640

Without --dit it writes a transformer of random weights in bfloat16, normally distributed; smaller ones (--std) lose
more without scales. --outliers makes one weight in a thousand so many times larger. What it is shown is random, too.
All modes compute in the same type, so that what is left is the error of the weights: ‖v - v₁₆‖ / ‖v₁₆‖ of the predicted
velocity v, and of the weights themselves.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from benchmarks.command import HEAD_DIM, check_sizes, config_of, printed
from common.device import pick_device, pick_dtype
from common.weights import Checkpoint
from frame_pack.config import FramePackConfig
from frame_pack.context import one_frame_context
from frame_pack.loading import load_transformer, open_transformer
from frame_pack.model import Conditioning, FramePackTransformer, guidance_input
from modules.flow_matching import NUM_TIMESTEPS
from modules.fp8 import Fp8Linear, dequantised
from options.fp8 import Fp8Mode
from options.geometry import VAE_STRIDE
from options.one_frame import OneFrameOptions

WINDOW, NUM_TEXT, NUM_PATCHES = 9, 100, 729
DISTILLED_GUIDANCE = 10.0
OUTLIERS_PER_WEIGHT = 0.001
SIGMAS = (0.95, 0.6, 0.2)
"""Noise levels; the error is that of all three together."""
HEADINGS = ("weights", "error of v", "of weights", "memory")


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One way to keep the weights."""

    mode: Fp8Mode
    velocity_error: float
    weight_error: float
    """Of those that are kept in fp8, in the mean over layers."""
    num_bytes: int
    """Of all weights."""


def write_transformer(path: Path, options: argparse.Namespace) -> None:
    """A checkpoint of random weights in bfloat16."""
    from safetensors.torch import save_file

    config = config_of(options)
    with torch.device("meta"):
        empty = FramePackTransformer(config).state_dict()
    generator = torch.Generator().manual_seed(options.seed)

    def values(tensor: Tensor) -> Tensor:
        found = torch.randn(tensor.shape, generator=generator) * options.std
        if tensor.ndim == 2:
            found[torch.rand(tensor.shape, generator=generator) < OUTLIERS_PER_WEIGHT] *= options.outliers
        return found.bfloat16()

    save_file({name: values(tensor) for name, tensor in empty.items()}, path)


def conditioning_for(config: FramePackConfig, options: argparse.Namespace) -> tuple[Tensor, Conditioning]:
    """(noisy latents, what else the transformer is told): one frame with one control image, of random numbers."""
    side, generator = options.size // VAE_STRIDE, torch.Generator().manual_seed(options.seed + 1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    control = random(1, config.latent_channels, 1, side, side)
    parsed = OneFrameOptions(target_index=WINDOW, control_indices=(0,))
    context = one_frame_context([control], [None], parsed, window=WINDOW, like=control)
    return random(*control.shape), Conditioning(
        context=context,
        text=random(1, NUM_TEXT, config.text_width),
        text_mask=torch.ones(1, NUM_TEXT, dtype=torch.bool),
        pooled=random(1, config.pooled_width),
        image=random(1, NUM_PATCHES, config.image_width),
        guidance=guidance_input(DISTILLED_GUIDANCE, 1),
    )


@torch.no_grad()
def velocities(transformer: FramePackTransformer, options: argparse.Namespace) -> Tensor:
    """(levels, C, T, H, W), on the CPU in float32."""
    noisy, conditioning = conditioning_for(transformer.config, options)
    device = transformer.device
    found = [transformer(noisy, torch.tensor([sigma * NUM_TIMESTEPS], device=device), conditioning) for sigma in SIGMAS]
    return torch.cat(found).float().cpu()


def relative(found: Tensor, wanted: Tensor) -> float:
    """‖found - wanted‖ / ‖wanted‖"""
    return float((found - wanted).norm() / wanted.norm())


def weight_error(transformer: FramePackTransformer, checkpoint: Checkpoint) -> float:
    """In the mean over the layers that are in fp8; 0 when there are none."""
    layers = {f"{path}.weight": m for path, m in transformer.named_modules() if isinstance(m, Fp8Linear)}
    errors = [
        relative(dequantised(layer.weight, layer.scale_weight, torch.float32).cpu(), weight.float())
        for name, weight in checkpoint.read()
        if (layer := layers.get(name))
    ]
    return sum(errors) / len(errors) if errors else 0.0


def measure(checkpoint: Checkpoint, mode: Fp8Mode, wanted: Tensor | None, options: argparse.Namespace) -> tuple:
    """(what was found, the velocities).

    Args:
        wanted: those of the model as it is; None when it is this one.
    """
    device = pick_device(options.device)
    dtype = pick_dtype(options.dit_dtype, on_gpu="bfloat16", device=device)
    transformer = load_transformer(checkpoint, dtype=dtype, device=device, fp8=mode)
    found = velocities(transformer, options)
    return Measurement(
        mode=mode,
        velocity_error=0.0 if wanted is None else relative(found, wanted),
        weight_error=weight_error(transformer, checkpoint),
        num_bytes=sum(tensor.numel() * tensor.element_size() for tensor in transformer.state_dict().values()),
    ), found


def run_all(options: argparse.Namespace) -> list[Measurement]:
    """The model as it is, then each mode.

    Raises:
        UserError: `--dit` is not FramePack's transformer in 16 bits.
    """
    with tempfile.TemporaryDirectory(prefix="fp8_benchmark_", ignore_cleanup_errors=True) as folder:
        path = options.dit or str(Path(folder) / "random.safetensors")
        if options.dit is None:
            write_transformer(Path(path), options)
        checkpoint, results, wanted = open_transformer(path), [], None
        for mode in get_args(Fp8Mode):
            result, found = measure(checkpoint, mode, wanted, options)
            results.append(result)
            wanted = found if wanted is None else wanted
        return results


def table(results: Sequence[Measurement]) -> str:
    """One row for each mode."""
    names = {"off": "as they are", "plain": "--fp8", "scaled": "--fp8_scaled"}
    rows = [HEADINGS]
    for one in results:
        errors = [
            f"{100 * error:.2f} %" if one.mode != "off" else "-" for error in (one.velocity_error, one.weight_error)
        ]
        rows.append((names[one.mode], *errors, f"{one.num_bytes / 2**20:.1f} MiB"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dit", help="FramePack's transformer in 16 bits (default: one of random weights)")
    parser.add_argument("--width", type=int, default=512, help=f"of that one, in heads of {HEAD_DIM} (default: 512)")
    parser.add_argument("--double_blocks", type=int, default=4, help="of that one (default: 4)")
    parser.add_argument("--single_blocks", type=int, default=8, help="of that one (default: 8)")
    parser.add_argument("--std", type=float, default=0.02, help="of its weights (default: 0.02)")
    parser.add_argument("--outliers", type=float, default=1.0, help="times that some of its weights are larger (1)")
    parser.add_argument("--size", type=int, default=128, help="width and height of the picture (default: 128)")
    parser.add_argument("--seed", type=int, default=0, help="(default: 0)")
    parser.add_argument("--dit_dtype", choices=("bfloat16", "float16", "float32"), help="what it computes in")
    parser.add_argument("--device", help="torch device (default: the GPU if there is one)")
    options = parser.parse_args(argv)
    check_sizes(parser, options, "double_blocks", "single_blocks")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints the table."""
    options = parse(argv)
    return printed(lambda: table(run_all(options)))


if __name__ == "__main__":
    sys.exit(main())
