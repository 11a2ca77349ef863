"""Runs the caching loop with the encoder of the tests in a process of its own: see `test_cache_processes.py`.

python -m tests.cache_driver run DATA.toml MODE LOG       what was encoded goes to LOG.RANK, a name a line
python -m tests.cache_driver kills DATA.toml MODE SEED    caches again and again, killed at moments drawn by SEED
"""

from __future__ import annotations

import logging
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from common.processes import end_process, joined_processes, note_exit_code
from options.errors import UserError
from tests.cache_builders import files, run_loop
from tests.forks import forked

NUM_KILLS = 12


def run(config: Path, mode: str, log: str) -> int:
    with joined_processes() as processes:
        code, encoder = run_loop(config, mode, processes=processes, skip_existing=True)
        Path(f"{log}.{processes.rank}").write_text("\n".join(encoder.encoded), encoding="utf-8")
    return code


def kills(config: Path, mode: str, seed: str) -> int:
    """Prints how many files were there after each kill. Each attempt is a fork, as imports take seconds."""
    from safetensors.torch import load

    cache, choose = config.parent / "cache", random.Random(int(seed))
    run_loop(config, mode)  # what is imported late is there now, so that most moments are not within imports
    shutil.rmtree(cache)
    num_events = cached_in_fork(config, mode, None)
    shutil.rmtree(cache)
    for _ in range(NUM_KILLS):
        if cached_in_fork(config, mode, choose.randrange(num_events)) is not None:
            # It had less to do than the first one, and finished before its moment.
            shutil.rmtree(cache)
        found = {name: content for name, content in files(cache).items() if not name.startswith(".")}
        for content in found.values():
            load(content)
        sys.stdout.write(f"{len(found)} files, {len(files(cache)) - len(found)} temporary\n")
    cached_in_fork(config, mode, None)
    return 0


def cached_in_fork(config: Path, mode: str, last_event: int | None) -> int | None:
    """See `forked`."""

    def work(begin: Callable[[], None]) -> int:
        begin()
        code, _ = run_loop(config, mode, skip_existing=True)
        return code

    return forked(work, last_event)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    what, config, *rest = sys.argv[1:]
    try:
        note_exit_code({"run": run, "kills": kills}[what](Path(config), *rest) or 0)
    except UserError as error:
        sys.stderr.write(f"{error}\n")
        note_exit_code(2)
    end_process()
