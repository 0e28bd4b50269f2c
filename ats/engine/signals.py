"""SIGTERM (a scheduler) and SIGINT (Ctrl-C) end a training after the step that runs, with a checkpoint.

with StopSignals() as stop:
    for ...:
        train_step(...)
        if stop.received: ...   # save, raise Stopped
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ats.errors import Stopped

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopSignals:
    """Within it SIGTERM and SIGINT are remembered instead of ending the process; the second SIGINT ends it at once.

    Attributes:
        received: number of the first signal, 0 before it came.
    """

    def __init__(self) -> None:
        self.received = 0
        self._at_once = ""
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            self._previous = {signum: signal.signal(signum, self._handle) for signum in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    @contextmanager
    def at_once(self, where: str) -> Iterator[None]:
        """Within it nothing has to be finished or saved first: a signal raises `Stopped` where it comes."""
        self._at_once = where
        try:
            if self.received:
                raise Stopped(self.received, where)
            yield
        finally:
            self._at_once = ""

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received and signum == signal.SIGINT:
            os.write(2, b"\nsecond SIGINT: quit without a checkpoint\n")
            os._exit(128 + signal.SIGINT)
        if self.received:
            return
        self.received = signum
        if self._at_once:
            raise Stopped(signum, self._at_once)
        again = ", again to quit at once" if signum == signal.SIGINT else ""
        os.write(2, f"\n{signal.Signals(signum).name}: stopping after this step{again}\n".encode())
