"""How long a denoising step of FramePack takes, and how much memory, with and without the options that save either.

    python -m benchmarks.generation
    python -m benchmarks.generation --double_blocks 20 --single_blocks 40 --width 3072 --size 640 --steps 20
    python -m benchmarks.generation --dit FramePackI2V_HY_bf16.safetensors --size 640 --kind default
    python -m benchmarks.generation --options "" --options "--fp8_scaled --blocks_to_swap 20"

Without --dit it writes a transformer of random weights, as neither time nor memory depends on their values. Options are
those of fpack_generate_video.py; each set of them gets a process of its own, so that its peak of memory is its own too.
What a machine cannot do has a row that says why. On a GPU, peaks are what tensors take there, beside them what --plan
computes for the same; on a CPU, peaks are the process's memory.
"""

import argparse
import json
import math
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from statistics import median

import torch
from tqdm import tqdm

from benchmarks.command import HEAD_DIM, check_sizes, config_of, printed
from benchmarks.memory import CommandFailed, watched
from common import flags
from common.device import peak_logged, pick_device
from frame_pack.compute import Compute
from frame_pack.config import FramePackConfig
from frame_pack.context import HISTORY_FRAMES, PackedContext, one_frame_context, section_context
from frame_pack.costs import NUM_IMAGE, FramePackCosts, Tokens
from frame_pack.loading import load_transformer, open_transformer
from frame_pack.model import Conditioning, FramePackTransformer, guidance_input
from frame_pack.plan import empty_transformers
from frame_pack.swapping import swap_limits
from modules.attention import LIBRARIES
from modules.flow_matching import NUM_TIMESTEPS, shifted_sigmas
from modules.swapping import check_swap, choose_swap
from modules.transformer_plan import Work
from options.flags_compile import CompileFlags
from options.flags_fpack_generate import FramePackComputeFlags
from options.geometry import VAE_STRIDE
from options.one_frame import OneFrameOptions

WINDOW, NUM_TEXT = 9, 100
NUM_WARM = 2
"""Steps before those that are timed."""
NUM_PREPARED = 25
"""Steps that are prepared together, as the default number of a generation."""
SECONDS_BETWEEN_LOOKS = 0.05
BLOCK_OF_NUMBERS = 1 << 24
KINDS = ("c0", "default", "section")
HEADINGS = ("options", "ms/step", "ratio", "prepare", "load", "peak", "computed")


@dataclass(frozen=True, kw_only=True)
class Options:
    """A set of options that is measured."""

    compute: FramePackComputeFlags
    compilation: CompileFlags

    @classmethod
    def parse(cls, text: str, more: Sequence[str]) -> "Options":
        return flags.parse(cls, description="", argv=[*shlex.split(text), *more])


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Some steps with one set of options."""

    options: str
    seconds: float = math.nan
    """Median of a step."""
    prepare_seconds: float = math.nan
    """Of all that is done once for 25 steps; the second time, when everything is warm."""
    load_seconds: float = math.nan
    peak: int | None = None
    """Bytes, of preparing and steps: of the GPU's memory, else of the process; None where the system does not tell."""
    computed: int | None = None
    """What a plan says of the same."""
    refusal: str = ""
    """Why it was not measured."""


Measure = Callable[[Sequence[str]], Measurement]
"""Measures what a command line asks for."""


# ---- what is run ----


def write_transformer(path: Path, options: argparse.Namespace) -> None:
    """A checkpoint of random weights in bfloat16: a block of seeded numbers, again and again."""
    from safetensors.torch import save_file

    with torch.device("meta"):
        model = FramePackTransformer(config_of(options)).to(torch.bfloat16)
    model.to_empty(device="cpu")
    numbers = torch.randn(BLOCK_OF_NUMBERS, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()
    for parameter in model.parameters():
        for part in parameter.data.view(-1).split(len(numbers)):
            part.copy_(numbers[: len(part)])
    save_file(model.state_dict(), path)


def context_of(config: FramePackConfig, options: argparse.Namespace) -> PackedContext:
    """Random numbers for latents."""
    side = options.size // VAE_STRIDE
    like = torch.randn(1, config.latent_channels, 1, side, side, generator=torch.Generator().manual_seed(1))
    if options.kind == "section":
        return section_context(like, like.expand(-1, -1, HISTORY_FRAMES, -1, -1), padding=0, window=WINDOW)
    no_history = options.kind == "c0"
    one_frame = OneFrameOptions(control_indices=(0,), no_2x=no_history, no_4x=no_history, no_post=no_history)
    return one_frame_context([like], [None], one_frame, window=WINDOW, like=like)


def conditioning_of(config: FramePackConfig, context: PackedContext) -> Conditioning:
    generator = torch.Generator().manual_seed(2)
    return Conditioning(
        context=context,
        text=torch.randn(1, NUM_TEXT, config.text_width, generator=generator),
        text_mask=torch.ones(1, NUM_TEXT, dtype=torch.bool),
        pooled=torch.randn(1, config.pooled_width, generator=generator),
        image=torch.randn(1, NUM_IMAGE, config.image_width, generator=generator),
        guidance=guidance_input(10.0, 1),
    )


# ---- measuring ----


def measure(argv: Sequence[str]) -> Measurement:
    """Takes steps in this process with the last of `--options`; no peak but a GPU's.

    Raises:
        UserError: they cannot be had on this machine.
    """
    options = parse(argv)
    chosen = Options.parse(options.options[-1], ["--device", str(pick_device(options.device))])
    compute = Compute.from_flags(chosen.compute, chosen.compilation)
    compute.check_execution()
    checkpoint, device, dtype = open_transformer(options.dit), compute.device, compute.transformer_dtype
    config = FramePackConfig.from_checkpoint(checkpoint)
    empty = empty_transformers(checkpoint, None, dtype)
    check_swap(compute.swap, empty.limits)
    swap = choose_swap(compute.swap, empty.limits, free=math.inf, needed=lambda num_blocks, offload: 0)

    start = time.perf_counter()
    transformer = load_transformer(checkpoint, dtype=dtype, device=device, fp8=compute.fp8, swap=swap)
    compute.execution.apply_to(transformer)
    load_seconds = _since(start, device)

    context = context_of(config, options)
    costs = FramePackCosts(config=config, tokens=Tokens.of(context, num_text=NUM_TEXT))
    sigmas = shifted_sigmas(NUM_PREPARED, 1.0)[:-1]
    timesteps, latents = (NUM_TIMESTEPS * sigmas).float()[:, None], context.clean.latents[:, :, :1]
    latents = latents.expand(-1, -1, context.num_target_frames, -1, -1).to(device)
    seconds, prepare_seconds = [], math.nan
    with torch.no_grad(), peak_logged("steps", device) as peak:
        for _ in range(2):
            prepared = None
            start = time.perf_counter()
            prepared = transformer.prepare(conditioning_of(config, context), timesteps)
            prepare_seconds = _since(start, device)
        for number in range(NUM_WARM + options.steps):
            start = time.perf_counter()
            transformer.step(latents, prepared, number % NUM_PREPARED)
            seconds.append(_since(start, device))

    work = Work(itemsize=dtype.itemsize, num_steps=NUM_PREPARED, unpacked=empty.unpacked(compute.fp8))
    placed = empty.placed(compute.fp8, swap)
    taken = placed.stays + placed.block_slots + costs.prepared_bytes(work) + costs.step_bytes(work)
    return Measurement(
        options=options.options[-1],
        seconds=median(seconds[NUM_WARM:]),
        prepare_seconds=prepare_seconds,
        load_seconds=load_seconds,
        peak=peak.allocated if device.type == "cuda" else None,
        computed=taken,
    )


def _since(start: float, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure_alone(argv: Sequence[str]) -> Measurement:
    """The same in a process of its own, whose memory is watched; a refusal where it fails."""
    command = [sys.executable, "-m", "benchmarks.generation", "--as_json", *argv]
    try:
        said, peak = watched(command, pause=SECONDS_BETWEEN_LOOKS)
    except CommandFailed as error:
        lines = error.said.splitlines() or ["nothing was said"]
        return Measurement(options=parse(argv).options[-1], refusal=lines[-1])
    found = Measurement(**json.loads(next(line for line in reversed(said.splitlines()) if line.startswith("{"))))
    return found if found.peak is not None else replace(found, peak=peak.main)


def default_options(config: FramePackConfig) -> list[str]:
    """Every option alone, and what goes together on small cards."""
    most, offload, pinned = (
        swap_limits(config).most_in_generation,
        "--offload_invariant",
        "--use_pinned_memory_for_block_swap",
    )
    swaps = [f"--blocks_to_swap {number}" for number in dict.fromkeys((most // 2, most)) if number]
    sets = ["", f"{offload} always", "--fp8", "--fp8_scaled", f"--fp8_scaled {offload} always"]
    sets += [text for swap in swaps for text in (f"{swap} {offload} never", swap, f"{swap} {pinned}")]
    sets += [f"--fp8_scaled {swap} {pinned}" for swap in swaps]
    return [*sets, *(f"--attn_mode {name}" for name in LIBRARIES), "--compile"]


def run_all(options: argparse.Namespace, argv: Sequence[str], measure: Measure) -> list[Measurement]:
    """One for each set of options.

    Raises:
        UserError: `--dit` is not FramePack's transformer.
    """
    with tempfile.TemporaryDirectory(prefix="generation_benchmark_") as folder:
        path = options.dit or str(Path(folder) / "random.safetensors")
        if options.dit is None:
            write_transformer(Path(path), options)
        sets = options.options or default_options(FramePackConfig.from_checkpoint(open_transformer(path)))
        turns = tqdm(sets, desc="generation", unit="run")
        return [measure([*argv, "--dit", path, f"--options={chosen}"]) for chosen in turns]


# ---- the table ----


def title(options: argparse.Namespace) -> str:
    """What the figures are of."""
    device = pick_device(options.device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
    model = options.dit or f"{options.double_blocks}+{options.single_blocks} blocks of width {options.width}"
    what = f"{model}, {options.kind} at {options.size}x{options.size}"
    return f"{date.today().isoformat()}, {name}, torch {torch.__version__}: {what}, median of {options.steps} steps"


def table(found: Sequence[Measurement]) -> str:
    """Ratios are to the first one that was measured."""
    first = next((one.seconds for one in found if not one.refusal), math.nan)
    rows = [HEADINGS]
    for one in found:
        name = one.options or "none"
        if one.refusal:
            rows.append((name, "not measured", *[""] * 5))
            continue
        times = (f"{one.seconds * 1e3:.1f}", f"{one.seconds / first:.2f}")
        once = (f"{one.prepare_seconds:.2f} s", f"{one.load_seconds:.1f} s")
        rows.append((name, *times, *once, _gb(one.peak), _gb(one.computed)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    return "\n".join([*lines, *(f"{one.options}: {one.refusal}" for one in found if one.refusal)])


def _gb(num_bytes: int | None) -> str:
    return "not measured" if num_bytes is None else f"{num_bytes / 1e9:.2f} GB"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dit", help="FramePack's transformer (default: one of random weights)")
    parser.add_argument("--width", type=int, default=256, help=f"of that one, in heads of {HEAD_DIM} (default: 256)")
    parser.add_argument("--double_blocks", type=int, default=4, help="of that one (default: 4)")
    parser.add_argument("--single_blocks", type=int, default=8, help="of that one (default: 8)")
    parser.add_argument("--size", type=int, default=256, help="width and height of the picture (default: 256)")
    parser.add_argument("--kind", choices=KINDS, default="c0", help="one control image, all of a frame's, or a video's")
    parser.add_argument("--steps", type=int, default=5, help=f"that are timed, behind {NUM_WARM} more (default: 5)")
    parser.add_argument("--options", action="append", help="a set of generation options to measure (default: many)")
    parser.add_argument("--device", help="torch device (default: the GPU if there is one)")
    parser.add_argument("--as_json", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    check_sizes(parser, options, "steps")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints the table."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    if options.as_json:
        return printed(lambda: json.dumps(asdict(measure(argv))))
    return printed(lambda: f"{title(options)}\n{table(run_all(options, argv, measure_alone))}")


if __name__ == "__main__":
    sys.exit(main())
