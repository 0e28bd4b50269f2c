"""The state of a training run, and its checkpoints in OUTPUT_DIR/checkpoints:

    checkpoint_epoch_00005.pyth                after 5 epochs
    checkpoint_epoch_00005_step_00000120.pyth  after 5 epochs and 120 steps of the sixth
    checkpoint_best.pyth                       the epoch with the best validation accuracy so far

A file holds SlowFast's `model_state`, `optimizer_state`, `epoch` (the last finished one, counted from 0) and `cfg`
(YAML text), plus `step` (steps done in the next epoch), `sizes` (of data, batch and epoch), `scaler_state`,
`ema_state` (with EMA), `best_top1`, `log_state` (the running averages of the next log line) and `cpu_kernels` (the
kernels chosen on this CPU; others would round differently). Random states are not saved: a step's random numbers
depend only on (RNG_SEED, epoch, step), a sample's only on (RNG_SEED, epoch, its place in the order).
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.utils import ModelEmaV3
from torch import nn

from ats.checkpoint import load_checkpoint, load_weights, save_checkpoint
from ats.config import CfgNode, get_cfg
from ats.config.key import typed
from ats.config.keys import keys
from ats.engine.device import broadcast, is_main
from ats.engine.output import settings
from ats.errors import UserError
from ats.files import link
from ats.kernels import cpu

logger = logging.getLogger(__name__)

PATTERN = re.compile(r"checkpoint_epoch_(\d+)(?:_step_(\d+))?\.pyth")


@dataclass
class TrainState:
    """Everything that changes during training."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    ema: ModelEmaV3 | None = None
    epoch: int = 0  # number of finished epochs, which is also the index of the current one
    step: int = 0  # steps done in the current epoch
    best_top1: float = -1.0  # best validation accuracy so far, in percent; -1 before the first evaluation
    log_state: dict = field(default_factory=dict)  # state of the log and of the bad-file count at the last checkpoint
    sizes: dict[str, int] = field(default_factory=dict)  # sizes of data, batch and epoch that `step` refers to

    @property
    def eval_model(self) -> nn.Module:
        """The model to evaluate and export: the EMA if there is one."""
        return self.model if self.ema is None else self.ema.module

    def checkpoint(self) -> dict:
        """The contents of a checkpoint file, without `cfg`."""
        contents: dict[str, Any] = {"model_state": self.model.state_dict()}
        contents |= {"optimizer_state": self.optimizer.state_dict(), "scaler_state": self.scaler.state_dict()}
        contents |= {"epoch": self.epoch - 1, "step": self.step}
        contents |= {"best_top1": self.best_top1, "log_state": self.log_state, "sizes": self.sizes}
        contents["cpu_kernels"] = cpu.choices()
        return contents if self.ema is None else contents | {"ema_state": self.ema.module.state_dict()}

    def restore(self, contents: dict) -> None:
        """Load the contents of a checkpoint file that passed `_misfit`."""
        load_weights(self.model, contents["model_state"])
        own = [dict(group) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(contents["optimizer_state"])
        for group, set_by_cfg in zip(self.optimizer.param_groups, own, strict=True):
            # load_state_dict restores the old settings, but --force may have changed them.
            names = {"weight_decay", "momentum", "lr_scale"} & set_by_cfg.keys()
            group.update({name: set_by_cfg[name] for name in names})
        if self.scaler.is_enabled() and contents.get("scaler_state"):
            self.scaler.load_state_dict(contents["scaler_state"])
        if self.ema is not None:
            load_weights(self.ema.module, contents.get("ema_state", contents["model_state"]))
        self.epoch, self.step = contents["epoch"] + 1, contents.get("step", 0)
        self.best_top1, self.log_state = contents.get("best_top1", -1.0), contents.get("log_state", {})
        self.sizes = contents.get("sizes", {})
        cpu.restore(contents.get("cpu_kernels", []))


def checkpoint_path(output_dir: Path, epoch: int, step: int = 0) -> Path:
    """Path of the checkpoint after `epoch` epochs and `step` steps of the next one."""
    in_epoch = f"_step_{step:08d}" if step else ""
    return output_dir / "checkpoints" / f"checkpoint_epoch_{epoch:05d}{in_epoch}.pyth"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints that a run can resume from, newest first."""
    files = {path: PATTERN.fullmatch(path.name) for path in (output_dir / "checkpoints").glob("*.pyth")}
    places = {path: (int(match[1]), int(match[2] or 0)) for path, match in files.items() if match}
    return sorted(places, key=places.__getitem__, reverse=True)


def newest_checkpoint(output_dir: Path) -> str:
    """Path of the newest checkpoint, for messages."""
    return str(next(iter(list_checkpoints(output_dir)), "none yet"))


class Checkpoints:
    """Writes a run's checkpoints on process 0, following `TRAIN.CHECKPOINT_*`, and deletes old ones."""

    def __init__(self, output_dir: Path, cfg: CfgNode) -> None:
        self._output_dir, self._settings, self._cfg_text = output_dir, cfg.TRAIN, cfg.dump()
        self._last_save = time.monotonic()
        if is_main():
            (output_dir / "checkpoints").mkdir(exist_ok=True)  # fail now rather than after hours
            # Left by runs that were killed while saving.
            for path in (output_dir / "checkpoints").glob(".*.tmp"):
                path.unlink()

    def is_due(self, steps_done: int) -> bool:
        """Whether to save now, in mid-epoch, `steps_done` steps after the start of training."""
        seconds, steps = 60 * self._settings.CHECKPOINT_MINUTES, self._settings.CHECKPOINT_STEPS
        by_time = seconds > 0 and time.monotonic() - self._last_save >= seconds
        return by_time or (steps > 0 and steps_done % steps == 0)

    def save(self, state: TrainState) -> None:
        """Write the checkpoint of `state` and delete outdated ones.

        Raises a UserError if the file cannot be written; earlier checkpoints are then intact.
        """
        if is_main():
            path = checkpoint_path(self._output_dir, state.epoch, state.step)
            try:
                save_checkpoint(path, state.checkpoint() | {"cfg": self._cfg_text})
            except OSError as error:
                raise UserError(
                    f"Cannot write the checkpoint {path}: {error.strerror or error}. "
                    f"The last one is intact: {newest_checkpoint(self._output_dir)}. "
                    "Make room and run the same command to resume from it."
                ) from error
            saved, keep = list_checkpoints(self._output_dir), self._settings.CHECKPOINT_KEEP
            # Later ones are damaged, or counted in batches of another size: the next run must not resume from them.
            later, saved = saved[: saved.index(path)], saved[saved.index(path) :]
            for old in later + (saved[keep:] if keep else []):
                old.unlink()
        self._last_save = time.monotonic()

    def keep_best(self, state: TrainState, top1: float) -> None:
        """Keep the checkpoint of `state` as checkpoint_best.pyth if `top1` is the best so far."""
        if top1 <= state.best_top1:
            return
        state.best_top1 = top1
        path = checkpoint_path(self._output_dir, state.epoch, state.step)
        if is_main() and path.exists():
            link(path, path.with_name("checkpoint_best.pyth"))


def resume(state: TrainState, output_dir: Path, cfg: CfgNode, *, force: bool = False) -> Path | None:
    """Load the newest readable checkpoint into `state` and return its path; None if there is none.

    Skips damaged ones with a warning. Process 0 reads the file and broadcasts it. Without TRAIN.AUTO_RESUME, nothing is
    loaded and there must be no checkpoints.

    Args:
        force: accept a checkpoint of another configuration; without TRAIN.AUTO_RESUME, delete the checkpoints.

    Raises:
        UserError: the checkpoint belongs to another training, model or optimizer; or there are checkpoints but
            TRAIN.AUTO_RESUME is False.
    """
    if not cfg.TRAIN.AUTO_RESUME:
        if (old := list_checkpoints(output_dir)) and not force:
            raise UserError(
                f"TRAIN.AUTO_RESUME False, but {output_dir} holds {len(old)} checkpoints of an earlier training, the "
                f"last {old[0].name}. Give another OUTPUT_DIR; --force deletes them."
            )
        for path in old if is_main() else []:
            path.unlink()
        return None
    path, contents = broadcast(_read_newest(output_dir) if is_main() else None)
    if path is None:
        return None
    changes = _changes(cfg, contents)
    lines = [f"\n  {key}: {before} there, {now} now" for key, (before, now) in changes.items()]
    listed = "".join(lines[:8]) + (f"\n  and {len(lines) - 8} more settings" if len(lines) > 8 else "")
    if changes and not force:
        raise UserError(
            f"Cannot resume from {path}: it belongs to another training.{listed}\nTo start over, delete {path.parent} "
            "or give another OUTPUT_DIR; or restore the settings. --force resumes from it with the new settings."
        )
    if misfit := _misfit(state, contents, changes):
        reason, causes, start = misfit
        put_back = typed({key: changes[key][0] for key in causes if key in changes})
        advice = [f"put back {put_back}"] if put_back else []
        if start is not None:
            weights = f"OUTPUT_DIR FOLDER TRAIN.CHECKPOINT_FILE_PATH {path}{start}"
            advice.append(f"to start a new training from its weights, type {weights}")
        advised = " or, ".join(advice) or "give another OUTPUT_DIR"
        raise UserError(f"Cannot resume from {path}: {reason}. {advised[0].upper()}{advised[1:]}.")
    # Checkpoints of earlier versions lack the sizes.
    batch_size, _ = changes.get("TRAIN.BATCH_SIZE", (cfg.TRAIN.BATCH_SIZE, None))
    state.restore({"sizes": {"batch_size": batch_size}} | contents)
    if changes and is_main():
        logger.warning("%s was saved with other settings; the new ones apply from now on.%s", path, listed)
    return path


def _misfit(
    state: TrainState, contents: dict, changes: dict[str, tuple[Any, Any]]
) -> tuple[str, list[str], str | None] | None:
    """Why `state` cannot resume from a checkpoint, which changed keys may be the cause, and what else to type to start
    from its weights (None if they do not fit either). Returns None if it can resume.
    """
    there = {key: tuple(value.shape) for key, value in contents["model_state"].items()}
    here = {key: tuple(value.shape) for key, value in state.model.state_dict().items()}
    start = "" if here == there else _start_from(state.model, contents["model_state"])
    # Weights may fit after adaptation, e.g. resized to other images, but the optimizer state does not.
    if start != "" or any(there.get(key, shape) != shape for key, shape in here.items()):
        keys = [key for key in here | there if here.get(key) != there.get(key)]
        shown = [f"{key} {there.get(key, 'missing')} there, {here.get(key, 'missing')} now" for key in keys[:3]]
        shown += [f"{len(keys) - 3} more"] if len(keys) > 3 else []
        training = ("SOLVER.", "TRAIN.", "AUG.", "MIXUP.", "EMA.")
        causes = [key for key in changes if not key.startswith(training)]
        return f"its network has other weights ({'; '.join(shown)})", causes, start
    name = "SOLVER.OPTIMIZING_METHOD"
    before, now = changes.get(name, ("", ""))
    if before.lower() != now.lower():
        return f"{name} {now} cannot go on from the state of {before}", [name], start
    saved, own = contents["optimizer_state"], state.optimizer.state_dict()
    sizes = [[len(group["params"]) for group in each["param_groups"]] for each in (saved, own)]
    if sizes[0] != sizes[1]:
        reason = f"its optimizer has groups of {sizes[0]} parameters there and of {sizes[1]} now"
        return reason, [key for key in changes if key.startswith("SOLVER.")], start
    return None


def _start_from(model: nn.Module, weights: dict) -> str | None:
    """What to type besides TRAIN.CHECKPOINT_FILE_PATH to start from these weights; None if they do not fit."""
    head = getattr(model, "head_keys", ("head",))
    for skip, words in (((), ""), (head, " TRAIN.RESET_HEAD True")):
        with contextlib.suppress(UserError):
            load_weights(model, weights, skip=skip)
            return words
    return None


def _read_newest(output_dir: Path) -> tuple[Path | None, dict]:
    for path in list_checkpoints(output_dir):
        try:
            contents = load_checkpoint(path)
            if missing := {"model_state", "optimizer_state", "epoch"} - contents.keys():
                raise UserError(f"{path} has no {', '.join(sorted(missing))}.")
            return path, contents
        except UserError as error:
            logger.warning("Skipped a checkpoint: %s", error)
    return None, {}


def _changes(cfg: CfgNode, contents: dict) -> dict[str, tuple[Any, Any]]:
    """Key -> (value in the checkpoint, value now), for the settings that make this a different training."""
    earlier = get_cfg()
    try:
        earlier.merge_from_other_cfg(yaml.safe_load(contents.get("cfg", "")) or {})
    except (UserError, yaml.YAMLError) as error:  # from an older version; loading the weights shows whether they fit
        logger.warning("The checkpoint's configuration cannot be compared with this one: %s", error)
        return {}
    free = {name for name, key in keys().items() if key.free}
    before, now = settings(earlier), settings(cfg)
    return {name: (before.get(name), now[name]) for name in now if name not in free and before.get(name) != now[name]}
