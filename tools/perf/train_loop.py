"""Time what the training engine adds to a bare loop: checkpoints, logs, signals, checks.

    python tools/perf/train_loop.py --cfg FILE [--rounds N] [KEY VALUE ...]

The engine (`engine.train.Trainer`) and a loop of only forward, loss, backward, clipping and optimizer train two copies
of one network on the same batches, alternating step by step in one process. A round is LOG_PERIOD steps, so each round
has one line of the log.
"""

from __future__ import annotations

import copy
import random
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a clone that is not installed

from command import make_parser, run_tool  # beside this file

from ats.datasets import Sample
from ats.engine.checkpointing import TrainState
from ats.engine.device import autocast
from ats.engine.output import open_output_dir
from ats.engine.step import Recipe, StepStats, build_optimizer
from ats.engine.train import StopSignals, Trainer
from ats.errors import UserError

NUM_SAVES = 5


class BareLoop:
    """A plain training step, on a copy of the model in `state` before its first step."""

    def __init__(self, cfg: CfgNode, state: TrainState, recipe: Recipe, device: torch.device) -> None:
        self.model, self.ema = copy.deepcopy(state.model).train(), copy.deepcopy(state.ema)
        self._scaler = copy.deepcopy(state.scaler)
        self._optimizer = build_optimizer(self.model, cfg)
        self._recipe, self._device = recipe, device

    def step(self, x: Tensor, target: Tensor) -> None:
        """One optimizer step on a batch from the loader."""
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
    """Seconds: CPU time of this process on a CPU, so other programs do not count; wall time on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self) -> float:
        if self._device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self._device)
        return time.perf_counter()


class _TimedTrainer(Trainer):
    """The engine, with the seconds of its last `_step`; the rest of an iteration is around the step."""

    clock = time.process_time
    step_seconds = 0.0

    def _step(self, batch: Sample) -> tuple[StepStats, float]:
        begin = self.clock()
        result = super()._step(batch)
        self.step_seconds = self.clock() - begin
        return result


class _InterleavedLoader:
    """Replaces the engine's loader. When the engine asks for a batch, its step is over and the bare loop takes its own.

    Attributes:
        engine: seconds of every iteration of the engine, without the wait for data.
        bare: seconds of every bare step. around: the part of `engine` outside `Trainer._step`.
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
            x, target = batch.x.clone(), batch.label.clone()  # mixup works in place
            bare_first = self._rng.random() < 0.5  # neither always comes right after loading
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
    """Share of the training time spent on checkpoints, at the intervals of `TRAIN.*`.

    Args:
        seconds: of a checkpoint. step_seconds: of a step. num_steps: of an epoch.
    """
    train = cfg.TRAIN
    epochs = min((period for period in (train.CHECKPOINT_PERIOD, train.EVAL_PERIOD) if period), default=0)
    intervals = [60 * train.CHECKPOINT_MINUTES, step_seconds * train.CHECKPOINT_STEPS]
    intervals.append(step_seconds * num_steps * epochs)
    return sum(seconds / interval for interval in intervals if interval)


def _without_checkpoints(cfg: CfgNode, output_dir: str, *, num_steps: int) -> CfgNode:
    """`cfg` with another OUTPUT_DIR and no checkpoints, which are timed separately."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = output_dir
    cfg.DATA_LOADER.NUM_WORKERS = 0  # no worker competes with a step
    cfg.TRAIN.CHECKPOINT_STEPS, cfg.TRAIN.CHECKPOINT_MINUTES = 0, 0.0
    cfg.TRAIN.CHECKPOINT_PERIOD, cfg.TRAIN.EVAL_PERIOD = 0, 0
    cfg.SOLVER.MAX_EPOCH = max(cfg.SOLVER.MAX_EPOCH, num_steps + 1)  # an epoch has at least one step
    cfg.freeze()
    return cfg


def train_both(cfg: CfgNode, output_dir: str, *, num_steps: int) -> tuple[_TimedTrainer, BareLoop, _InterleavedLoader]:
    """Train `num_steps` steps with the engine and the same steps with the bare loop; returns both and the seconds."""
    cfg = _without_checkpoints(cfg, output_dir, num_steps=num_steps)
    trainer = _TimedTrainer(cfg, open_output_dir(cfg))
    trainer.clock = _Clock(trainer.device)
    bare = BareLoop(cfg, trainer.state, trainer.recipe, trainer.device)
    timed = _InterleavedLoader(trainer.train_loader, bare, trainer, num_steps=num_steps)
    trainer.train_loader = timed
    with closing(trainer.log):
        while len(timed.engine) < num_steps:
            trainer._train_epoch(StopSignals())  # not entered, so Ctrl-C ends the measurement
    return trainer, bare, timed


def compare_training(cfg: CfgNode, *, rounds: int) -> dict[str, float | int]:
    """The engine's step against a bare one, over `rounds` rounds of LOG_PERIOD steps, after one round of warm-up.

    Neither time includes the wait for data. The engine's step is compared with the bare step on the same batch; what
    the engine does around its step is timed directly.

    Returns:
        `step / bare`: median over pairs of steps; `+-`: half its 95 % interval. `around %` and `checkpoints %`: in per
        cent of a bare step, with the checkpoint intervals of `cfg`. `overhead %`: the sum, on top of a bare step.

    Raises:
        UserError: bad settings, data or weights.
    """
    round_steps = max(cfg.LOG_PERIOD, 1)
    folder = Path(cfg.OUTPUT_DIR)
    folder.mkdir(parents=True, exist_ok=True)  # the same disk as a training
    with tempfile.TemporaryDirectory(dir=folder, prefix="train_loop_") as output_dir:
        trainer, _, timed = train_both(cfg, output_dir, num_steps=round_steps * (rounds + 1))
        saves = []
        for _ in range(NUM_SAVES):
            begin = time.perf_counter()
            trainer.checkpoints.save(trainer.state)
            saves.append(time.perf_counter() - begin)
    engine, bare, around = (
        torch.tensor(seconds, dtype=torch.float64)[round_steps:] for seconds in (timed.engine, timed.bare, timed.around)
    )
    low, ratio, high = ((engine - around) / bare).quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
    step_seconds, save_seconds = bare.median().item(), statistics.median(saves)
    shares = {
        "around %": 100 * around.mean().item() / step_seconds,  # the mean, as one step per round logs
        "checkpoints %": 100
        * checkpoint_share(cfg, seconds=save_seconds, step_seconds=step_seconds, num_steps=trainer.num_steps),
    }
    return {
        "steps": len(bare),
        "bare ms/step": 1e3 * step_seconds,
        "step / bare": ratio,
        "+-": 1.82 * (high - low) / len(bare) ** 0.5,  # 1.96 standard errors of a median, for normal noise
        "checkpoint s": save_seconds,
        **shares,
        "overhead %": 100 * (ratio - 1) + sum(shares.values()),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""

    def measure(args: Namespace, cfg: CfgNode) -> list[dict[str, float | int]]:
        if args.cfg is None:
            raise UserError("--cfg FILE is missing: give the config of a training.")
        return [compare_training(cfg, rounds=args.rounds)]

    return run_tool(make_parser(__doc__), measure, argv)


if __name__ == "__main__":
    sys.exit(main())
