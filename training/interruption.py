"""Ctrl-C and the system's request to stop: heard at once, heeded between two optimizer steps."""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGBREAK") if hasattr(signal, name))
SECONDS_OF_ONE_REQUEST = 3.0


class Interruption:
    """Whether a signal came, and which."""

    number: int | None = None
    _since = 0.0

    @property
    def exit_code(self) -> int:
        """As shells count it."""
        return 128 + (self.number or signal.SIGINT)

    def hear(self, number: int, frame: object) -> None:
        if self.number is not None:
            # Launchers pass Ctrl-C on to processes that the terminal has told already, and ask to terminate as well.
            if number == signal.SIGINT and time.monotonic() - self._since > SECONDS_OF_ONE_REQUEST:
                raise KeyboardInterrupt  # whoever asks twice does not want to wait for a step
            return
        self.number, self._since = number, time.monotonic()
        logger.warning("%s: saving after this step; Ctrl-C once more ends at once", signal.Signals(number).name)


@contextmanager
def listening() -> Iterator[Interruption]:
    """Signals are only noted inside; outside of the main thread nobody gets them."""
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption
        return
    before = {number: signal.signal(number, interruption.hear) for number in SIGNALS}
    try:
        yield interruption
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
