"""OUTPUT_DIR: one run at a time, and one configuration.

`config.yaml` is the configuration of the run, `log.txt` its messages (`log_rank1.txt` those of the second process), and
`.lock` is held by the process that runs.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
from pathlib import Path
from typing import IO

import simplejson

from ats.config import CfgNode
from ats.config.schema import flatten
from ats.engine.distributed import is_main, rank, wait_for_all
from ats.engine.logging import log_to_file
from ats.errors import UserError

logger = logging.getLogger(__name__)

# Keys that say where and how a run is carried out, not what it computes.
MACHINE_KEYS = {
    "OUTPUT_DIR",
    "DEVICE",
    "DIST_TIMEOUT_MINUTES",
    "LOG_PERIOD",
    "TENSORBOARD.ENABLE",
    "TENSORBOARD.NUM_IMAGES",
    "DATA.PATH_TO_DATA_DIR",
    "DATA.PATH_PREFIX",
    "DATA_LOADER.NUM_WORKERS",
    "DATA_LOADER.PIN_MEMORY",
    "TRAIN.AUTO_RESUME",
    "TRAIN.CHECKPOINT_PERIOD",
    "TRAIN.CHECKPOINT_STEPS",
    "TRAIN.CHECKPOINT_MINUTES",
    "TRAIN.CHECKPOINT_KEEP",
    "TRAIN.CHECKPOINT_FILE_PATH",
    "TEST.CHECKPOINT_FILE_PATH",
}
# Keys that may change while a training is interrupted: they change none of its weights.
FREE_KEYS = {"TRAIN.EVAL_PERIOD", "TRAIN.GRAD_ACCUM_STEPS", "DATA.MAX_BAD_FRACTION"}

_locks: dict[Path, IO] = {}  # of the folders this process holds, until it ends


def open_output_dir(cfg: CfgNode) -> Path:
    """Create and lock OUTPUT_DIR and begin `log.txt` there; returns its path.

    Raises:
        UserError: another run is using it, or it cannot be made or written to.
    """
    output_dir = Path(cfg.OUTPUT_DIR).expanduser()
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if is_main():
            _lock(output_dir)
        log_to_file(output_dir / ("log.txt" if is_main() else f"log_rank{rank()}.txt"))
    except OSError as error:
        raise UserError(
            f"OUTPUT_DIR {output_dir} cannot be made or written to: {error.strerror or error}. Type OUTPUT_DIR FOLDER, "
            "one where you may write."
        ) from error
    wait_for_all()
    return output_dir


def write_config(cfg: CfgNode, output_dir: Path) -> None:
    """Write OUTPUT_DIR/config.yaml, which loads as it is."""
    if is_main():
        (output_dir / "config.yaml").write_text(cfg.dump())


def _lock(folder: Path) -> None:
    folder = folder.resolve()
    if folder in _locks:
        return
    file = open(folder / ".lock", "a+")  # noqa: SIM115 - open as long as the process lives
    try:
        # POSIX locks go with their process, even if its data workers live on for some seconds after a SIGKILL.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip()
        raise UserError(
            f"{folder} is in use by another run ({owner}). Stop it, or give this one another OUTPUT_DIR."
        ) from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
    file.flush()
    _locks[folder] = file


def settings(cfg: CfgNode) -> dict[str, object]:
    """Every setting that can change a result: the same on every machine and for every OUTPUT_DIR."""
    return {key: value for key, value in flatten(cfg) if key not in MACHINE_KEYS}


def config_sha256(cfg: CfgNode) -> str:
    """Hash of `settings`."""
    return hashlib.sha256(simplejson.dumps(settings(cfg), sort_keys=True).encode()).hexdigest()


def training_changes(cfg: CfgNode, earlier: CfgNode) -> dict[str, tuple[object, object]]:
    """Key -> (earlier value, value now) of every setting that makes `cfg` another training than `earlier`."""
    before, now = settings(earlier), settings(cfg)
    keys = [k for k in now if k not in FREE_KEYS and not k.startswith(("TEST.", "TRAIN.ENABLE"))]
    return {key: (before.get(key), now[key]) for key in keys if before.get(key) != now[key]}
