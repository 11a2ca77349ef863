"""Whole training runs for tests: a small model, a data set with caches, command lines, processes of their own.

python -m tests.training_driver kills RUN.json SEED     a run that is killed and resumed again and again
python -m tests.training_driver ctrl_c RUN.json         a run that gets Ctrl-C while its workers start
python -m tests.training_driver together RUNS.json      runs one after the other, in one of several processes

RUN.json holds a command line, RUNS.json {name: command line}. One that begins with "signalled N" is asked to stop
after step N, by a signal to the last process only.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import DataLoader

import fpack_train_network
from common.processes import joined_processes, note_exit_code
from tests.forks import forked
from tests.training_builders import Contents, one_frame_item, write_data_set, write_transformer
from training.checkpoints import CheckpointWriter
from training.resuming import newest_state, remove_leftovers
from training.states import state_step
from training.step import Stepper

NAME = "学び"
CLOCK = {"SOURCE_DATE_EPOCH": "1700000000"}
NUM_KILLS = 8
HARD = {
    "max_train_epochs": 3,
    "gradient_accumulation_steps": 2,
    "network_dropout": 0.3,
    "network_args": ("rank_dropout=0.2", "module_dropout=0.1", "loraplus_lr_ratio=4"),
    "timestep_sampling": "shift",
    "discrete_flow_shift": 3.0,
    "num_timestep_buckets": 4,
}
"""Three epochs of three steps: two of two batches, and one of the batch that is left, which has one item."""


# ---- what is trained, and how ----


@dataclass(frozen=True, kw_only=True)
class Workshop:
    """What runs of a test file share."""

    folder: Path
    dit: Path
    data: Path
    """Three items with texts of unequal lengths, three times each, in batches of two: five batches in an epoch."""

    def command(self, output: Path, **changes: object) -> list[str]:
        """A command line; True is a switch, None leaves a flag out, a tuple gives several values."""
        flags: dict[str, object] = {"dit": self.dit, "dataset_config": self.data, "output_dir": output}
        flags |= {"output_name": NAME, "network_module": "networks.lora_framepack", "network_dim": 3, "seed": 3}
        flags |= {"device": "cpu", "max_data_loader_n_workers": 0, "learning_rate": 0.01, "max_train_steps": 6}
        argv: list[str] = []
        for name, value in (flags | changes).items():
            if value is not None and value is not False:
                values = () if value is True else value if isinstance(value, tuple) else (value,)
                argv += [f"--{name}", *map(str, values)]
        return argv


def item(number: int) -> Contents:
    """One-frame, another one for each number, with a text of its own length."""
    options = "target_index=9,control_index=0,no_2x,no_4x"
    return one_frame_item(number, options, num_controls=1, length=2 + 2 * number)


def write_workshop(folder: Path) -> Workshop:
    data = write_data_set(folder / "データ", {name: item(i) for i, name in enumerate(("a", "猫", "c"))}, batch_size=2)
    add_keys(data, "num_repeats = 3")
    return Workshop(folder=folder, dit=write_transformer(folder / "変換器.safetensors"), data=data)


def add_keys(data: Path, *lines: str) -> Path:
    """Adds keys to the last table of a data set file."""
    data.write_text("\n".join([data.read_text(encoding="utf-8"), *lines, ""]), encoding="utf-8")
    return data


def spoil(data: Path, name: str) -> Callable[[], None]:
    """Makes an item's cached latents NaN; call the result to make them good again."""
    (cache,) = data.parent.glob(f"cache/{name}_*_fp.safetensors")
    tensors, said = load_file(cache), metadata(cache)
    key = next(key for key in tensors if key.startswith("latents_1x"))
    save_file(tensors | {key: torch.full_like(tensors[key], torch.nan)}, cache, said)
    return lambda: save_file(tensors, cache, said)


def metadata(file: Path) -> dict[str, str]:
    """Of a safetensors file."""
    with safe_open(str(file), framework="pt") as opened:
        return opened.metadata()


def ups(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What training has made of zeros."""
    return {name: tensor for name, tensor in tensors.items() if "lora_up" in name}


def finite(tensors: dict[str, Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def names_in(folder: Path) -> set[str]:
    return {path.name.removeprefix(NAME).removesuffix(".safetensors") for path in folder.iterdir()}


def recorded(folder: Path, name: str = "-state") -> dict:
    """What a state says."""
    return json.loads((folder / f"{NAME}{name}" / "trainer_state.json").read_text(encoding="utf-8"))


@contextmanager
def repeatable() -> Iterator[None]:
    """Equal runs give equal bytes inside: the clock stands still, and sums have one order."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with patch.dict(os.environ, CLOCK):
            yield
    finally:
        torch.set_num_threads(num_threads)


def train(command: Sequence[str]) -> int:
    """The exit code."""
    return fpack_train_network.main(list(command))


def trained(command: Sequence[str]) -> dict[str, Tensor]:
    """What the file holds of a run that ends well."""
    assert train(command) == 0
    return load_file(final_file(command))


def final_file(command: Sequence[str]) -> Path:
    return output_of(command) / f"{NAME}.safetensors"


def output_of(command: Sequence[str]) -> Path:
    return Path(command[list(command).index("--output_dir") + 1])


@contextmanager
def after_step(number: int | None, act: Callable[[], None]) -> Iterator[None]:
    """Does something when step `number` is taken, before anything is saved."""
    take = Stepper.take

    def take_and_act(self, group, *, step, **rest):
        result = take(self, group, step=step, **rest)
        if step == number:
            act()
        return result

    with patch.object(Stepper, "take", take_and_act):
        yield


# ---- in processes of their own ----


def kills(run: Path, seed: str) -> int:
    """Prints, for each kill, the step of the newest state. Each attempt is a fork, as imports take seconds."""
    command, choose = json.loads(run.read_text(encoding="utf-8")), random.Random(int(seed))
    output = output_of(command)
    num_events, undisturbed = whole(command)
    before = 0
    for _ in range(NUM_KILLS):
        if trained_in_fork(command, choose.randrange(num_events)) is not None:
            # It had less to do than the first one, and finished before its moment.
            if final_file(command).read_bytes() != undisturbed:
                raise RuntimeError("a run that was killed before ended with other bytes")
            shutil.rmtree(output)
            before = 0
        state = newest_state(output, NAME)
        step = state_step(state) if state else 0
        if step < before:
            raise RuntimeError(f"step {step} after step {before}: a state was lost")
        for file in output.glob(f"{NAME}*.safetensors") if output.is_dir() else ():
            load_file(file)
        sys.stdout.write(f"{step}\n")
        before = step
    trained_in_fork(command, None)
    return int(final_file(command).read_bytes() != undisturbed)


def whole(command: Sequence[str]) -> tuple[int, bytes]:
    """How many events an undisturbed run has, and what it ends with."""
    train(command)  # what is imported late is there now, so that most moments are not within imports
    undisturbed = final_file(command).read_bytes()
    shutil.rmtree(output_of(command))
    num_events = trained_in_fork(command, None)
    shutil.rmtree(output_of(command))
    return num_events, undisturbed


def trained_in_fork(command: Sequence[str], last_event: int | None) -> int | None:
    """See `forked`."""

    def work(begin: Callable[[], None]) -> int:
        def begin_and_remove(*arguments, **rest) -> None:
            begin()
            remove_leftovers(*arguments, **rest)

        with patch("training.trainer.remove_leftovers", begin_and_remove):  # the first that is done to the folder
            return train(command)

    return forked(work, last_event)


def ctrl_c(run: Path) -> int:
    """As a terminal does it: to all processes of the group."""
    start = DataLoader.__iter__

    def start_and_interrupt(self):
        threading.Timer(0.2, os.killpg, (0, signal.SIGINT)).start()  # workers import for longer than that
        return start(self)

    with patch.object(DataLoader, "__iter__", start_and_interrupt):
        return train(json.loads(run.read_text(encoding="utf-8")))


def together(runs: Path) -> int:
    """Leaves a file for each process: how many there are, exit codes, and what this one wrote."""
    codes, written, write = {}, [], CheckpointWriter.write

    def write_and_tell(self, save, *rest):
        written.extend(save.written)
        return write(self, save, *rest)

    # One process joins and leaves the others once.
    with joined_processes(timedelta(minutes=2)) as processes, patch.object(CheckpointWriter, "write", write_and_tell):
        is_last = processes.rank == processes.world - 1
        for name, command in json.loads(runs.read_text(encoding="utf-8")).items():
            stop = int(command.pop(0).split()[1]) if command[0].startswith("signalled") else None
            with (
                patch("training.session.joined_processes", lambda *_: nullcontext(processes)),
                after_step(stop if is_last else None, lambda: signal.raise_signal(signal.SIGTERM)),
            ):
                codes[name] = train(command)
        told = {"world": processes.world, "codes": codes, "written": written}
        runs.with_suffix(f".{processes.rank}.json").write_text(json.dumps(told), encoding="utf-8")
    note_exit_code(0)  # not the last run's: some are meant to fail
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    what, file, *rest = sys.argv[1:]
    sys.exit({"kills": kills, "ctrl_c": ctrl_c, "together": together}[what](Path(file), *rest))
