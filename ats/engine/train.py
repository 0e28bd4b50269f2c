"""Train a model with DeiT's recipe, or fine-tune `TRAIN.CHECKPOINT_FILE_PATH` with ATS, in the same loop.

    weights = train(cfg)        # -> OUTPUT_DIR/model.safetensors

Random numbers of a step (mixup, dropout, stochastic depth) depend only on (RNG_SEED, epoch, step), those of a sample's
augmentation only on (RNG_SEED, epoch, its place in the order). So a run resumed at any step equals the uninterrupted
run bit for bit. With several processes (`device.process_group`), each takes its share of every batch, and results agree
up to round-off. SIGTERM (from a scheduler), SIGINT (Ctrl-C) and the other `STOP_SIGNALS` end training after the current
step, with a checkpoint.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from time import perf_counter
from types import FrameType

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ats.checkpoint import load_weights, save_safetensors
from ats.config import CfgNode
from ats.config.schema import changed
from ats.datasets import Loader, Sample, build_loader
from ats.datasets.base import Split
from ats.engine.checkpointing import Checkpoints, TrainState, list_checkpoints, newest_checkpoint, resume
from ats.engine.device import (
    all_gather,
    all_reduce,
    broadcast_buffers,
    data_parallel,
    device_name,
    explain_lost_process,
    is_main,
    rank,
    seed_everything,
    select_device,
    wait_for_all,
    world_size,
)
from ats.engine.evaluate import build_test, check_samples, describe_model, describe_weights, evaluate, network_settings
from ats.engine.output import log_plan, open_output_dir
from ats.engine.step import NonFiniteError, Recipe, StepStats, build_optimizer, set_lr, train_step
from ats.engine.train_log import BadFiles, TrainLog, Window, drop_lines_after
from ats.errors import STOP_SIGNALS, NoSuchSplit, Stopped, UserError, counted
from ats.files import write
from ats.models import build_model

logger = logging.getLogger(__name__)

Draw = Callable[[nn.Module, Sequence[Sample]], Tensor | None]


def train(cfg: CfgNode, *, force: bool = False, draw: Draw | None = None) -> Path:
    """Train as configured, export the weights to OUTPUT_DIR/model.safetensors and return that path.

    With EMA.ENABLE, the exported weights are the EMA's.

    Args:
        force: resume from checkpoints in OUTPUT_DIR even if they belong to another configuration; without
            TRAIN.AUTO_RESUME, delete them.
        draw: draws a network's kept tokens on validation data for TensorBoard; returns [3, H, W] in 0..1, or None.

    Raises:
        UserError: bad settings, data, weights or checkpoints; OUTPUT_DIR belongs to another training or is in use; too
            many unreadable files; a lost data worker or process; a loss that is not finite; a full disk.
        Stopped: by one of `STOP_SIGNALS`, after saving a checkpoint.
    """
    output_dir = open_output_dir(cfg)
    trainer = Trainer(cfg, output_dir, force=force, draw=draw)
    with closing(trainer.log), explain_lost_process(), StopSignals() as stop:
        try:
            trainer.run(stop)
        except torch.OutOfMemoryError as error:
            advice = "raise TRAIN.GRAD_ACCUM_STEPS, or lower TEST.BATCH_SIZE"
            raise UserError(f"Out of GPU memory: {advice}. {error}") from error
    weights = output_dir / "model.safetensors"
    if is_main():
        settings = {name: value for name, value in changed(cfg).items() if name.startswith("ATS.")}
        metadata = {"network": json.dumps(network_settings(cfg))}
        metadata |= {"ats": json.dumps(settings)} if cfg.ATS.ENABLE else {}
        save_safetensors(weights, trainer.state.eval_model.state_dict(), metadata)
    wait_for_all()
    logger.info("Trained weights%s: %s", "" if trainer.state.ema is None else " (EMA)", weights)
    return weights


class Trainer:
    """A training ready to run or resume: model, data and log of a config. For the arguments, see `train`."""

    def __init__(self, cfg: CfgNode, output_dir: Path, *, force: bool = False, draw: Draw | None = None) -> None:
        self.cfg, self.output_dir, self.draw = cfg, output_dir, draw
        self.device, self.recipe = select_device(cfg.DEVICE), Recipe(cfg)
        loaders = _build_loaders(cfg)
        self.train_loader, self.val_loader = loaders["train"], loaders.get("val")
        self.sampler = self.train_loader.batch_sampler
        self.num_epochs, self.num_steps = cfg.SOLVER.MAX_EPOCH, self.sampler.num_batches
        # Do not read weights that a checkpoint will replace: the file may be gone by now, or timm's server unreachable.
        resumes = cfg.TRAIN.AUTO_RESUME and bool(list_checkpoints(output_dir))
        self.state = build_state(cfg, self.device, read_weights=not resumes)
        check_samples(cfg, self.state.model, loaders, device=self.device)
        resumed = resume(self.state, output_dir, cfg, force=force)
        if resumes and not resumed:  # all checkpoints are damaged
            self.state = build_state(cfg, self.device)
        if is_main():
            write(output_dir / "config.yaml", cfg.dump())
            drop_lines_after(output_dir / "log.jsonl", self.state.epoch, self.state.step)
        log_plan(self._plan(resumed))
        # Evaluate again, in case the earlier run stopped during the evaluation.
        self.evaluate_first = self.state.epoch > 0 and self.state.step == 0
        self._continue_by_samples()
        if resumed:
            steps = f" and {self.state.step} of {self.num_steps} steps" if self.state.step else ""
            done = f"{self.state.epoch} of {self.num_epochs} epochs are done{steps}"
            logger.info("Resumed from %s: %s.", resumed, done)
        self.forward = data_parallel(self.state.model)
        log_state = self.state.log_state
        self.bad_files = BadFiles(cfg.DATA.MAX_BAD_FRACTION, log_state.get("bad_files", [0, 0]))
        self.checkpoints = Checkpoints(output_dir, cfg)
        place = {"steps_done": self._steps_done(), "window": log_state.get("window", {})}
        self.log = TrainLog(output_dir, cfg, num_steps=self.num_steps, device=self.device, **place)

    def run(self, stop: StopSignals) -> None:
        """Train the remaining epochs; raises `Stopped` when a signal arrives."""
        if self.evaluate_first:
            self._after_epoch(stop)
        while self.state.epoch < self.num_epochs:
            self._train_epoch(stop)
            self._after_epoch(stop)
        self._end_if_stopped(self._agree(stop)[0])

    def _continue_by_samples(self) -> None:
        """If the data or the batch size changed since the checkpoint, warn, and continue after as many samples of the
        epoch as it has seen, or with the next epoch if none are left.
        """
        state, batch_size = self.state, self.sampler.batch_size
        sizes = {"train_samples": self.sampler.num_samples, "batch_size": batch_size, "steps_per_epoch": self.num_steps}
        if self.val_loader is not None:
            sizes["val_samples"] = len(self.val_loader.dataset)
        before, state.sizes = state.sizes, sizes
        changed = [name for name in before if sizes.get(name, before[name]) != before[name]]
        changes = [f"{name.replace('_', ' ')} {before[name]} -> {sizes[name]}" for name in changed]
        seen = state.step * before.get("batch_size", batch_size)
        step, state.step = state.step, min(seen // batch_size, self.num_steps)
        if is_main() and (changes or state.step != step):
            goes_on = f" Continuing after the {seen} samples that epoch {state.epoch + 1} has seen." if step else ""
            what = ", ".join(changes) or f"step {step} of the checkpoint, steps per epoch {self.num_steps}"
            logger.warning("The data or the batch size changed since the last run: %s.%s", what, goes_on)

    def _train_epoch(self, stop: StopSignals) -> None:
        state, settings = self.state, self.cfg.TRAIN
        epoch = state.epoch
        if state.step == 0:
            self.log.window = Window()  # do not count the time of the evaluation before this epoch
        state.model.train()
        self.sampler.set_epoch(epoch, start_batch=state.step)
        seed_everything(self.recipe.seed, epoch)  # because starting the loader draws from the global generator
        waiting_since = perf_counter()
        for batch in self.train_loader:
            seconds_waited = perf_counter() - waiting_since
            stats, lr = self._step(batch)
            state.step += 1
            signum, num_bad = self._agree(stop, num_bad=sum(map(bool, batch.bad)))
            self.bad_files.add(batch.bad, num_read=self.sampler.batch_size, num_bad=num_bad)
            num_images, num_bad = self.sampler.batch_size, self.bad_files.counts[1]
            self.log.step(stats, lr=lr, num_images=num_images, seconds_waited=seconds_waited, num_bad=num_bad)
            if state.step < self.num_steps and (signum or self.checkpoints.is_due(self._steps_done())):
                self._save()
                self._end_if_stopped(signum)
            waiting_since = perf_counter()
        if state.step == self.num_steps:  # even if nothing was left of the epoch
            state.epoch, state.step = epoch + 1, 0
        signum, _ = self._agree(stop)
        epoch_is_due = state.step == 0 and self._is_due(settings.EVAL_PERIOD, settings.CHECKPOINT_PERIOD)
        if signum or epoch_is_due or self.checkpoints.is_due(self._steps_done()):
            self._save()
            self._end_if_stopped(signum)

    def _save(self) -> None:
        self.state.log_state = {"window": self.log.window.state(), "bad_files": self.bad_files.counts}
        self.checkpoints.save(self.state)

    def _end_if_stopped(self, signum: int) -> None:
        """Raise `Stopped` on every process if one of them got a signal."""
        if signum:
            wait_for_all()  # torchrun kills the others as soon as one process ends
            epoch, step = divmod(self._steps_done() - 1, self.num_steps)
            raise Stopped(signum, f"after step {step + 1} of {self.num_steps} of epoch {epoch + 1}")

    def _step(self, batch: Sample) -> tuple[StepStats, float]:
        """One step on this process's share of a batch; returns its statistics and learning rate."""
        state, recipe = self.state, self.recipe
        seed_everything(recipe.seed, state.epoch, state.step)
        lr = recipe.lr_at(state.epoch + state.step / self.num_steps)
        set_lr(state.optimizer, lr)
        x, target = (t.to(self.device, non_blocking=True) for t in (batch.x, batch.label))
        if recipe.mixup is not None:  # before chunking, so that the number of chunks has no effect
            x, target = recipe.mixup(x, target)
        if rank():  # processes share the random numbers of mixup, but not of dropout and stochastic depth
            seed_everything(recipe.seed, state.epoch, state.step, rank())
        try:
            stats = train_step(self.forward, x, target, state, recipe, self.sampler.batch_size)
        except NonFiniteError as error:
            index = [i for share in all_gather(batch.index.tolist()) for i in share]
            where = f"epoch {state.epoch + 1}, step {state.step + 1} of {self.num_steps}"
            logger.debug("Samples of %s: %s", where, index)
            more = f", and {len(index) - 16} more: see log.txt" if len(index) > 16 else ""
            raise UserError(
                f"{error} in {where} (learning rate {lr:.3g}; samples {', '.join(map(str, index[:16]))}{more}). Last "
                f"checkpoint: {newest_checkpoint(self.output_dir)}. A lower SOLVER.BASE_LR or SOLVER.CLIP_GRAD_L2NORM "
                "1 may help."
            ) from error
        if state.ema is not None:
            state.ema.update(state.model)
        return stats, lr

    def _agree(self, stop: StopSignals, *, num_bad: int = 0) -> tuple[int, int]:
        """Over all processes: the signal that any of them received (0 if none), and the number of bad files."""
        received = [stop.received == signum for signum in STOP_SIGNALS]
        *counts, num_bad = all_reduce(torch.tensor([*received, num_bad], dtype=torch.int64)).tolist()
        return next((signum for signum, count in zip(STOP_SIGNALS, counts, strict=True) if count), 0), num_bad

    def _steps_done(self) -> int:
        return self.state.epoch * self.num_steps + self.state.step

    def _is_due(self, *periods: int) -> bool:
        """Whether the last epoch is done, or the epoch count is a multiple of one of these periods (0: never)."""
        epoch = self.state.epoch
        return epoch == self.num_epochs or any(period > 0 and epoch % period == 0 for period in periods)

    def _after_epoch(self, stop: StopSignals) -> None:
        """Evaluate if due. The checkpoint is already written, so a run stopped here evaluates again on resuming."""
        if self.val_loader is None or not self._is_due(self.cfg.TRAIN.EVAL_PERIOD):
            return
        state = self.state
        with stop.interruptible(f"in the evaluation after epoch {state.epoch} of {self.num_epochs}"):
            broadcast_buffers(state.eval_model)  # evaluate what process 0 saved
            result = evaluate(state.eval_model, self.val_loader, device=self.device)
        draw = None if self.draw is None else partial(self.draw, state.eval_model, self.val_loader.dataset)
        self.log.evaluation(result, is_ema=state.ema is not None, draw=draw)
        self.checkpoints.keep_best(state, result.top1)

    def _plan(self, resumed: Path | None) -> dict[str, str]:
        """What the training will do, for the start of the log."""
        cfg, settings = self.cfg, self.cfg.TRAIN
        passes = f" in {settings.GRAD_ACCUM_STEPS} passes" if settings.GRAD_ACCUM_STEPS > 1 else ""
        precision = settings.AMP_DTYPE if settings.MIXED_PRECISION else "float32"
        periods = {"step": settings.CHECKPOINT_STEPS, "minute": settings.CHECKPOINT_MINUTES}
        periods["epoch"] = settings.CHECKPOINT_PERIOD
        saving = [f"every {noun if n == 1 else f'{n:.10g} {noun}s'}" for noun, n in periods.items() if n]
        saving.append("at the end" if self.val_loader is None else "before every evaluation")
        keep = f"the last {settings.CHECKPOINT_KEEP} and the best" if settings.CHECKPOINT_KEEP else "all"
        schedule = f"{counted(self.num_epochs, 'epoch')} of {counted(self.num_steps, 'step')}"
        schedule += f" of {counted(settings.BATCH_SIZE, 'sample')}{passes}"
        num_train = counted(len(self.train_loader.dataset), "sample")
        weights = f"resumed from {resumed.resolve()}" if resumed else None
        weights = weights or describe_weights(cfg, settings.CHECKPOINT_FILE_PATH)
        num_val = "none" if self.val_loader is None else len(self.val_loader.dataset)
        return {
            "train": describe_model(cfg, self.state.model),
            "weights": weights,
            "data": f"{settings.DATASET} in {cfg.DATA.PATH_TO_DATA_DIR}: "
            f"{num_train} to train on, {num_val} to evaluate on",
            "schedule": f"{schedule}, {cfg.SOLVER.OPTIMIZING_METHOD}, "
            f"learning rate {cfg.SOLVER.BASE_LR:g} {cfg.SOLVER.LR_POLICY}",
            "device": f"{device_name(self.device)}, {precision}",
            "process": f"{world_size()} with {counted(self.train_loader.num_workers, 'data worker')} each",
            "saves": f"{', '.join(saving)}; keeps {keep}",
            "output": str(self.output_dir.resolve()),
        }


def _build_loaders(cfg: CfgNode) -> dict[Split, Loader]:
    """Loaders of all data that the run will read, including the final test, so that mistakes show before training.

    Has no "val" if the run evaluates nothing.
    """
    share = {"rank": rank(), "world_size": world_size()}
    loaders: dict[Split, Loader] = {"train": build_loader(cfg, "train", **share)}
    advice = "To train without validation data, type TRAIN.EVAL_PERIOD 0 TEST.ENABLE False."
    try:
        if cfg.TRAIN.EVAL_PERIOD or cfg.TEST.ENABLE:
            loaders["val"] = build_loader(cfg, "val", **share)
        advice = "To train without a test, type TEST.ENABLE False."
        if cfg.TEST.ENABLE:
            loaders["test"], _ = build_test(cfg)
    except NoSuchSplit as error:
        raise UserError(f"{error}\n{advice}") from error
    return loaders


def build_state(cfg: CfgNode, device: torch.device, *, read_weights: bool = True) -> TrainState:
    """Model, optimizer, scaler and EMA before the first step, with the weights of `TRAIN.CHECKPOINT_FILE_PATH` or timm
    (TIMM.PRETRAINED). Weights are random if there are neither, or without `read_weights`.
    """
    seed_everything(cfg.RNG_SEED)
    if not read_weights:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.TRAIN.CHECKPOINT_FILE_PATH, cfg.TIMM.PRETRAINED = "", False
    model = build_model(cfg)
    if cfg.TRAIN.CHECKPOINT_FILE_PATH:
        skip = getattr(model, "head_keys", ("head",)) if cfg.TRAIN.RESET_HEAD else ()
        load_weights(model, cfg.TRAIN.CHECKPOINT_FILE_PATH, skip=skip, advice="TRAIN.RESET_HEAD True")
    model.to(device)
    is_float16 = cfg.TRAIN.MIXED_PRECISION and cfg.TRAIN.AMP_DTYPE == "float16"
    scaler = torch.amp.GradScaler(device.type, enabled=is_float16)
    ema = ModelEmaV3(model, decay=cfg.EMA.DECAY) if cfg.EMA.ENABLE else None
    return TrainState(model, build_optimizer(model, cfg), scaler, ema)


class StopSignals:
    """A context that records `STOP_SIGNALS` instead of ending the process. A second SIGINT ends it at once."""

    received = 0  # the number of the first signal
    _interruptible_part = ""

    def __enter__(self) -> StopSignals:
        is_main_thread = threading.current_thread() is threading.main_thread()  # Python allows handlers only there
        # nohup ignores SIGHUP; then the run does too.
        signals = [s for s in STOP_SIGNALS if s != signal.SIGHUP or signal.getsignal(s) != signal.SIG_IGN]
        self._previous = {signum: signal.signal(signum, self._handle) for signum in signals if is_main_thread}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    @contextmanager
    def interruptible(self, where: str) -> Iterator[None]:
        """A context in which a signal raises `Stopped` at once, as there is nothing to finish or save."""
        self._interruptible_part = where
        try:
            if self.received:
                raise Stopped(self.received, where)
            yield
        finally:
            self._interruptible_part = ""

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if self.received and signum == signal.SIGINT:
            _print_now("second SIGINT: quit without a checkpoint")
            os._exit(128 + signal.SIGINT)
        if self.received:
            return
        self.received = signum
        if self._interruptible_part:
            raise Stopped(signum, self._interruptible_part)
        again = ", again to quit at once" if signum == signal.SIGINT else ""
        _print_now(f"{signal.Signals(signum).name}: stopping after this step{again}")


def _print_now(text: str) -> None:
    """Print from a signal handler, unless the console is gone, as after a SIGHUP."""
    with suppress(OSError):
        os.write(2, f"\n{text}\n".encode())
