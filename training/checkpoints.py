"""When a run saves, under which names, what is removed for it, and what happens when the disk is full.

    every N epochs      my_lora-000002.safetensors          after epoch 2, but not after the last one
    every N steps       my_lora-step00000100.safetensors
    when interrupted    my_lora-step00000123.safetensors    always with a state
    at the end          my_lora.safetensors

A state is a folder of the same name with `-state` behind it. What is outdated goes when the new file *and* the new
state are in place, so there is a good one at any time.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from options.errors import UserError
from options.flags_saving import SavingFlags
from training.states import remove_state

logger = logging.getLogger(__name__)

FILE, STATE = ".safetensors", "-state"


@dataclass(frozen=True, kw_only=True)
class Save:
    """One occasion of saving."""

    name: str
    """Of the file and of the state, without suffix."""
    has_state: bool
    outdated: str | None = None
    """The name whose file is not kept any longer."""
    outdated_state: str | None = None
    """The name whose state is not kept any longer."""
    is_last: bool = False
    """Whether the run ends with it: then a failure is the run's failure."""

    @property
    def written(self) -> tuple[str, ...]:
        """Names of the file and, if there is one, of the state."""
        return (self.name + FILE, self.name + STATE) if self.has_state else (self.name + FILE,)

    @property
    def removed(self) -> tuple[str, ...]:
        """Names of files and folders that go afterwards."""
        file = () if self.outdated is None else (self.outdated + FILE,)
        return file if self.outdated_state is None else (*file, self.outdated_state + STATE)


@dataclass(frozen=True, kw_only=True)
class SavePlan:
    """The occasions of a run."""

    flags: SavingFlags
    """Checked."""
    num_steps: int
    """Optimizer steps of the whole run."""
    num_epochs: int
    steps_per_epoch: int
    """Optimizer steps of an epoch."""

    def after_step(self, step: int) -> Save | None:
        """What to save when `step` optimizer steps were made."""
        every = self.flags.save_every_n_steps
        if not every or step % every:
            return None
        keep, keep_states = self.flags.save_last_n_steps, self.flags.save_last_n_steps_state
        keep_states = keep if keep_states is None else keep_states
        return Save(
            name=self._step_name(step),
            has_state=self.flags.save_state,
            outdated=self._step_before(step, keep),
            outdated_state=self._step_before(step, keep_states) if self.flags.save_state else None,
        )

    def after_epoch(self, epoch: int) -> Save | None:
        """What to save at the end of `epoch`, from 1."""
        every = self.flags.save_every_n_epochs
        if not every or epoch % every or epoch >= self.num_epochs:
            return None
        keep, keep_states = self.flags.save_last_n_epochs, self.flags.save_last_n_epochs_state
        keep_states = keep if keep_states is None else keep_states
        return Save(
            name=self._epoch_name(epoch),
            has_state=self.flags.save_state,
            outdated=self._epoch_before(epoch, keep),
            outdated_state=self._epoch_before(epoch, keep_states) if self.flags.save_state else None,
        )

    def when_interrupted(self, step: int) -> Save:
        """What to save on Ctrl-C and when the system asks to stop. The state is what makes it worth saving."""
        return Save(name=self._step_name(step), has_state=True, is_last=True)

    def at_end(self) -> Save:
        """What to save when all steps were made."""
        has_state = self.flags.save_state or self.flags.save_state_on_train_end
        return Save(name=self.flags.output_name, has_state=has_state, is_last=True)

    def from_step(self, step: int) -> Iterator[Save]:
        """All occasions of an undisturbed run from a step on, without what was saved at that step."""
        every_step, every_epoch = self.flags.save_every_n_steps, self.flags.save_every_n_epochs
        at_steps = range(every_step, self.num_steps + 1, every_step) if every_step else ()
        at_epochs = range(every_epoch, self.num_epochs, every_epoch) if every_epoch else ()
        saves = [(at, 0, self.after_step(at)) for at in at_steps]
        saves += [(epoch * self.steps_per_epoch, 1, self.after_epoch(epoch)) for epoch in at_epochs]
        for at, _, save in sorted(saves, key=lambda entry: entry[:2]):
            if at > step:
                yield save
        yield self.at_end()

    def bytes_needed(self, folder: Path, *, file_bytes: int, state_bytes: int, step: int = 0) -> int:
        """How much the fullest moment of the run takes beyond what is in `folder` now.

        Args:
            file_bytes: of a LoRA file.
            state_bytes: of a state folder.
            step: what the run goes on from.
        """
        now = fullest = 0
        present = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
        for save in self.from_step(step):
            for name in save.written:
                size = state_bytes if name.endswith(STATE) else file_bytes
                fullest = max(fullest, now + size)  # a new file is written beside the one that it replaces
                now += 0 if name in present else size
            present |= set(save.written)
            gone = present & set(save.removed)
            now -= sum(state_bytes if name.endswith(STATE) else file_bytes for name in gone)
        return fullest

    def _step_name(self, step: int) -> str:
        return f"{self.flags.output_name}-step{step:08d}"

    def _epoch_name(self, epoch: int) -> str:
        return f"{self.flags.output_name}-{epoch:06d}"

    def _step_before(self, step: int, keep: int | None) -> str | None:
        """The save that falls out of the last `keep` steps."""
        if keep is None:
            return None
        old = step - keep - 1
        old -= old % self.flags.save_every_n_steps
        return self._step_name(old) if old > 0 else None

    def _epoch_before(self, epoch: int, keep: int | None) -> str | None:
        """The save that is one too many when `keep` are kept."""
        old = 0 if keep is None else epoch - self.flags.save_every_n_epochs * keep
        return self._epoch_name(old) if old > 0 else None


def check_room(plan: SavePlan, *, file_bytes: int, state_bytes: int, step: int = 0) -> None:
    """Whether the disk has room for what the run will save; arguments as of `SavePlan.bytes_needed`.

    Raises:
        UserError: it has not.
    """
    folder = Path(plan.flags.output_dir).absolute()
    needed = plan.bytes_needed(folder, file_bytes=file_bytes, state_bytes=state_bytes, step=step)
    try:
        free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.is_dir())).free
    except (OSError, StopIteration):
        return  # not every network drive knows
    if free < needed:
        each = f"{_size(file_bytes)} a file, {_size(state_bytes)} a state"
        remedy = "free some, save less often, or keep fewer with --save_last_n_steps and --save_last_n_epochs"
        raise UserError("--output_dir", f"{_size(free)} free in {folder}", f"{_size(needed)} ({each})", remedy)


class Uploads(Protocol):
    """Where copies go."""

    def upload(self, path: Path) -> None:
        """Copies a file or folder, now or later."""

    def settle(self, path: Path) -> None:
        """Returns when nothing reads `path` any longer."""


class CheckpointWriter:
    """Carries out what a plan says, in one process."""

    def __init__(self, folder: str | Path, *, uploads: Uploads | None = None, upload_states: bool = False) -> None:
        self.folder = Path(folder)
        self._uploads, self._upload_states = uploads, upload_states

    def write(self, save: Save, write_file: Callable[[Path], None], write_state: Callable[[Path], None]) -> bool:
        """Saves, uploads, removes what is outdated.

        A full disk in the middle of a run is reported and the run goes on: room can be made before the next occasion.

        Args:
            write_file: writes a LoRA file, whole or not at all.
            write_state: writes a state folder, likewise.

        Returns:
            Whether all was saved. If not, nothing is removed.

        Raises:
            UserError: the run's last save failed.
        """
        try:
            for name in save.written:
                (write_state if name.endswith(STATE) else write_file)(self.folder / name)
                logger.info("saved %s", self.folder / name)
        except Exception as error:
            complaint = _complaint(error, self.folder / name)
            if save.is_last:
                raise complaint from error
            logger.error("%s; training goes on", complaint)
            return False
        if self._uploads is not None:
            for name in save.written if self._upload_states else save.written[:1]:
                self._uploads.upload(self.folder / name)
        for name in save.removed:
            self._remove(self.folder / name)
        return True

    def _remove(self, path: Path) -> None:
        if self._uploads is not None:
            self._uploads.settle(path)
        try:
            if path.name.endswith(STATE):
                remove_state(path)
            elif path.exists():
                path.unlink()
                logger.info("removed %s, which is not kept any longer", path)
        except OSError as error:
            logger.warning("%s cannot be removed (%s)", path, error.strerror)


def _complaint(error: Exception, path: Path) -> UserError:
    """What to tell of a save that failed because of the disk.

    Raises:
        Exception: `error` itself when it is about something else.
    """
    from safetensors import SafetensorError

    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError):
        reason = error.strerror or str(error)
    elif isinstance(error, SafetensorError) and (found := re.search(r"([^:]+) \(os error \d+\)", str(error))):
        reason = found[1].strip()
    else:
        raise error
    remedy = "make room or change --output_dir; what was saved before is intact"
    return UserError("--output_dir", f"{reason} at {path}", "a folder with room that can be written to", remedy)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"
