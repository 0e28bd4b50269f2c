"""What the training engine adds to a bare loop: checkpoints, logs, signals, checks.

The engine (`engine.train.Trainer`) and a loop of nothing but forward, loss, backward, clipping and optimizer train two
copies of one network on the same batches in turn, step by step, in one process. Its steps come in stretches, as many as
lie between two lines of the log.
"""

from __future__ import annotations

import copy
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ats.datasets import Sample
from ats.engine.checkpointing import TrainState
from ats.engine.device import autocast
from ats.engine.optim import build_optimizer
from ats.engine.output_dir import open_output_dir
from ats.engine.signals import StopSignals
from ats.engine.step import Recipe, StepStats
from ats.engine.train import Trainer
from ats.errors import UserError

NUM_SAVES = 5


class BareLoop:
    """A training step as one would write it down, on a copy of the state's model.

    Args:
        state: before the first step.
    """

    def __init__(self, cfg: CfgNode, state: TrainState, recipe: Recipe, device: torch.device) -> None:
        self.model, self.ema = copy.deepcopy(state.model).train(), copy.deepcopy(state.ema)
        self._scaler = copy.deepcopy(state.scaler)
        self._optimizer = build_optimizer(self.model, cfg)
        self._recipe, self._device = recipe, device

    def step(self, x: Tensor, target: Tensor) -> None:
        """One optimizer step on a batch as the loader gives it."""
        recipe = self._recipe
        x, target = x.to(self._device, non_blocking=True), target.to(self._device, non_blocking=True)
        if recipe.mixup is not None:
            x, target = recipe.mixup(x, target)
        self._optimizer.zero_grad(set_to_none=True)
        for x_chunk, target_chunk in zip(x.chunk(recipe.num_chunks), target.chunk(recipe.num_chunks), strict=True):
            with autocast(self._device, recipe.amp_dtype):
                logits = self.model(x_chunk)
            loss = recipe.criterion(logits.float(), target_chunk) * (len(x_chunk) / len(x))
            self._scaler.scale(loss).backward()
        if recipe.clip_value is not None or recipe.clip_norm is not None:
            self._scaler.unscale_(self._optimizer)
        if recipe.clip_value is not None:
            nn.utils.clip_grad_value_(self.model.parameters(), recipe.clip_value)
        if recipe.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), recipe.clip_norm)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self.ema is not None:
            self.ema.update(self.model)


class _Clock:
    """Seconds: of this process's own work on a CPU, where other programs do not count, else of the wall."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self) -> float:
        if self._device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self._device)
        return time.perf_counter()


class _TimedTrainer(Trainer):
    """The engine, which also notes the seconds of each `_step`: the rest of a turn of its loop is around the step."""

    clock = time.process_time
    step_seconds = 0.0

    def _step(self, batch: Sample) -> tuple[StepStats, float]:
        begin = self.clock()
        result = super()._step(batch)
        self.step_seconds = self.clock() - begin
        return result


class _TakingTurns:
    """In the place of the engine's loader: whenever the engine asks for a batch, its step is over, and the bare loop
    makes its own before the engine gets the next one.

    Attributes:
        engine, bare, around: seconds of every step: of a turn of the engine's loop without the wait for data, of the
            bare loop's step, and of what a turn does outside `Trainer._step`.
    """

    def __init__(self, loader: DataLoader, bare: BareLoop, trainer: _TimedTrainer, *, num_steps: int) -> None:
        self._loader, self._bare, self._trainer, self._num_steps = loader, bare, trainer, num_steps
        self._rng = random.Random(0)
        self.engine: list[float] = []
        self.bare: list[float] = []
        self.around: list[float] = []

    def __iter__(self) -> Iterator[Sample]:
        clock = self._trainer.clock
        for batch in self._loader:
            if len(self.engine) == self._num_steps:
                return
            x, target = batch.x.clone(), batch.label.clone()  # mixup changes a batch where it is
            bare_first = self._rng.random() < 0.5  # so that neither is always the one behind the loading
            if bare_first:
                self._time_bare(x, target)
            begin = clock()
            yield batch
            self.engine.append(clock() - begin)
            self.around.append(self.engine[-1] - self._trainer.step_seconds)
            if not bare_first:
                self._time_bare(x, target)

    def _time_bare(self, x: Tensor, target: Tensor) -> None:
        clock = self._trainer.clock
        begin = clock()
        self._bare.step(x, target)
        self.bare.append(clock() - begin)


def checkpoint_share(cfg: CfgNode, *, seconds: float, step_seconds: float, num_steps: int) -> float:
    """Share of the training time that goes into checkpoints of `seconds` each, at the intervals of `TRAIN.*`.

    Args:
        step_seconds: of a step. num_steps: of an epoch.
    """
    train = cfg.TRAIN
    epochs = min((period for period in (train.CHECKPOINT_PERIOD, train.EVAL_PERIOD) if period), default=0)
    intervals = [60 * train.CHECKPOINT_MINUTES, step_seconds * train.CHECKPOINT_STEPS]
    intervals.append(step_seconds * num_steps * epochs)
    return sum(seconds / interval for interval in intervals if interval)


def _without_checkpoints(cfg: CfgNode, output_dir: str, *, num_steps: int) -> CfgNode:
    """The training of `cfg` in another folder; checkpoints are timed by themselves."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = output_dir
    cfg.DATA_LOADER.NUM_WORKERS = 0  # loading then takes no time from a step
    cfg.TRAIN.CHECKPOINT_STEPS, cfg.TRAIN.CHECKPOINT_MINUTES = 0, 0.0
    cfg.TRAIN.CHECKPOINT_PERIOD, cfg.TRAIN.EVAL_PERIOD = 0, 0
    cfg.SOLVER.MAX_EPOCH = max(cfg.SOLVER.MAX_EPOCH, num_steps + 1)  # an epoch has at least a step
    cfg.freeze()
    return cfg


def take_turns(cfg: CfgNode, output_dir: str, *, num_steps: int) -> tuple[_TimedTrainer, BareLoop, _TakingTurns]:
    """Train `num_steps` steps by the engine and as many by the bare loop; returns both and the seconds of each step."""
    cfg = _without_checkpoints(cfg, output_dir, num_steps=num_steps)
    trainer = _TimedTrainer(cfg, open_output_dir(cfg))
    trainer.clock = _Clock(trainer.device)
    bare = BareLoop(cfg, trainer.state, trainer.recipe, trainer.device)
    turns = _TakingTurns(trainer.train_loader, bare, trainer, num_steps=num_steps)
    trainer.train_loader = turns
    with closing(trainer.log):
        while len(turns.engine) < num_steps:
            trainer._train_epoch(StopSignals())  # not entered: Ctrl-C ends the measurement
    return trainer, bare, turns


def compare_training(cfg: CfgNode, *, rounds: int) -> dict[str, float | int]:
    """The engine's step beside a bare one, over `rounds` stretches of LOG_PERIOD steps after one that warms up.

    Waiting for data is left out on both sides. A turn of the engine's loop is its step, which is compared with the
    bare one of the same batch, and what it does around that, which the clock tells directly.

    Returns:
        `step / bare`, the median over pairs of steps, and half its 95 % interval; `around %` and `checkpoints %` at the
        intervals of `cfg`, shares of a bare step; `overhead %`, the sum of what comes on top of a bare step.

    Raises:
        UserError: bad settings, data or weights.
    """
    if rounds < 1:
        raise UserError(f"--rounds {rounds} must be at least 1.")
    stretch = max(cfg.LOG_PERIOD, 1)
    folder = Path(cfg.OUTPUT_DIR).expanduser()
    folder.mkdir(parents=True, exist_ok=True)  # the disk that a training would write to
    with tempfile.TemporaryDirectory(dir=folder, prefix="train_loop_") as output_dir:
        trainer, _, turns = take_turns(cfg, output_dir, num_steps=stretch * (rounds + 1))
        saves = []
        for _ in range(NUM_SAVES):
            begin = time.perf_counter()
            trainer.checkpoints.save(trainer.state)
            saves.append(time.perf_counter() - begin)
    engine, bare, around = (
        torch.tensor(seconds, dtype=torch.float64)[stretch:] for seconds in (turns.engine, turns.bare, turns.around)
    )
    low, ratio, high = ((engine - around) / bare).quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
    step_seconds, save_seconds = bare.median().item(), statistics.median(saves)
    shares = {
        "around %": 100 * around.mean().item() / step_seconds,  # the mean: a line of the log comes once in a stretch
        "checkpoints %": 100
        * checkpoint_share(cfg, seconds=save_seconds, step_seconds=step_seconds, num_steps=trainer.num_steps),
    }
    return {
        "steps": len(bare),
        "bare ms/step": 1e3 * step_seconds,
        "step / bare": ratio,
        "+-": 1.82 * (high - low) / len(bare) ** 0.5,  # 1.96 standard errors of a median, were the noise normal
        "checkpoint s": save_seconds,
        **shares,
        "overhead %": 100 * (ratio - 1) + sum(shares.values()),
    }
