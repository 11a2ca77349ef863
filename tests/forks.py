"""Work in forks of this process that die at a chosen moment: POSIX only."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable

from tqdm import tqdm


def forked(work: Callable[[Callable[[], None]], int], last_event: int | None) -> int | None:
    """Works in a fork that dies at its `last_event`th call or return: None, or how many there were if it lived.

    Args:
        work: gets what it has to call where the count begins; returns an exit code.
    """
    reading, writing = os.pipe()
    if child := os.fork():
        os.close(writing)
        with open(reading, encoding="utf-8") as pipe:
            answer = pipe.read()
        _, status = os.waitpid(child, 0)
        if os.waitstatus_to_exitcode(status) != (0 if answer else -signal.SIGKILL):
            raise RuntimeError(f"the fork ended with {status}")
        return int(answer) if answer else None
    # Its own lock is shared by all forks, and one that was killed may have held it.
    tqdm.set_lock(threading.RLock())
    num_events = 0

    def count(*_) -> None:
        nonlocal num_events
        if num_events == last_event:
            os.kill(os.getpid(), signal.SIGKILL)
        num_events += 1

    code = work(lambda: sys.setprofile(count))
    sys.setprofile(None)
    os.write(writing, str(num_events).encode())
    os._exit(code)
