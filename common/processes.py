"""The processes of one run, as `accelerate launch` or torchrun start them; one process is a run of its own."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from options.errors import UserError, UserErrors

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""How long processes wait for each other: shares are equal in number, not in time, and some videos are long."""


@dataclass(frozen=True, kw_only=True)
class Processes:
    """This process among its siblings."""

    rank: int = 0
    """Its number, from 0."""
    world: int = 1
    """How many there are."""
    local_rank: int = 0
    """Its number on this machine, and with it its GPU's."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, values: Sequence[T]) -> Sequence[T]:
        """This process's part of `values`: every value belongs to exactly one process."""
        return values[self.rank :: self.world]

    def gather(self, value: T) -> list[T]:
        """Everyone's value, by rank, for everyone; waits until all have called it."""
        if self.world == 1:
            return [value]
        import torch.distributed

        values: list[T | None] = [None] * self.world
        torch.distributed.all_gather_object(values, value)
        return values

    def in_main(self, action: Callable[[], T]) -> T:
        """What `action` returns in the first process, for everyone; all of them call it.

        Raises:
            UserError: `action` did. All of them are told, or the others would wait for the first one for ever.
        """
        result, failure = None, None
        if self.is_main:
            try:
                result = action()
            except UserError as error:
                failure = error
        result, told = self.gather((result, failure and str(failure)))[0]
        if told is not None:
            raise failure or UserErrors([told])
        return result

    def device_name(self, given: str | None) -> str | None:
        """What was asked for; else the CPU with `accelerate launch --cpu`; else, of several processes, its own GPU."""
        if given is not None and (given != "cuda" or self.world == 1):
            return given
        if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
            return "cpu"
        if self.world == 1:
            return None
        import torch

        if not torch.cuda.is_available():
            return given
        if self.local_rank >= torch.cuda.device_count():
            got = f"process {self.local_rank + 1} on a machine with {torch.cuda.device_count()} GPUs"
            raise UserError("--num_processes", got, "a GPU for each process", "start fewer, or use --device cpu")
        return f"cuda:{self.local_rank}"


_exit_code: int | None = None


def note_exit_code(code: int) -> None:
    """What `end_process` is to end with."""
    global _exit_code
    _exit_code = code


def end_process() -> None:
    """Ends one of several processes at once, when all else that happens at exit has happened.

    A thread of gloo's may abort a process whose interpreter is being taken down, after everything is done and saved;
    the launcher would take that for a failure. To be registered with `atexit` before other things are.
    """
    if _exit_code is None or hasattr(sys, "last_value"):  # a traceback was printed: its exit code is Python's affair
        return
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(_exit_code)


@contextmanager
def joined_processes(patience: timedelta = PATIENCE) -> Iterator[Processes]:
    """Joins the siblings that the launcher's environment variables tell of.

    Args:
        patience: how long to wait for each other before the run is given up.

    They exchange small Python objects only, so the connection is gloo's, on every system and device.
    """
    world = int(os.environ.get("WORLD_SIZE") or 1)
    if world == 1:
        yield Processes()
        return
    if missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]:
        got, remedy = f"{world}, and no {missing[0]}", "start with accelerate launch, or unset WORLD_SIZE"
        raise UserError("WORLD_SIZE", got, "what a launcher sets", remedy)
    import torch.distributed

    torch.distributed.init_process_group("gloo", timeout=patience)
    try:
        yield Processes(
            rank=torch.distributed.get_rank(), world=world, local_rank=int(os.environ.get("LOCAL_RANK") or 0)
        )
    finally:
        torch.distributed.destroy_process_group()
