"""Where a run's messages go: the console, and `log.txt` in OUTPUT_DIR. Its numbers: `train_log.py`.

Messages at level DEBUG are for `log.txt` alone.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import sys
from pathlib import Path

from tqdm import tqdm

ROOT = logging.getLogger("ats")
logger = logging.getLogger(__name__)


class _ConsoleHandler(logging.Handler):
    """Writes to stderr above a running progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class _Formatter(logging.Formatter):
    """`[time] message`, with the level in front of the message from WARNING on, and the process if not the first."""

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        return f"[{self.formatTime(record, '%m-%d %H:%M:%S')}] {process_prefix()}{level}{record.getMessage()}"


def process_prefix() -> str:
    """What messages of the second process torchrun started (and so on) begin with."""
    rank = os.environ.get("RANK", "0")
    return f"process {rank}: " if rank != "0" else ""


def setup_logging() -> None:
    """Send the package's messages to the console, and keep them until the config tells `log_to_file` its folder.

    Of several processes, the first one speaks for all; the others show warnings only.
    """
    ROOT.setLevel(logging.DEBUG)
    ROOT.handlers.clear()
    console = _ConsoleHandler(logging.WARNING if process_prefix() else logging.INFO)
    console.setFormatter(_Formatter())
    ROOT.addHandler(console)
    ROOT.addHandler(logging.handlers.MemoryHandler(1000, flushLevel=logging.CRITICAL + 1, flushOnClose=False))


def log_to_file(path: Path) -> None:
    """Append the package's messages to this file from now on, those kept since `setup_logging` first."""
    if not ROOT.handlers:
        setup_logging()
    file = logging.FileHandler(path)
    file.setFormatter(_Formatter())
    for handler in ROOT.handlers[1:]:  # what stands behind the console: the memory, or the file of an earlier run
        if isinstance(handler, logging.handlers.MemoryHandler):
            handler.setTarget(file)
            handler.flush()
        ROOT.removeHandler(handler)
        handler.close()
    ROOT.addHandler(file)


def log_plan(plan: dict[str, str]) -> None:
    """Log what is going to run, one aligned line per item."""
    for name, value in plan.items():
        logger.info("%-8s  %s", name, value)
