"""What a training must remember, and its files in OUTPUT_DIR/checkpoints:

    checkpoint_epoch_00005.pyth                after 5 epochs
    checkpoint_epoch_00005_step_00000120.pyth  after 5 epochs and 120 steps of the sixth
    checkpoint_best.pyth                       the epoch with the best validation accuracy so far

A file has SlowFast's `model_state`, `optimizer_state`, `epoch` (the last finished one, counted from 0) and `cfg` (YAML
text), and `step` (steps done of the next epoch), `scaler_state`, `ema_state` with EMA, `best_top1`, and `log_state`
(what is averaged towards the next line of the log). Random numbers need no place: they follow from (RNG_SEED, epoch,
step), those of a sample from (RNG_SEED, epoch, its place in the order).
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from timm.utils import ModelEmaV3
from torch import nn

from ats.checkpoint import load_checkpoint, load_weights, save_checkpoint
from ats.config import CfgNode, get_cfg
from ats.engine.distributed import from_main, is_main
from ats.engine.output_dir import training_changes
from ats.errors import UserError

logger = logging.getLogger(__name__)

NEEDED = {"model_state", "optimizer_state", "epoch"}


@dataclass
class TrainState:
    """What changes while training.

    epoch: finished epochs; equally the index of the one to train next. step: steps done of that one.
    best_top1: best validation accuracy so far in percent, -1 before the first.
    log_state: `TrainLog.window()` at the last checkpoint.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None = None
    epoch: int = 0
    step: int = 0
    best_top1: float = -1.0
    log_state: dict = field(default_factory=dict)

    @property
    def eval_model(self) -> nn.Module:
        """The model to evaluate and export: the EMA if there is one."""
        return self.model if self.ema is None else self.ema.module

    def checkpoint(self, cfg_text: str) -> dict:
        """Contents of a checkpoint file."""
        contents = {
            "model_state": self.model.state_dict(),
            "optimizer_state": self.optimizer.state_dict(),
            "scaler_state": self.scaler.state_dict(),
            "epoch": self.epoch - 1,
            "step": self.step,
            "best_top1": self.best_top1,
            "log_state": self.log_state,
            "cfg": cfg_text,
        }
        if self.ema is not None:
            contents["ema_state"] = self.ema.module.state_dict()
        return contents

    def restore(self, contents: dict) -> None:
        """Take over the contents of a checkpoint file.

        Raises:
            UserError: it belongs to another model or optimizer.
        """
        load_weights(self.model, contents["model_state"])
        try:
            self.optimizer.load_state_dict(contents["optimizer_state"])
        except ValueError as error:
            raise UserError(f"its optimizer state does not fit SOLVER.OPTIMIZING_METHOD: {error}") from error
        if self.scaler.is_enabled() and contents.get("scaler_state"):
            self.scaler.load_state_dict(contents["scaler_state"])
        if self.ema is not None:
            load_weights(self.ema.module, contents.get("ema_state", contents["model_state"]))
        self.epoch, self.step = contents["epoch"] + 1, contents.get("step", 0)
        self.best_top1, self.log_state = contents.get("best_top1", -1.0), contents.get("log_state", {})


def checkpoint_path(output_dir: Path, epoch: int, step: int = 0) -> Path:
    """File of the checkpoint after `epoch` epochs and `step` steps of the next."""
    in_epoch = f"_step_{step:08d}" if step else ""
    return output_dir / "checkpoints" / f"checkpoint_epoch_{epoch:05d}{in_epoch}.pyth"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint files of a run that can be resumed from, newest first."""
    files = {}
    for path in (output_dir / "checkpoints").glob("checkpoint_epoch_*.pyth"):
        if match := re.fullmatch(r"checkpoint_epoch_(\d+)(?:_step_(\d+))?\.pyth", path.name):
            files[path] = (int(match[1]), int(match[2] or 0))
    return sorted(files, key=files.get, reverse=True)


class Checkpoints:
    """Writes the checkpoints of a run, on process 0, and removes those that are too old.

    Args:
        output_dir: of the run.
        cfg_text: its configuration.
        every_steps, every_minutes: when to write within an epoch; 0: not for this reason.
        keep: how many to keep, besides the best; 0: all.
    """

    def __init__(
        self, output_dir: Path, cfg_text: str, *, every_steps: int = 0, every_minutes: float = 0, keep: int = 0
    ) -> None:
        self.output_dir, self._cfg_text, self._keep = output_dir, cfg_text, keep
        self._every_steps, self._every_seconds = every_steps, 60 * every_minutes
        self._last = time.monotonic()
        if is_main():  # what runs that were killed while writing have left
            for path in (output_dir / "checkpoints").glob(".*.tmp"):
                path.unlink()

    def is_due(self, total_steps: int) -> bool:
        """Whether to write one after `total_steps` steps of the whole training."""
        by_time = self._every_seconds and time.monotonic() - self._last >= self._every_seconds
        return bool(by_time) or (self._every_steps > 0 and total_steps % self._every_steps == 0)

    def save(self, state: TrainState) -> Path:
        """Write the checkpoint of `state`; returns its path.

        Raises:
            UserError: it cannot be written; earlier ones are as they were.
        """
        path = checkpoint_path(self.output_dir, state.epoch, state.step)
        if is_main():
            try:
                save_checkpoint(path, state.checkpoint(self._cfg_text))
            except OSError as error:
                last = newest(self.output_dir)
                raise UserError(
                    f"Cannot write the checkpoint {path}: {error.strerror or error}. The last one is intact: {last}. "
                    "When there is room again, the same command goes on from there."
                ) from error
            for old in list_checkpoints(self.output_dir)[self._keep :] if self._keep else []:
                old.unlink()
        self._last = time.monotonic()
        return path

    def keep_best(self, state: TrainState, top1: float) -> None:
        """Keep the checkpoint of `state` as checkpoint_best.pyth if `top1` is the best so far."""
        if top1 <= state.best_top1:
            return
        state.best_top1 = top1
        path = checkpoint_path(self.output_dir, state.epoch, state.step)
        if is_main() and path.exists():
            best, temporary = path.with_name("checkpoint_best.pyth"), path.with_name(".checkpoint_best.tmp")
            temporary.unlink(missing_ok=True)
            os.link(path, temporary)  # a second name for the same file
            os.replace(temporary, best)


def newest(output_dir: Path) -> str:
    """Name of the newest checkpoint for messages."""
    return str(next(iter(list_checkpoints(output_dir)), "none yet"))


def resume(state: TrainState, output_dir: Path, cfg: CfgNode, *, force: bool = False) -> Path | None:
    """Continue from the newest readable checkpoint of a run; damaged ones are named in a warning and skipped.

    Process 0 reads it for all.

    Args:
        cfg: the configuration now. force: also if the checkpoint's is another.

    Returns:
        Its path, or None if there is none.

    Raises:
        UserError: it belongs to another training, model or optimizer.
    """
    path, contents = from_main(_read_newest(output_dir) if is_main() else None)
    if path is None:
        return None
    advice = "Give another OUTPUT_DIR, or restore the settings."
    if (changes := _changes(cfg, contents)) and not force:
        lines = [f"\n  {key}: {before} there, {now} now" for key, (before, now) in changes.items()]
        listed = "".join(lines[:8]) + (f"\n  and {len(lines) - 8} more settings" if len(lines) > 8 else "")
        raise UserError(
            f"Cannot resume from {path}: it is of another training.{listed}\n{advice} "
            "--force goes on from it with the settings of now."
        )
    try:
        state.restore(contents)
    except UserError as error:
        raise UserError(f"Cannot resume from {path}: {error}\n{advice}") from error
    return path


def _read_newest(output_dir: Path) -> tuple[Path | None, dict]:
    for path in list_checkpoints(output_dir):
        try:
            _check_sums(path)
            contents = load_checkpoint(path)
        except UserError as error:
            logger.warning("Skipped a checkpoint: %s", error)
            continue
        if missing := NEEDED - contents.keys():
            logger.warning("Skipped a checkpoint: %s has no %s.", path, ", ".join(sorted(missing)))
            continue
        return path, contents
    return None, {}


def _check_sums(path: Path) -> None:
    """torch.load reads a file with flipped bits without a word; the zip file it is has check sums."""
    with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as file:
        if file.testzip() is not None:
            raise UserError(f"{path} is damaged: its check sums are wrong.")


def _changes(cfg: CfgNode, contents: dict) -> dict[str, tuple[object, object]]:
    earlier = get_cfg()
    try:
        earlier.merge_from_other_cfg(yaml.safe_load(contents.get("cfg", "")) or {})
    except (UserError, yaml.YAMLError) as error:  # of an older version: whether it fits, the weights will say
        logger.warning("The checkpoint's configuration cannot be compared with this one: %s", error)
        return {}
    return training_changes(cfg, earlier)


def refuse_or_remove(output_dir: Path, *, force: bool) -> None:
    """Before a training that does not resume: no checkpoints of an earlier one may be there.

    Raises:
        UserError: there are, and not `force`, which deletes them.
    """
    old = list_checkpoints(output_dir)
    if old and not force:
        raise UserError(
            f"TRAIN.AUTO_RESUME False, but {output_dir} holds {len(old)} checkpoints of an earlier training, the last "
            f"{old[0].name}. Give another OUTPUT_DIR; --force deletes them."
        )
    for path in old if is_main() else []:
        path.unlink()
