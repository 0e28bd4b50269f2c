"""Train a model with DeiT's recipe, or fine-tune it with ATS: the same loop, begun at `TRAIN.CHECKPOINT_FILE_PATH`.

    weights = train(cfg)        # -> OUTPUT_DIR/model.safetensors

Every step draws its random numbers (mixup, dropout, stochastic depth) from (RNG_SEED, epoch, step) alone, and every
sample its augmentation likewise: a run resumed at an epoch is the uninterrupted one, bit for bit.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader

from ats.checkpoint import load_weights, save_safetensors
from ats.config import CfgNode
from ats.datasets import build_loader
from ats.engine import checkpointing
from ats.engine.checkpointing import TrainState
from ats.engine.device import autocast, device_name, seed_everything, select_device
from ats.engine.evaluate import describe_model, evaluate
from ats.engine.logging import StepStats, TrainLog, log_plan, open_output_dir
from ats.engine.meters import BadFiles
from ats.engine.optim import build_optimizer, clip_gradients, lr_schedule, set_lr
from ats.errors import UserError
from ats.models import build_model

logger = logging.getLogger(__name__)


class NonFiniteError(ArithmeticError):
    """Loss or gradient norm is NaN or infinite; the weights are still those before the step."""


@dataclass(frozen=True)
class Recipe:
    """How a step is made. `mixup` makes soft targets; without it `criterion` takes labels."""

    criterion: nn.Module
    lr_at: Callable[[float], float]
    seed: int = 0
    mixup: Mixup | None = None
    num_chunks: int = 1
    amp_dtype: torch.dtype | None = None
    clip_norm: float | None = None
    clip_value: float | None = None

    @classmethod
    def from_cfg(cls, cfg: CfgNode) -> Recipe:
        """The recipe of `SOLVER.*`, `MIXUP.*` and `TRAIN.*`.

        Raises:
            UserError: settings that exclude each other.
        """
        mixup, smoothing = None, cfg.MIXUP.LABEL_SMOOTH_VALUE
        if not 0 <= smoothing < 1:
            raise UserError(f"MIXUP.LABEL_SMOOTH_VALUE {smoothing} must be at least 0 and below 1.")
        if cfg.TRAIN.GRAD_ACCUM_STEPS < 1:
            raise UserError(f"TRAIN.GRAD_ACCUM_STEPS {cfg.TRAIN.GRAD_ACCUM_STEPS} must be at least 1.")
        if cfg.MIXUP.ENABLE:
            if cfg.MIXUP.ALPHA <= 0 and cfg.MIXUP.CUTMIX_ALPHA <= 0:
                raise UserError("MIXUP.ENABLE True needs MIXUP.ALPHA or MIXUP.CUTMIX_ALPHA above 0.")
            if cfg.TRAIN.BATCH_SIZE % 2:
                raise UserError(
                    f"TRAIN.BATCH_SIZE {cfg.TRAIN.BATCH_SIZE} must be even with MIXUP.ENABLE: samples mix in pairs."
                )
            mixup = Mixup(
                mixup_alpha=cfg.MIXUP.ALPHA,
                cutmix_alpha=cfg.MIXUP.CUTMIX_ALPHA,
                prob=cfg.MIXUP.PROB,
                switch_prob=cfg.MIXUP.SWITCH_PROB,
                label_smoothing=smoothing,
                num_classes=cfg.MODEL.NUM_CLASSES,
            )
        return cls(
            criterion=SoftTargetCrossEntropy() if mixup else LabelSmoothingCrossEntropy(smoothing),
            lr_at=lr_schedule(cfg),
            seed=cfg.RNG_SEED,
            mixup=mixup,
            num_chunks=cfg.TRAIN.GRAD_ACCUM_STEPS,
            amp_dtype=getattr(torch, cfg.TRAIN.AMP_DTYPE) if cfg.TRAIN.MIXED_PRECISION else None,
            clip_norm=cfg.SOLVER.CLIP_GRAD_L2NORM,
            clip_value=cfg.SOLVER.CLIP_GRAD_VAL,
        )


def train(cfg: CfgNode) -> Path:
    """Train as `cfg` says; checkpoints, logs and, at the end, OUTPUT_DIR/model.safetensors (EMA weights if EMA.ENABLE).

    Returns:
        The path of the exported weights.

    Raises:
        UserError: bad settings, data, weights or checkpoints; too many unreadable files; a loss that is not finite.
    """
    output_dir = open_output_dir(cfg)
    device = select_device(cfg.DEVICE)
    recipe = Recipe.from_cfg(cfg)
    train_loader, val_loader = build_loader(cfg, "train"), build_loader(cfg, "val")
    state = build_state(cfg, device)
    num_epochs, num_steps = cfg.SOLVER.MAX_EPOCH, len(train_loader)
    log_plan(training_plan(cfg, state.model, train_loader, val_loader, device))
    resumed = checkpointing.resume(state, output_dir) if cfg.TRAIN.AUTO_RESUME else None
    if resumed:
        logger.info("Resumed from %s: %d of %d epochs are done.", resumed, state.epoch, num_epochs)
    bad_files = BadFiles(max_fraction=cfg.DATA.MAX_BAD_FRACTION)
    log = TrainLog(
        output_dir,
        num_epochs=num_epochs,
        num_steps=num_steps,
        period=cfg.LOG_PERIOD,
        epochs_done=state.epoch,
        tensorboard=cfg.TENSORBOARD.ENABLE,
    )
    with closing(log), _explain_failures(output_dir):
        while state.epoch < num_epochs:
            train_epoch(state, train_loader, recipe, log=log, bad_files=bad_files, device=device)
            is_last = state.epoch == num_epochs
            if is_last or _is_due(state.epoch, cfg.TRAIN.EVAL_PERIOD):
                result = evaluate(state.eval_model, val_loader, device=device)
                log.evaluation(state.epoch - 1, result, is_ema=state.ema is not None)
            if is_last or _is_due(state.epoch, cfg.TRAIN.CHECKPOINT_PERIOD):
                checkpointing.save(state, output_dir, cfg.dump())
    weights = output_dir / "model.safetensors"
    save_safetensors(weights, state.eval_model.state_dict())
    logger.info("Trained weights%s: %s", "" if state.ema is None else " (EMA)", weights)
    return weights


@contextmanager
def _explain_failures(output_dir: Path) -> Iterator[None]:
    try:
        yield
    except NonFiniteError as error:
        last = next(iter(checkpointing.list_checkpoints(output_dir)), "none yet")
        advice = "A lower SOLVER.BASE_LR or SOLVER.CLIP_GRAD_L2NORM 1 may help."
        raise UserError(f"{error} Last checkpoint: {last}. {advice}") from error
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"Out of GPU memory: raise TRAIN.GRAD_ACCUM_STEPS, or lower TEST.BATCH_SIZE. {error}"
        ) from error


def training_plan(
    cfg: CfgNode, model: nn.Module, train_loader: DataLoader, val_loader: DataLoader, device: torch.device
) -> dict[str, str]:
    """What a training will do, for the head of the log."""
    passes = f" in {cfg.TRAIN.GRAD_ACCUM_STEPS} passes" if cfg.TRAIN.GRAD_ACCUM_STEPS > 1 else ""
    precision = cfg.TRAIN.AMP_DTYPE if cfg.TRAIN.MIXED_PRECISION else "float32"
    return {
        "train": describe_model(cfg, model),
        "weights": cfg.TRAIN.CHECKPOINT_FILE_PATH or f"random, RNG_SEED {cfg.RNG_SEED}",
        "data": f"{cfg.TRAIN.DATASET} in {cfg.DATA.PATH_TO_DATA_DIR}: {len(train_loader.dataset)} samples to train on, "
        f"{len(val_loader.dataset)} to evaluate on",
        "schedule": f"{cfg.SOLVER.MAX_EPOCH} epochs of {len(train_loader)} steps of {cfg.TRAIN.BATCH_SIZE} samples"
        f"{passes}, {cfg.SOLVER.OPTIMIZING_METHOD}, learning rate {cfg.SOLVER.BASE_LR:g} {cfg.SOLVER.LR_POLICY}",
        "device": f"{device_name(device)}, {precision}",
        "output": str(Path(cfg.OUTPUT_DIR).expanduser().resolve()),
    }


def _is_due(epoch: int, period: int) -> bool:
    return period > 0 and epoch % period == 0


def build_state(cfg: CfgNode, device: torch.device) -> TrainState:
    """Model (with `TRAIN.CHECKPOINT_FILE_PATH`'s weights if given), optimizer, scaler and EMA before the first step."""
    seed_everything(cfg.RNG_SEED)
    model = build_model(cfg)
    if cfg.TRAIN.CHECKPOINT_FILE_PATH:
        head_keys = getattr(model, "head_keys", ("head",))
        load_weights(model, cfg.TRAIN.CHECKPOINT_FILE_PATH, skip=head_keys if cfg.TRAIN.RESET_HEAD else ())
    model.to(device)
    return TrainState(
        model=model,
        optimizer=build_optimizer(model, cfg),
        scaler=torch.amp.GradScaler(
            device.type, enabled=cfg.TRAIN.MIXED_PRECISION and cfg.TRAIN.AMP_DTYPE == "float16"
        ),
        ema=ModelEmaV3(model, decay=cfg.EMA.DECAY) if cfg.EMA.ENABLE else None,
    )


def train_epoch(
    state: TrainState,
    loader: DataLoader,
    recipe: Recipe,
    *,
    log: TrainLog,
    bad_files: BadFiles,
    device: torch.device,
) -> None:
    """Train epoch `state.epoch` (counted from 0) and count it as done.

    Raises:
        NonFiniteError: loss or gradient is not finite; the message names epoch, step and samples.
        UserError: too many unreadable files.
    """
    state.model.train()
    loader.batch_sampler.set_epoch(state.epoch)
    seed_everything(recipe.seed, state.epoch)  # the loader draws from the global generator as it starts
    num_steps = len(loader)
    for step, batch in enumerate(loader):
        seed_everything(recipe.seed, state.epoch, step)
        bad_files.add(batch.bad)
        lr = recipe.lr_at(state.epoch + step / num_steps)
        set_lr(state.optimizer, lr)
        x, target = batch.x.to(device, non_blocking=True), batch.label.to(device, non_blocking=True)
        if recipe.mixup is not None:  # before the batch is cut into chunks, so that their number changes nothing
            x, target = recipe.mixup(x, target)
        try:
            stats = train_step(state.model, x, target, optimizer=state.optimizer, scaler=state.scaler, recipe=recipe)
        except NonFiniteError as error:
            where = f"epoch {state.epoch + 1}, step {step + 1} of {num_steps}"
            logger.debug("Samples of %s: %s", where, batch.index.tolist())
            raise NonFiniteError(
                f"{error} in {where} (learning rate {lr:.3g}; {_name_samples(batch.index)})."
            ) from error
        if state.ema is not None:
            state.ema.update(state.model)
        log.step(state.epoch, step, stats, lr=lr, num_images=len(x))
    state.epoch += 1


def _name_samples(index: Tensor, limit: int = 16) -> str:
    more = f", and {len(index) - limit} more: see log.txt" if len(index) > limit else ""
    return f"samples {', '.join(map(str, index[:limit].tolist()))}{more}"


def train_step(
    model: nn.Module,
    x: Tensor,
    target: Tensor,
    *,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    recipe: Recipe,
) -> StepStats:
    """One optimizer step on the mean loss of a batch, in `recipe.num_chunks` passes over a part of it each.

    Args:
        x: [B, 3, H, W]. target: labels [B], or soft targets [B, classes] after mixup.

    Raises:
        NonFiniteError: the loss is not finite, or, without a scaler (which skips such steps), the gradient.
    """
    optimizer.zero_grad(set_to_none=True)
    loss, tokens = x.new_zeros(()), {}
    for x_chunk, target_chunk in zip(x.chunk(recipe.num_chunks), target.chunk(recipe.num_chunks), strict=True):
        share = len(x_chunk) / len(x)
        with autocast(x.device, recipe.amp_dtype):
            logits, trace = model.forward_tokens(x_chunk)
        chunk_loss = share * recipe.criterion(logits.float(), target_chunk)
        scaler.scale(chunk_loss).backward()
        loss += chunk_loss.detach()
        for entry in trace:
            tokens[entry.block] = tokens.get(entry.block, 0) + share * entry.num_tokens.float().mean()
    scaler.unscale_(optimizer)
    grad_norm = clip_gradients(model.parameters(), max_norm=recipe.clip_norm, max_value=recipe.clip_value)
    loss, grad_norm, *token_means = torch.stack(
        [loss, grad_norm, *tokens.values()]
    ).tolist()  # the only wait for the device
    if not math.isfinite(loss):
        raise NonFiniteError(f"The loss is {loss}")
    if not math.isfinite(grad_norm) and not scaler.is_enabled():
        raise NonFiniteError(f"The gradient's norm is {grad_norm} (loss {loss:.4g})")
    scaler.step(optimizer)
    scaler.update()
    scale = scaler.get_scale() if scaler.is_enabled() else None
    return StepStats(loss, grad_norm, dict(zip(tokens, token_means, strict=True)), loss_scale=scale)
