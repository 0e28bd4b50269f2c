"""What a run writes to OUTPUT_DIR and the console; one run at a time, with one configuration.

`config.yaml` is the run's configuration and loads unchanged. `log.txt` has its messages (`log_rank1.txt` those of the
second process), including DEBUG messages, which go nowhere else. The running process holds `.lock`. `train_log.py`
writes the numbers.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import logging.handlers
import os
import sys
from pathlib import Path
from typing import IO

import simplejson
from tqdm import tqdm

from ats.config import CfgNode
from ats.config.keys import keys
from ats.config.schema import flatten
from ats.errors import UserError, printable_lines
from ats.files import warn_once
from ats.reduction.plan import default_blocks

ROOT = logging.getLogger("ats")

# What runs write in OUTPUT_DIR, besides checkpoints that come and go.
FILES: tuple[str, ...] = (".lock", "log.txt", "log.jsonl", "config.yaml", "model.safetensors", "result.json")
FILES += ("checkpoints/checkpoint_best.pyth",)
_locks: dict[Path, IO] = {}  # folder -> its lock, held until this process ends


class _ConsoleHandler(logging.Handler):
    """Writes to stderr without breaking a running progress bar.

    If that fails (terminal or reader gone, disk full), it says so once; `log.txt` has the messages too.
    """

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except OSError as error:
            self.setLevel(logging.CRITICAL + 1)  # not removed: this message would then miss the next handler
            ROOT.warning("Nothing more is printed: the console cannot be written to (%s).", error.strerror)


class _FileHandler(logging.FileHandler):
    """Appends to a file. If that fails, e.g. on a full disk, it says so once; the console has the messages too."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        if not isinstance(error, OSError):
            return super().handleError(record)
        with contextlib.suppress(OSError):
            self.close()
        ROOT.removeHandler(self)
        ROOT.warning("%s ends here: %s.", self.baseFilename, error.strerror)


class _Formatter(logging.Formatter):
    """`[time] message`, prefixed with the process (except the first) and with the level from WARNING on."""

    def format(self, record: logging.LogRecord) -> str:
        level = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        message = printable_lines(record.getMessage())
        return f"[{self.formatTime(record, '%m-%d %H:%M:%S')}] {process_prefix()}{level}{message}"


def process_prefix() -> str:
    """`"process 1: "` and so on; "" for the first process that torchrun started."""
    rank = os.environ.get("RANK", "0")
    return f"process {rank}: " if rank != "0" else ""


def setup_logging() -> None:
    """Send the package's messages to the console, and buffer them for the file of `log_to_file`.

    Only the first process prints INFO messages; the others print warnings.
    """
    ROOT.setLevel(logging.DEBUG)
    ROOT.handlers.clear()
    console = _ConsoleHandler(logging.WARNING if process_prefix() else logging.INFO)
    console.setFormatter(_Formatter())
    ROOT.addHandler(console)
    ROOT.addHandler(logging.handlers.MemoryHandler(1000, flushLevel=logging.CRITICAL + 1, flushOnClose=False))


def log_to_file(path: Path) -> None:
    """Append the package's messages to this file from now on, preceded by those buffered since `setup_logging`."""
    if not ROOT.handlers:
        setup_logging()
    file = _FileHandler(path, encoding="utf-8")
    file.setFormatter(_Formatter())
    for handler in ROOT.handlers[1:]:  # after the console: the buffer, or the file of an earlier run
        if isinstance(handler, logging.handlers.MemoryHandler):
            handler.setTarget(file)
            handler.flush()
        ROOT.removeHandler(handler)
        handler.close()
    ROOT.addHandler(file)


def log_plan(plan: dict[str, str]) -> None:
    """Log what the run will do, one aligned line per item."""
    for name, value in plan.items():
        ROOT.info("%-8s  %s", name, value)


def open_output_dir(cfg: CfgNode) -> Path:
    """Create and lock OUTPUT_DIR, start `log.txt` there, and return its path.

    Raises a UserError if another run is using it, or if it cannot be created or written to.
    """
    from ats.engine.device import is_main, rank, wait_for_all  # imports PyTorch, so only once the config is valid

    output_dir = Path(cfg.OUTPUT_DIR)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        for path in (output_dir / name for name in FILES):
            if path.is_dir() or path.is_fifo():  # would end the run after hours, or block it forever
                what = "folder" if path.is_dir() else "FIFO"
                raise UserError(f"{path} is a {what}, but a file goes there. Remove it, or give another OUTPUT_DIR.")
        if is_main():
            _lock(output_dir)
        log_to_file(output_dir / ("log.txt" if is_main() else f"log_rank{rank()}.txt"))
    except OSError as error:
        raise UserError(
            f"OUTPUT_DIR {output_dir} cannot be made or written to: {error.strerror or error}. Type OUTPUT_DIR FOLDER "
            "with a folder you may write to."
        ) from error
    wait_for_all()
    return output_dir


def _lock(folder: Path) -> None:
    folder = folder.resolve()
    if folder in _locks:
        return
    file = open(folder / ".lock", "a+b", buffering=0)  # noqa: SIM115 - stays open as long as the process lives
    try:
        # A POSIX lock ends with its process, even if data workers survive a SIGKILL by some seconds.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            file.seek(0)
            owner = file.read().decode(errors="replace").strip()
            advice = "Stop it, or give this one another OUTPUT_DIR."
            if tasks := [name for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE") if os.environ.get(name)]:
                advice += (
                    f" If srun or mpirun started both ({tasks[0]} is {os.environ[tasks[0]]}), each is a training of "
                    "its own: let it start one torchrun per machine instead, as docs/TRAINING.md says."
                )
            raise UserError(f"{folder} is in use by another run ({owner}). {advice}") from None
        warn_once("%s cannot be locked (%s): make sure that no other run uses it.", folder, error)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}\n".encode())
    _locks[folder] = file


def settings(cfg: CfgNode) -> dict[str, object]:
    """Every setting that can change a result; independent of the machine and of OUTPUT_DIR."""
    machine = {name for name, key in keys().items() if key.machine}
    # ATS.STAGES is newer than the first results: left out if unused, so that their hashes stay valid.
    later = set() if cfg.ATS.STAGES else {"ATS.STAGES"}
    values = {name: value for name, value in flatten(cfg) if name not in machine | later}
    # The default of ATS.BLOCKS used to be a list; now it follows the depth. Same blocks, same hash.
    is_12_deep = cfg.MODEL.NAME in ("ViT", "XViT", "TimeSformer") and cfg.VIT.DEPTH == 12
    if cfg.ATS.BLOCKS is None and (is_12_deep or not cfg.ATS.ENABLE):
        values["ATS.BLOCKS"] = default_blocks(12)
    return values


def config_sha256(cfg: CfgNode) -> str:
    """Hash of `settings`."""
    return hashlib.sha256(simplejson.dumps(settings(cfg), sort_keys=True).encode()).hexdigest()
