"""State folders: everything that a run needs to go on as if nothing had happened.

    my_lora-step00000100-state/
        network.safetensors     the weights, in the type that they are trained in
        optimizer.pt            scheduler.pt    grad_scaler.pt (fp16 only)
        rng_0.pt …              random generators, a file for each process
        trainer_state.json      counters, place in the data, fingerprint, sizes of the other files

The last one is written when all others have reached the disk: a folder without it, or with a file of another size than
it says, is not complete.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.files import atomic_file, flush_to_disk
from dataset.epochs import Position
from options.errors import UserError
from training.metadata import Session

FORMAT = 1
SEAL = "trainer_state.json"
SEAL_KEYS = {"global_step", "position", "session", "fingerprint", "settings", "extra", "files"}
NETWORK, OPTIMIZER, SCHEDULER, GRAD_SCALER = "network.safetensors", "optimizer.pt", "scheduler.pt", "grad_scaler.pt"
NEW, OLD = ".new", ".old"
"""Behind a folder's name: the one that is being written, and the one that it is about to replace."""
FOREIGN = ("optimizer.bin", "scheduler.bin", "model.safetensors", "pytorch_model.bin", "random_states_0.pkl")
"""What accelerate writes, and with it the trainers that users come from."""
PLAIN = (type(None), bool, int, float, str, bytes, Tensor, torch.nn.Parameter)


@dataclass(frozen=True, kw_only=True)
class RunState:
    """A moment of a run, between two optimizer steps."""

    network: Mapping[str, Tensor]
    """`Network.state_dict()`."""
    optimizer: Mapping[str, object]
    scheduler: Mapping[str, object]
    rng: tuple[Mapping[str, object], ...] = ()
    """`random_state()` of every process, by rank."""
    grad_scaler: Mapping[str, object] | None = None
    global_step: int
    """Optimizer steps that were made."""
    position: Position
    """Where training goes on."""
    session: Session
    fingerprint: Mapping[str, object]
    """JSON; see `resuming.run_fingerprint`."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """JSON; what may change."""
    extra: Mapping[str, object] = field(default_factory=dict)
    """JSON; whatever else the trainer wants back, such as averages."""


# ---- writing ----


def save_state(folder: str | Path, state: RunState) -> None:
    """Writes a state folder, whole or not at all; one that is there is replaced when the new one is complete.

    Raises:
        OSError, SafetensorError: it cannot be written.
        UserError: the optimizer or scheduler keeps something that could not be read back.
    """
    from safetensors.torch import save_file

    pickled = {OPTIMIZER: state.optimizer, SCHEDULER: state.scheduler}
    pickled |= {f"rng_{rank}.pt": generators for rank, generators in enumerate(state.rng)}
    pickled |= {} if state.grad_scaler is None else {GRAD_SCALER: state.grad_scaler}
    plain = {name: _plain(content, name) for name, content in pickled.items()}
    with _replacing(Path(folder)) as new:
        save_file({key: value.detach().cpu().contiguous() for key, value in state.network.items()}, new / NETWORK)
        for name, content in plain.items():
            _write_pickle(new / name, content)
        for file in new.iterdir():
            flush_to_disk(file)
        _write_seal(new, state)


def remove_state(folder: Path) -> None:
    """Removes a state folder and what an interrupted save of it left.

    Raises:
        OSError: a file cannot be removed.
    """
    for place in (folder, _beside(folder, NEW), _beside(folder, OLD)):
        if place.is_dir():
            shutil.rmtree(place)


def _plain(value: object, where: str) -> object:
    """`value` in types that `torch.load` takes with `weights_only`; what it refuses must not be noticed at a resume."""
    if type(value) in PLAIN:
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {_plain(key, where): _plain(inner, f"{where} {key}") for key, inner in value.items()}
    if isinstance(value, list | tuple):
        inner = [_plain(each, where) for each in value]
        return tuple(inner) if isinstance(value, tuple) else inner
    got, expected = f"{type(value).__name__} in {where}", "numbers, texts, tensors, lists and dictionaries"
    raise UserError("--save_state", got, expected, "use another optimizer or scheduler, or save no states")


def _write_pickle(path: Path, content: object) -> None:
    try:
        with path.open("wb") as stream:
            torch.save(content, stream)
    except RuntimeError as error:
        # torch hides a full disk behind a complaint about positions in its archive.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _write_seal(folder: Path, state: RunState) -> None:
    content = {
        "format": FORMAT,
        "global_step": state.global_step,
        "position": state.position.as_dict(),
        "session": state.session.as_dict(),
        "fingerprint": state.fingerprint,
        "settings": state.settings,
        "extra": state.extra,
        "files": {file.name: file.stat().st_size for file in sorted(folder.iterdir())},
    }
    with atomic_file(folder / SEAL) as temporary:
        temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`, which takes its place when the block ends well."""
    new = _beside(folder, NEW)
    if is_complete(new):  # a process was killed just before it renamed this one
        _put_in_place(new, folder)
    if new.exists():
        shutil.rmtree(new)
    new.mkdir(parents=True)
    try:
        yield new
        _put_in_place(new, folder)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise


def _put_in_place(new: Path, folder: Path) -> None:
    """Renames `new` to `folder`; the one that is there steps aside, and comes back if that fails."""
    old = _beside(folder, OLD)
    if folder.exists():
        if old.exists():
            shutil.rmtree(old)
        folder.rename(old)
    try:
        new.rename(folder)
    except BaseException:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _beside(folder: Path, mark: str) -> Path:
    return folder.with_name(folder.name + mark)


# ---- reading ----


def check_state(folder: str | Path, expected: Mapping[str, object]) -> None:
    """Raises what `load_state` would raise, short of damage in a file's inside: to be called before weights load."""
    _read_seal(Path(folder), expected)


def load_state(folder: str | Path, expected: Mapping[str, object]) -> RunState:
    """Everything that `save_state` was given, on the CPU.

    Args:
        expected: this run's fingerprint.

    Raises:
        UserError: no state, an incomplete or damaged one, another trainer's, or another run's; then all settings of the
            fingerprint that differ are named.
    """
    from safetensors.torch import load

    folder = Path(folder)
    seal = _read_seal(folder, expected)
    files = seal["files"]
    num_processes = sum(name.startswith("rng_") for name in files)
    with _reading(folder):
        return RunState(
            network=load((folder / NETWORK).read_bytes()),
            optimizer=_read_pickle(folder / OPTIMIZER),
            scheduler=_read_pickle(folder / SCHEDULER),
            rng=tuple(_read_pickle(folder / f"rng_{rank}.pt") for rank in range(num_processes)),
            grad_scaler=_read_pickle(folder / GRAD_SCALER) if GRAD_SCALER in files else None,
            global_step=seal["global_step"],
            position=Position.from_dict(seal["position"]),
            session=Session.from_dict(seal["session"]),
            **{name: seal[name] for name in ("fingerprint", "settings", "extra")},
        )


def state_step(folder: Path) -> int:
    """The step of a complete state.

    Raises:
        UserError: it is none.
    """
    return _read_seal(folder)["global_step"]


def recorded_fingerprint(folder: Path) -> dict[str, object]:
    """The fingerprint of a complete state's run.

    Raises:
        UserError: it is none.
    """
    return _read_seal(folder)["fingerprint"]


def is_complete(folder: Path) -> bool:
    """Whether a folder is a state that can be read."""
    try:
        _read_seal(folder)
    except UserError:
        return False
    return True


def as_json(value: Mapping[str, object]) -> dict[str, object]:
    """As it comes back from a file: tuples are lists then."""
    return json.loads(json.dumps(value))


def _read_seal(folder: Path, expected: Mapping[str, object] | None = None) -> dict[str, object]:
    """The small part of a state, once it is clear that all files are there and, if asked, that it is the same run's."""
    if not (folder / SEAL).is_file():
        raise _no_state(folder)
    with _reading(folder):
        seal = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        if not isinstance(seal, dict) or "format" not in seal:
            raise ValueError(f"{SEAL} is not ours")
        if seal["format"] == FORMAT and (missing := SEAL_KEYS - seal.keys()):
            raise ValueError(f"{SEAL} has no {min(missing)}")
    if seal["format"] != FORMAT:
        remedy = "use the version that it was saved with"
        raise UserError("--resume", f"{folder}, a state of format {seal['format']}", f"format {FORMAT}", remedy)
    for name, num_bytes in seal["files"].items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != num_bytes:
            got = f"{folder}, where {name} {'is missing' if found is None else f'has {found} bytes'}"
            raise UserError("--resume", got, f"{num_bytes} bytes", "the state is incomplete: give another")
    if expected is not None:
        _check_fingerprint(folder, seal["fingerprint"], as_json(expected))
    return seal


def _no_state(folder: Path) -> UserError:
    if folder.is_file():
        return UserError("--resume", folder, "a state folder", "go on from a LoRA file with --network_weights")
    if not folder.is_dir():
        return UserError("--resume", folder, "a state folder", "there is no such folder")
    if foreign := [name for name in FOREIGN if (folder / name).exists()]:
        got = f"{folder}, a state of another trainer (with {foreign[0]}, without {SEAL})"
        remedy = "its counters cannot be continued: start anew with --network_weights and its LoRA file"
        return UserError("--resume", got, "a state of this one", remedy)
    remedy = "give a folder whose name ends in -state"
    return UserError("--resume", f"{folder}, which has no {SEAL}", "a complete state folder", remedy)


def _check_fingerprint(folder: Path, stored: Mapping[str, object], expected: Mapping[str, object]) -> None:
    differing = [name for name in expected if stored.get(name) != expected[name]]
    if differing:
        was = ", ".join(f"{name} {stored.get(name, 'unknown')}" for name in differing)
        now = ", ".join(f"{name} {expected[name]}" for name in differing)
        remedy = "give the same as then, or start anew with --network_weights and the LoRA file of that run"
        raise UserError("--resume", f"{folder}, of a run with {was}", f"a run with {now}, as this one", remedy)


def _read_pickle(path: Path) -> dict[str, object]:
    return torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise UserError(
            "--resume", f"{folder}, which is damaged ({reason})", "a whole state", "give another"
        ) from error
