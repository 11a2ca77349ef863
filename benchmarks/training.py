"""How long a training step of a FramePack LoRA takes, and how much memory, by the number of checkpointed blocks.

    python -m benchmarks.training --size 384 --steps 5
    python -m benchmarks.training --dit FramePackI2V_HY_bf16.safetensors --size 1024 --mixed_precision bf16
    python -m benchmarks.training --double_blocks 20 --single_blocks 40 --width 3072 --mixed_precision bf16

Without --dit it writes a transformer of random weights, as neither time nor memory depends on their values. A step is
all that training does with a batch: noise, forward, backward, clipping, optimizer. Every number of checkpointed blocks
gets a process of its own, so that its peak of memory is its own too.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.command import HEAD_DIM, check_sizes, config_of, printed
from benchmarks.memory import watched
from common import flags
from common.device import pick_device
from common.processes import Processes
from dataset.epochs import ItemKey, Position
from dataset.training_dataset import TrainBatch
from frame_pack.architecture import FramePackArchitecture
from frame_pack.cached_context import clip_contexts, to_cache
from frame_pack.config import FramePackConfig
from frame_pack.context import one_frame_context
from frame_pack.loading import build_transformer, open_transformer
from frame_pack.model import FramePackTransformer
from modules.checkpointing import Checkpointing
from options.flags_fpack_train import FramePackTrainFlags
from options.geometry import VAE_STRIDE
from options.one_frame import OneFrameOptions
from training.networks import open_network
from training.objective import Objective
from training.step import Stepper

WINDOW = 9
NUM_ROWS, NUM_VALID, NUM_PATCHES = 512, 100, 729
"""Rows of a text cache, those that a caption of some length fills, and SigLIP's."""
SECONDS_BETWEEN_LOOKS = 0.05
HEADINGS = ("checkpointed", "s/step", "ratio", "activations", "peak")
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Some steps with one number of checkpointed blocks."""

    num_checkpointed: int
    num_blocks: int
    """Of the model."""
    seconds: float
    """Median of the steps after the first one."""
    activations: int
    """Bytes that the forward pass keeps for the backward pass."""
    peak: int | None
    """Bytes: of the GPU's memory, else of the process's; None where the system does not tell."""


Measure = Callable[[Sequence[str]], Measurement]
"""Measures what a command line asks for."""


# ---- saved tensors ----


class SavedBytes:
    """What autograd has kept since it was entered; each storage counts once, however many tensors look at it."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self._kept: dict[int, torch.UntypedStorage] = {}

    def add(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._kept[storage.data_ptr()] = storage  # kept here too, so that no other one can get its address
        return tensor

    @property
    def total(self) -> int:
        return sum(storage.nbytes() for storage in self._kept.values())


@contextmanager
def saved_bytes(known: Iterable[Tensor]) -> Iterator[SavedBytes]:
    """Counts what a forward pass keeps for the backward pass.

    Args:
        known: what is there anyway and does not count: weights.
    """
    count = SavedBytes(known)
    with torch.autograd.graph.saved_tensors_hooks(count.add, lambda tensor: tensor):
        yield count


# ---- what is trained ----


def write_transformer(path: Path, options: argparse.Namespace) -> None:
    """A checkpoint of random weights, in the type that it will compute in."""
    from safetensors.torch import save_file

    config = config_of(options)
    with torch.device("meta"):
        model = FramePackTransformer(config).to(DTYPES[options.mixed_precision])
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02, generator=generator)
    save_file(model.state_dict(), path)


def batch_of(config: FramePackConfig, options: argparse.Namespace) -> TrainBatch:
    """Random numbers where a cache has latents and states."""
    side, generator = options.size // VAE_STRIDE, torch.Generator().manual_seed(0)

    def item() -> dict[str, Tensor]:
        frames = 1 + 2 * WINDOW if options.section else 1
        latents = torch.randn(1, config.latent_channels, frames, side, side, generator=generator)
        if options.section:
            target, context = latents[:, :, 1 : 1 + WINDOW], clip_contexts(latents, window=WINDOW, f1=False)[0]
        else:
            one_frame = OneFrameOptions(target_index=WINDOW, control_indices=(0,))
            target, context = latents, one_frame_context([latents], [None], one_frame, window=WINDOW, like=latents)
        features = torch.randn(NUM_PATCHES, config.image_width, generator=generator)
        return to_cache(target, context, features, with_history=options.section) | {
            "llama_vec": torch.randn(NUM_ROWS, config.text_width, generator=generator).half(),
            "llama_attention_mask": torch.arange(NUM_ROWS) < NUM_VALID,
            "clip_l_pooler": torch.randn(config.pooled_width, generator=generator).half(),
        }

    rows = [item() for _ in range(options.batch_size)]
    contents = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    keys = tuple(ItemKey(dataset=0, name=f"{number}.safetensors", repeat=0) for number in range(len(rows)))
    return TrainBatch(contents=contents, items=keys, after=Position())


def training_flags(options: argparse.Namespace) -> FramePackTrainFlags:
    """What a user would write."""
    given = ["--dit", options.dit, "--network_module", "networks.lora_framepack", "--learning_rate", "1e-4"]
    given += ["--network_dim", str(options.rank), "--timestep_sampling", "shift", "--discrete_flow_shift", "3"]
    given += ["--checkpoint_blocks", str(options.checkpoint_blocks[0])]
    return flags.parse(FramePackTrainFlags, description="", argv=given)


# ---- measuring ----


def measure(argv: Sequence[str]) -> Measurement:
    """Takes steps in this process, with the first of `--checkpoint_blocks`; no peak but a GPU's."""
    options = parse(argv)
    device, dtype = pick_device(options.device), DTYPES[options.mixed_precision]
    given = training_flags(options)
    architecture = FramePackArchitecture.open(given)
    transformer = architecture.load_transformer(dtype=dtype, device=device)
    num_checkpointed = given.memory.num_checkpointed(transformer.num_blocks)
    transformer.checkpointing = Checkpointing(num_blocks=num_checkpointed)
    network = open_network(given.network, transformer, seed=0).to(device)
    network.compute_in(None if dtype == torch.float32 else dtype)
    network.apply_to(transformer)
    objective = Objective(
        architecture=architecture, transformer=transformer, timesteps=given.timesteps, seed=0, masked=False
    )
    stepper = Stepper(
        given,
        network,
        objective,
        Processes(),
        num_steps=options.steps + 1,
        device=device,
        scales_loss=options.mixed_precision == "fp16",
    )
    batch = batch_of(transformer.config, options)
    weights = [*transformer.parameters(), *network.parameters()]
    with saved_bytes(weights) as kept:
        loss = objective(batch, epoch=0)
    activations = kept.total
    del kept, loss
    seconds = []
    for step in range(1 + options.steps):
        start = time.perf_counter()
        stepper.take([batch], step=step + 1, epoch=step, quantiles=None)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return Measurement(
        num_checkpointed=num_checkpointed,
        num_blocks=transformer.num_blocks,
        seconds=median(seconds[1:]),
        activations=activations,
        peak=torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    )


def measure_alone(argv: Sequence[str]) -> Measurement:
    """The same in a process of its own, whose memory is watched."""
    command = [sys.executable, "-m", "benchmarks.training", "--as_json", *argv]
    said, peak = watched(command, pause=SECONDS_BETWEEN_LOOKS)
    found = Measurement(**json.loads(next(line for line in reversed(said.splitlines()) if line.startswith("{"))))
    return found if found.peak is not None else replace(found, peak=peak.main)


def run_all(options: argparse.Namespace, argv: Sequence[str], measure: Measure) -> list[Measurement]:
    """One for each number of checkpointed blocks.

    Raises:
        UserError: `--dit` is not FramePack's transformer.
    """
    with tempfile.TemporaryDirectory(prefix="training_benchmark_") as folder:
        path = options.dit or str(Path(folder) / "random.safetensors")
        if options.dit is None:
            write_transformer(Path(path), options)
        num_blocks = build_transformer(open_transformer(path)).num_blocks
        numbers = options.checkpoint_blocks or [0, num_blocks // 2, num_blocks]
        turns = tqdm(numbers, desc="training", unit="run")
        return [measure([*argv, "--dit", path, "--checkpoint_blocks", str(number)]) for number in turns]


def table(found: Sequence[Measurement]) -> str:
    """Ratios are to the first one."""
    rows = [HEADINGS]
    for one in found:
        blocks = f"{one.num_checkpointed} of {one.num_blocks}"
        ratio = f"{one.seconds / found[0].seconds:.2f}"
        peak = "not measured" if one.peak is None else _mib(one.peak)
        rows.append((blocks, f"{one.seconds:.3f}", ratio, _mib(one.activations), peak))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dit", help="FramePack's transformer (default: one of random weights)")
    parser.add_argument("--width", type=int, default=256, help=f"of that one, in heads of {HEAD_DIM} (default: 256)")
    parser.add_argument("--double_blocks", type=int, default=2, help="of that one (default: 2)")
    parser.add_argument("--single_blocks", type=int, default=4, help="of that one (default: 4)")
    parser.add_argument("--size", type=int, default=256, help="width and height of the picture (default: 256)")
    parser.add_argument("--section", action="store_true", help=f"a video's section of {WINDOW} latent frames instead")
    parser.add_argument("--batch_size", type=int, default=1, help="(default: 1)")
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA (default: 16)")
    parser.add_argument("--steps", type=int, default=3, help="that are measured, behind one more (default: 3)")
    parser.add_argument(
        "--checkpoint_blocks", type=int, nargs="+", help="numbers to measure (default: none, half of them, all)"
    )
    parser.add_argument("--mixed_precision", choices=tuple(DTYPES), default="no", help="(default: no)")
    parser.add_argument("--device", help="torch device (default: the GPU if there is one)")
    parser.add_argument("--as_json", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    check_sizes(parser, options, "steps", "batch_size", "rank")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints the table."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    if options.as_json:
        return printed(lambda: json.dumps(asdict(measure(argv))))
    return printed(lambda: table(run_all(options, argv, measure_alone)))


if __name__ == "__main__":
    sys.exit(main())
