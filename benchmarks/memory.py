"""How much memory a process and the processes that it starts hold, looked at from outside while they run."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KIB = 1024
PROC = Path("/proc")
# Places in /proc/PID/stat, counted behind the process's name.
PARENT, PAGES = 1, 21


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Bytes of resident memory, each at its highest; None where the system does not tell."""

    main: int | None
    workers: int | None
    """Of all processes below the main one together. Libraries that they share count for each of them."""


class MemoryWatch:
    """Remembers the most that was seen; who calls `look` decides how often that is."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._main = self._workers = 0
        self._before: set[int] = set()
        self._is_known = False

    def look(self) -> None:
        """Takes one more sample."""
        table = process_table()
        if table is None or self.pid not in table:
            return
        below = descendants(table, self.pid)
        # A process that was just forked still wears its parent's memory; at the second look it has its own.
        workers = sum(table[pid][1] for pid in below & self._before)
        self._main, self._workers = max(self._main, table[self.pid][1]), max(self._workers, workers)
        self._before, self._is_known = below, True

    @property
    def peak(self) -> Peak:
        """Of all samples."""
        return Peak(main=self._main, workers=self._workers) if self._is_known else Peak(main=None, workers=None)


class CommandFailed(RuntimeError):
    """A command that did not end with 0."""

    def __init__(self, command: Sequence[str], code: int, said: str) -> None:
        super().__init__(f"got exit code {code} from {subprocess.list2cmdline(command)}:\n{said}")
        self.said = said


def watched(command: Sequence[str], *, pause: float) -> tuple[str, Peak]:
    """Runs a command in the repository's folder: what it said, and its memory.

    Args:
        pause: seconds between two looks at it.

    Raises:
        CommandFailed: with what it said.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        with subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT) as process:
            watch = MemoryWatch(process.pid)
            try:
                while process.poll() is None:
                    watch.look()
                    time.sleep(pause)
            finally:
                process.kill()
        output.seek(0)
        said = output.read()
    if process.returncode:
        raise CommandFailed(command, process.returncode, said)
    return said, watch.peak


def process_table() -> dict[int, tuple[int, int]] | None:
    """Process id -> (its parent's id, its resident bytes); None on Windows."""
    if PROC.joinpath("self", "stat").is_file():
        return _table_of_proc()
    return _table_of_ps() if os.name == "posix" else None


def descendants(table: dict[int, tuple[int, int]], pid: int) -> set[int]:
    """The processes that `pid` started, and what these started."""
    children = {child for child, (parent, _) in table.items() if parent == pid}
    return children.union(*(descendants(table, child) for child in children))


def _table_of_proc() -> dict[int, tuple[int, int]]:
    table = {}
    for stat in PROC.glob("[0-9]*/stat"):
        try:
            # The name stands in parentheses and may hold spaces and parentheses too.
            fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:  # it ended meanwhile
            continue
        table[int(stat.parent.name)] = (int(fields[PARENT]), int(fields[PAGES]) * os.sysconf("SC_PAGE_SIZE"))
    return table


def _table_of_ps() -> dict[int, tuple[int, int]]:
    listed = subprocess.run(["ps", "-axo", "pid=,ppid=,rss="], capture_output=True, text=True, check=True)
    rows = (map(int, line.split()) for line in listed.stdout.splitlines())
    return {pid: (parent, kib * KIB) for pid, parent, kib in rows}
