"""Train a model with DeiT's recipe, or fine-tune it with ATS: the same loop, begun at `TRAIN.CHECKPOINT_FILE_PATH`.

    weights = train(cfg)        # -> OUTPUT_DIR/model.safetensors

Every step draws its random numbers (mixup, dropout, stochastic depth) from (RNG_SEED, epoch, step) alone, and every
sample its augmentation likewise: a run resumed at any step is the uninterrupted one, bit for bit. With several
processes (`distributed.process_group`) each has its share of every batch, and the result stays the same to round-off.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from timm.utils import ModelEmaV3

from ats.checkpoint import load_weights, save_safetensors
from ats.config import CfgNode
from ats.datasets import Loader, Sample, build_loader
from ats.datasets.build import mean_std
from ats.engine.checkpointing import Checkpoints, TrainState, newest, refuse_or_remove, resume
from ats.engine.device import device_name, explain_lost_worker, seed_everything, select_device
from ats.engine.distributed import data_parallel, gather, is_main, rank, sum_over_processes, wait_for_all, world_size
from ats.engine.evaluate import describe_model, evaluate
from ats.engine.logging import log_plan
from ats.engine.meters import BadFiles, timed
from ats.engine.optim import build_optimizer, set_lr
from ats.engine.output_dir import open_output_dir, write_config
from ats.engine.signals import SIGNALS, StopSignals
from ats.engine.step import NonFiniteError, Recipe, StepStats, train_step
from ats.engine.train_log import TrainLog
from ats.errors import NoSuchSplit, Stopped, UserError, counted
from ats.models import build_model
from ats.visualize import draw_fixed_images

logger = logging.getLogger(__name__)


def train(cfg: CfgNode, *, force: bool = False) -> Path:
    """Train as `cfg` says; checkpoints, logs and, at the end, OUTPUT_DIR/model.safetensors (EMA weights if EMA.ENABLE).

    Args:
        force: go on from the checkpoints of another configuration in OUTPUT_DIR, or without TRAIN.AUTO_RESUME delete
            those that are there.

    Returns:
        The path of the exported weights.

    Raises:
        UserError: bad settings, data, weights or checkpoints; an OUTPUT_DIR of another or a running training; too many
            unreadable files; a lost data worker or process; a loss that is not finite; a full disk.
        Stopped: by SIGTERM or SIGINT, after a checkpoint.
    """
    output_dir = open_output_dir(cfg)
    trainer = Trainer(cfg, output_dir, force=force)
    with closing(trainer.log), _explain_failures(output_dir), StopSignals() as stop:
        trainer.run(stop)
    weights = output_dir / "model.safetensors"
    if is_main():
        save_safetensors(weights, trainer.state.eval_model.state_dict())
    wait_for_all()
    logger.info("Trained weights%s: %s", "" if trainer.state.ema is None else " (EMA)", weights)
    return weights


@contextmanager
def _explain_failures(output_dir: Path) -> Iterator[None]:
    try:
        with explain_lost_worker():
            yield
    except NonFiniteError as error:
        advice = "A lower SOLVER.BASE_LR or SOLVER.CLIP_GRAD_L2NORM 1 may help."
        raise UserError(f"{error} Last checkpoint: {newest(output_dir)}. {advice}") from error
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"Out of GPU memory: raise TRAIN.GRAD_ACCUM_STEPS, or lower TEST.BATCH_SIZE. {error}"
        ) from error


class Trainer:
    """A training, ready to run: model, data and log of a config, resumed if there is something to resume.

    Args:
        output_dir: opened. force: see `train`.
    """

    def __init__(self, cfg: CfgNode, output_dir: Path, *, force: bool = False) -> None:
        self.cfg, self.device = cfg, select_device(cfg.DEVICE)
        self.recipe = Recipe.from_cfg(cfg)
        share = {"rank": rank(), "world_size": world_size()}
        self.train_loader, self.val_loader = build_loader(cfg, "train", **share), build_val_loader(cfg, **share)
        self.sampler = self.train_loader.batch_sampler
        self.num_epochs, self.num_steps = cfg.SOLVER.MAX_EPOCH, self.sampler.num_batches
        self.state = build_state(cfg, self.device)
        if cfg.TRAIN.AUTO_RESUME:
            resumed = resume(self.state, output_dir, cfg, force=force)
        else:
            resumed = refuse_or_remove(output_dir, force=force)
        write_config(cfg, output_dir)
        log_plan(self._plan())
        if resumed:
            logger.info(
                "Resumed from %s: %d of %d epochs are done%s.",
                *(resumed, self.state.epoch, self.num_epochs),
                f" and {self.state.step} of {self.num_steps} steps" if self.state.step else "",
            )
        self.forward = data_parallel(self.state.model)
        self.bad_files = BadFiles(max_fraction=cfg.DATA.MAX_BAD_FRACTION)
        self.bad_files.restore(self.state.log_state.get("bad_files"))
        self.checkpoints = Checkpoints(
            output_dir,
            cfg.dump(),
            every_steps=cfg.TRAIN.CHECKPOINT_STEPS,
            every_minutes=cfg.TRAIN.CHECKPOINT_MINUTES,
            keep=cfg.TRAIN.CHECKPOINT_KEEP,
        )
        self.log = TrainLog(
            output_dir,
            num_epochs=self.num_epochs,
            num_steps=self.num_steps,
            period=cfg.LOG_PERIOD,
            device=self.device,
            epoch=self.state.epoch,
            step=self.state.step,
            window=self.state.log_state.get("window"),
            tensorboard=cfg.TENSORBOARD.ENABLE,
        )

    def run(self, stop: StopSignals) -> None:
        """Train what is left of the training.

        Raises:
            Stopped: a signal came.
        """
        if self.state.epoch and not self.state.step:
            self._after_epoch(stop)  # once more: the run may have ended in it
        while self.state.epoch < self.num_epochs:
            self._train_epoch(stop)
            self._after_epoch(stop)

    def _train_epoch(self, stop: StopSignals) -> None:
        state = self.state
        epoch = state.epoch
        if state.step == 0:
            self.log.start_epoch()
        state.model.train()
        self.sampler.set_epoch(epoch, start_batch=state.step)
        seed_everything(self.recipe.seed, epoch)  # the loader draws from the global generator as it starts
        for batch, seconds_waited in timed(self.train_loader):
            step = state.step
            stats, lr = self._step(batch)
            signum, num_bad = self._exchange(stop, sum(map(bool, batch.bad)))
            self.bad_files.add(batch.bad, num_read=self.sampler.batch_size, num_bad=num_bad)
            state.epoch, state.step = (epoch + 1, 0) if step + 1 == self.num_steps else (epoch, step + 1)
            self.log.step(
                *(epoch, step, stats),
                lr=lr,
                num_images=self.sampler.batch_size,
                seconds_waited=seconds_waited,
                num_bad=self.bad_files.num_bad,
            )
            if signum or self._checkpoint_is_due():
                state.log_state = {"window": self.log.window(), "bad_files": self.bad_files.state()}
                self.checkpoints.save(state)
            if signum:
                wait_for_all()  # torchrun ends all processes when the first one ends
                raise Stopped(signum, f"after step {step + 1} of {self.num_steps} of epoch {epoch + 1}")

    def _step(self, batch: Sample) -> tuple[StepStats, float]:
        """A step on this process's share of a batch: its numbers, and its learning rate."""
        state, recipe = self.state, self.recipe
        seed_everything(recipe.seed, state.epoch, state.step)
        lr = recipe.lr_at(state.epoch + state.step / self.num_steps)
        set_lr(state.optimizer, lr)
        x, target = (t.to(self.device, non_blocking=True) for t in (batch.x, batch.label))
        if recipe.mixup is not None:  # before the batch is cut into chunks, so that their number changes nothing
            x, target = recipe.mixup(x, target)
        if rank():  # mixup is the same on all processes, dropout and stochastic depth are not
            seed_everything(recipe.seed, state.epoch, state.step, rank())
        try:
            stats = train_step(
                *(self.forward, x, target),
                optimizer=state.optimizer,
                scaler=state.scaler,
                recipe=recipe,
                batch_size=self.sampler.batch_size,
            )
        except NonFiniteError as error:
            index = [i for share in gather(batch.index.tolist()) for i in share]
            where = f"epoch {state.epoch + 1}, step {state.step + 1} of {self.num_steps}"
            logger.debug("Samples of %s: %s", where, index)
            raise NonFiniteError(f"{error} in {where} (learning rate {lr:.3g}; {_name_samples(index)}).") from error
        if state.ema is not None:
            state.ema.update(state.model)
        return stats, lr

    def _exchange(self, stop: StopSignals, num_bad: int) -> tuple[int, int]:
        """The signal to stop for that came to any process (0: none), and the bad files of all."""
        came = [stop.received == signum for signum in SIGNALS]
        *came, num_bad = sum_over_processes(torch.tensor([*came, num_bad], dtype=torch.int64)).tolist()
        return next((signum for signum, count in zip(SIGNALS, came, strict=True) if count), 0), num_bad

    def _checkpoint_is_due(self) -> bool:
        epoch, step = self.state.epoch, self.state.step
        at_end = self._evaluation_is_due() or _is_due(epoch, self.cfg.TRAIN.CHECKPOINT_PERIOD)
        return (step == 0 and at_end) or self.checkpoints.is_due(epoch * self.num_steps + step)

    def _evaluation_is_due(self) -> bool:
        return self.state.epoch == self.num_epochs or _is_due(self.state.epoch, self.cfg.TRAIN.EVAL_PERIOD)

    def _after_epoch(self, stop: StopSignals) -> None:
        """Evaluate if due. A checkpoint was written before, so that a run that ends in it does it again."""
        if self.val_loader is None or not self._evaluation_is_due():
            return
        state = self.state
        with stop.at_once(f"in the evaluation after epoch {state.epoch} of {self.num_epochs}"):
            result = evaluate(state.eval_model, self.val_loader, device=self.device)
        self.log.evaluation(state.epoch - 1, result, is_ema=state.ema is not None)
        if self.log.wants_pictures:
            mean, std = mean_std(self.cfg)
            num_images = self.cfg.TENSORBOARD.NUM_IMAGES
            picture = draw_fixed_images(state.eval_model, self.val_loader.dataset, num_images, mean=mean, std=std)
            if picture is not None:
                self.log.picture(state.epoch - 1, picture)
        self.checkpoints.keep_best(state, result.top1)

    def _plan(self) -> dict[str, str]:
        """What the training will do, for the head of the log."""
        cfg = self.cfg
        passes = f" in {cfg.TRAIN.GRAD_ACCUM_STEPS} passes" if cfg.TRAIN.GRAD_ACCUM_STEPS > 1 else ""
        precision = cfg.TRAIN.AMP_DTYPE if cfg.TRAIN.MIXED_PRECISION else "float32"
        saving = [_every(cfg.TRAIN.CHECKPOINT_STEPS, "step")] if cfg.TRAIN.CHECKPOINT_STEPS else []
        saving += [f"every {cfg.TRAIN.CHECKPOINT_MINUTES:g} minutes"] if cfg.TRAIN.CHECKPOINT_MINUTES else []
        saving += [_every(cfg.TRAIN.CHECKPOINT_PERIOD, "epoch")] if cfg.TRAIN.CHECKPOINT_PERIOD else []
        keep = f"the last {cfg.TRAIN.CHECKPOINT_KEEP} and the best" if cfg.TRAIN.CHECKPOINT_KEEP else "all"
        schedule = f"{counted(cfg.SOLVER.MAX_EPOCH, 'epoch')} of {counted(self.num_steps, 'step')}"
        schedule += f" of {counted(cfg.TRAIN.BATCH_SIZE, 'sample')}{passes}"
        num_train = counted(len(self.train_loader.dataset), "sample")
        num_val = "none" if self.val_loader is None else len(self.val_loader.dataset)
        saving.append("at the end" if self.val_loader is None else "before every evaluation")
        return {
            "train": describe_model(cfg, self.state.model),
            "weights": cfg.TRAIN.CHECKPOINT_FILE_PATH or f"random, RNG_SEED {cfg.RNG_SEED}",
            "data": f"{cfg.TRAIN.DATASET} in {cfg.DATA.PATH_TO_DATA_DIR}: "
            f"{num_train} to train on, {num_val} to evaluate on",
            "schedule": f"{schedule}, {cfg.SOLVER.OPTIMIZING_METHOD}, "
            f"learning rate {cfg.SOLVER.BASE_LR:g} {cfg.SOLVER.LR_POLICY}",
            "device": f"{device_name(self.device)}, {precision}",
            "process": f"{world_size()} with {self.train_loader.num_workers} data workers each",
            "saves": f"{', '.join(saving)}; keeps {keep}",
            "output": str(Path(cfg.OUTPUT_DIR).expanduser().resolve()),
        }


def build_val_loader(cfg: CfgNode, **share: int) -> Loader | None:
    """The loader of the validation data; None if nothing will be evaluated.

    Raises:
        UserError: as `build_loader`.
    """
    if not cfg.TRAIN.EVAL_PERIOD and not cfg.TEST.ENABLE:
        return None
    try:
        return build_loader(cfg, "val", **share)
    except NoSuchSplit as error:
        raise UserError(
            f"{error}\nTo train without validation data, type TRAIN.EVAL_PERIOD 0 TEST.ENABLE False."
        ) from error


def _is_due(epoch: int, period: int) -> bool:
    return period > 0 and epoch % period == 0


def _every(number: int, noun: str) -> str:
    return f"every {noun}" if number == 1 else f"every {counted(number, noun)}"


def _name_samples(index: list[int], limit: int = 16) -> str:
    more = f", and {len(index) - limit} more: see log.txt" if len(index) > limit else ""
    return f"samples {', '.join(map(str, index[:limit]))}{more}"


def build_state(cfg: CfgNode, device: torch.device) -> TrainState:
    """Model (with `TRAIN.CHECKPOINT_FILE_PATH`'s weights if given), optimizer, scaler and EMA before the first step."""
    seed_everything(cfg.RNG_SEED)
    model = build_model(cfg)
    if cfg.TRAIN.CHECKPOINT_FILE_PATH:
        skip = getattr(model, "head_keys", ("head",)) if cfg.TRAIN.RESET_HEAD else ()
        load_weights(model, cfg.TRAIN.CHECKPOINT_FILE_PATH, skip=skip, advice="TRAIN.RESET_HEAD True")
    model.to(device)
    return TrainState(
        model=model,
        optimizer=build_optimizer(model, cfg),
        scaler=torch.amp.GradScaler(
            device.type, enabled=cfg.TRAIN.MIXED_PRECISION and cfg.TRAIN.AMP_DTYPE == "float16"
        ),
        ema=ModelEmaV3(model, decay=cfg.EMA.DECAY) if cfg.EMA.ENABLE else None,
    )
