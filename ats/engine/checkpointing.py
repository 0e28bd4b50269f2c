"""What a training must remember, and its checkpoints: OUTPUT_DIR/checkpoints/checkpoint_epoch_00005.pyth after epoch 5.

A checkpoint has SlowFast's `model_state`, `optimizer_state`, `epoch` (the last finished one, counted from 0) and `cfg`
(YAML text), and `scaler_state` and, with EMA, `ema_state`. Random numbers need no place: they follow from (RNG_SEED,
epoch, step).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.utils import ModelEmaV3
from torch import nn

from ats.checkpoint import load_checkpoint, load_weights, save_checkpoint
from ats.errors import UserError

logger = logging.getLogger(__name__)

NEEDED = {"model_state", "optimizer_state", "epoch"}


@dataclass
class TrainState:
    """What changes while training.

    epoch: finished epochs; equally the index of the one to train next.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None = None
    epoch: int = 0

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
        self.epoch = contents["epoch"] + 1


def checkpoint_path(output_dir: Path, epoch: int) -> Path:
    """File of the checkpoint after `epoch` epochs."""
    return output_dir / "checkpoints" / f"checkpoint_epoch_{epoch:05d}.pyth"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint files of a run, newest first."""
    return sorted((output_dir / "checkpoints").glob("checkpoint_epoch_*.pyth"), reverse=True)


def save(state: TrainState, output_dir: Path, cfg_text: str) -> Path:
    """Write the checkpoint of the epochs done so far; returns its path."""
    path = checkpoint_path(output_dir, state.epoch)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, state.checkpoint(cfg_text))
    return path


def resume(state: TrainState, output_dir: Path) -> Path | None:
    """Continue from the newest readable checkpoint of a run; damaged ones are named in a warning and skipped.

    Returns:
        Its path, or None if there is none.

    Raises:
        UserError: it belongs to another model or optimizer.
    """
    for path in list_checkpoints(output_dir):
        try:
            contents = load_checkpoint(path)
        except UserError as error:
            logger.warning("Skipped a checkpoint: %s", error)
            continue
        if missing := NEEDED - contents.keys():
            logger.warning("Skipped a checkpoint: %s has no %s.", path, ", ".join(sorted(missing)))
            continue
        try:
            state.restore(contents)
        except UserError as error:
            raise UserError(
                f"Cannot resume from {path}: {error}\nIf the settings have changed, give another OUTPUT_DIR "
                "or TRAIN.AUTO_RESUME False."
            ) from error
        return path
    return None
