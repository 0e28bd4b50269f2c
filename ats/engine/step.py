"""One optimizer step, and the recipe it follows."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from ats.config import CfgNode
from ats.engine.device import autocast
from ats.engine.distributed import no_gradient_exchange, sum_over_processes, world_size
from ats.engine.optim import clip_gradients, lr_schedule
from ats.errors import UserError


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


@dataclass
class StepStats:
    """One step, over all processes: loss, gradient norm before clipping, block -> mean kept tokens, the scaler's scale
    if on.
    """

    loss: float
    grad_norm: float
    tokens: dict[int, float]
    loss_scale: float | None = None


def train_step(
    forward: nn.Module,
    x: Tensor,
    target: Tensor,
    *,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    recipe: Recipe,
    batch_size: int | None = None,
) -> StepStats:
    """One optimizer step on the mean loss of a batch, in `recipe.num_chunks` passes over a part of it each.

    Args:
        forward: `data_parallel(model)`.
        x: [B, 3, (T,) H, W], this process's share of the batch. target: labels [B], or soft targets [B, classes] after
            mixup.
        batch_size: samples of the batch over all processes, by default B.

    Raises:
        NonFiniteError: the loss is not finite, or, without a scaler (which skips such steps), the gradient; on every
            process if on one.
    """
    optimizer.zero_grad(set_to_none=True)
    batch_size = batch_size or len(x)
    loss, tokens = x.new_zeros(()), {}
    chunks = list(zip(x.chunk(recipe.num_chunks), target.chunk(recipe.num_chunks), strict=True))
    for number, (x_chunk, target_chunk) in enumerate(chunks, start=1):
        share = len(x_chunk) / batch_size
        with no_gradient_exchange(forward) if number < len(chunks) else nullcontext():
            with autocast(x.device, recipe.amp_dtype):
                logits, trace = forward(x_chunk)
            chunk_loss = share * recipe.criterion(logits.float(), target_chunk)
            # The processes' gradients are averaged; the gradient of the whole batch is their sum.
            scaler.scale(world_size() * chunk_loss).backward()
        loss += chunk_loss.detach()
        for entry in trace:
            tokens[entry.block] = tokens.get(entry.block, 0) + share * entry.num_tokens.float().mean()
    scaler.unscale_(optimizer)
    grad_norm = clip_gradients(forward.parameters(), max_norm=recipe.clip_norm, max_value=recipe.clip_value)
    sums = sum_over_processes(torch.stack([loss, *tokens.values()]))
    grad_norm, loss, *token_means = torch.cat([grad_norm[None], sums]).tolist()  # the only wait for the device
    if not math.isfinite(loss):
        raise NonFiniteError(f"The loss is {loss}")
    if not math.isfinite(grad_norm) and not scaler.is_enabled():
        raise NonFiniteError(f"The gradient's norm is {grad_norm} (loss {loss:.4g})")
    scaler.step(optimizer)
    scaler.update()
    scale = scaler.get_scale() if scaler.is_enabled() else None
    return StepStats(loss, grad_norm, dict(zip(tokens, token_means, strict=True)), loss_scale=scale)
