"""One optimizer step and its parts: optimizer, learning-rate schedule, gradient clipping, recipe.

As in SlowFast, the learning rate is a pure function of training progress, so checkpoints need no scheduler state.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from timm.data import Mixup
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn

from ats.config import CfgNode
from ats.engine.checkpointing import TrainState
from ats.engine.device import all_reduce, autocast, world_size
from ats.errors import UserError, suggest


def build_optimizer(model: nn.Module, cfg: CfgNode) -> torch.optim.Optimizer:
    """Build timm's optimizer from `SOLVER.*`; call `set_lr` before every step.

    With `SOLVER.ZERO_WD_1D_PARAM`, one-dimensional parameters (biases, norms) and those in `model.no_weight_decay()`
    (position embedding, prefix tokens) get no weight decay. `SOLVER.LAYER_DECAY` scales the learning rate block by
    block; the model needs timm's `group_matcher`, which assigns parameters to blocks.

    Raises:
        UserError: timm has no such optimizer or refuses its settings; layer decay without a `group_matcher`.
    """
    solver = cfg.SOLVER
    name, decay = solver.OPTIMIZING_METHOD.lower(), {"weight_decay": solver.WEIGHT_DECAY}
    no_decay = model.no_weight_decay() if solver.ZERO_WD_1D_PARAM and hasattr(model, "no_weight_decay") else ()
    exclude = {"weight_decay_exclude_1d": solver.ZERO_WD_1D_PARAM, "no_weight_decay_list": no_decay}
    param_groups = partial(param_groups_weight_decay, **decay, **exclude)
    if solver.LAYER_DECAY != 1.0:
        if not hasattr(model, "group_matcher"):
            raise UserError(f"SOLVER.LAYER_DECAY is not supported by {type(model).__name__}: it must be 1.")
        param_groups = partial(param_groups_layer_decay, layer_decay=solver.LAYER_DECAY, **decay, **exclude)
    settings = {"lr": solver.BASE_LR, "momentum": solver.MOMENTUM, **decay}
    try:
        return create_optimizer_v2(model, opt=name, param_group_fn=param_groups, **settings)
    except (ValueError, AssertionError, ImportError) as error:  # a bad setting, or a missing package or GPU
        if name.removeprefix("lookahead_") not in list_optimizers():
            suggestion = suggest(name, map(str, list_optimizers()))
            raise UserError(f"SOLVER.OPTIMIZING_METHOD {name}: timm has no such optimizer.{suggestion}") from error
        raise UserError(f"The optimizer {name} cannot be built with these settings of SOLVER: {error}.") from error


def lr_schedule(cfg: CfgNode) -> Callable[[float], float]:
    """The learning rate as a function of progress in (fractional) epochs.

    SOLVER.LR_POLICY "constant" is BASE_LR; "cosine" goes from BASE_LR, after the warm-up (at epoch 0 without
    COSINE_AFTER_WARMUP), down to COSINE_END_LR at MAX_EPOCH; "steps_with_relative_lrs" is BASE_LR times the entry of
    LRS for the latest epoch of STEPS. During the first WARMUP_EPOCHS the rate rises linearly from WARMUP_START_LR to
    the policy's value at their end.

    Raises:
        UserError: SOLVER.STEPS and SOLVER.LRS do not match.
    """
    solver, steps = cfg.SOLVER, cfg.SOLVER.STEPS
    base_lr, end_lr, policy, warmup = solver.BASE_LR, solver.COSINE_END_LR, solver.LR_POLICY, solver.WARMUP_EPOCHS
    if policy == "steps_with_relative_lrs" and (
        not steps or steps[0] != 0 or steps != sorted(set(steps)) or len(steps) != len(solver.LRS)
    ):
        raise UserError(
            "SOLVER.LR_POLICY steps_with_relative_lrs needs SOLVER.STEPS, ascending epochs that start at 0, and one "
            f"SOLVER.LRS for each, such as [0, 11, 14] and [1, 0.1, 0.01]; got {steps} and {solver.LRS}."
        )
    start = warmup * solver.COSINE_AFTER_WARMUP

    def policy_lr(epoch: float) -> float:
        if policy == "steps_with_relative_lrs":
            return base_lr * solver.LRS[bisect_right(steps, epoch) - 1]
        if policy == "constant" or epoch <= start:
            return base_lr
        share = min((epoch - start) / (solver.MAX_EPOCH - start), 1.0) if start < solver.MAX_EPOCH else 1.0
        return end_lr + (base_lr - end_lr) * 0.5 * (1.0 + math.cos(math.pi * share))

    def lr_at(epoch: float) -> float:
        if epoch >= warmup:
            return policy_lr(epoch)
        return solver.WARMUP_START_LR + (policy_lr(warmup) - solver.WARMUP_START_LR) * epoch / warmup

    return lr_at


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every parameter group: `lr` times the group's layer decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def clip_gradients(
    parameters: Iterable[nn.Parameter], *, max_norm: float | None = None, max_value: float | None = None
) -> Tensor:
    """Clip gradients in place: first every entry to `max_value`, then their total L2 norm to `max_norm`.

    Returns their total L2 norm before clipping, a scalar tensor on the gradients' device.
    """
    parameters = list(parameters)
    gradients = [p.grad for p in parameters if p.grad is not None]
    grad_norm = nn.utils.get_total_norm(gradients)
    if max_value is not None:
        nn.utils.clip_grad_value_(parameters, max_value)
    if max_norm is not None:
        clipped = grad_norm if max_value is None else nn.utils.get_total_norm(gradients)
        nn.utils.clip_grads_with_norm_(parameters, max_norm, clipped)
    return grad_norm


class Recipe:
    """How to make a step, from `SOLVER.*`, `MIXUP.*` and `TRAIN.*`.

    Raises a UserError if two settings contradict each other.
    """

    def __init__(self, cfg: CfgNode) -> None:
        self.seed, self.lr_at = cfg.RNG_SEED, lr_schedule(cfg)
        self.num_chunks = cfg.TRAIN.GRAD_ACCUM_STEPS  # passes per step
        self.amp_dtype = getattr(torch, cfg.TRAIN.AMP_DTYPE) if cfg.TRAIN.MIXED_PRECISION else None  # None: no autocast
        self.clip_norm, self.clip_value = cfg.SOLVER.CLIP_GRAD_L2NORM, cfg.SOLVER.CLIP_GRAD_VAL
        mixup, self.mixup = cfg.MIXUP, None
        # Takes the soft targets of `mixup`; without mixup, labels.
        self.criterion: nn.Module = LabelSmoothingCrossEntropy(mixup.LABEL_SMOOTH_VALUE)
        if not mixup.ENABLE:
            return
        if mixup.ALPHA <= 0 and mixup.CUTMIX_ALPHA <= 0:
            raise UserError("MIXUP.ENABLE True needs MIXUP.ALPHA or MIXUP.CUTMIX_ALPHA above 0.")
        if (size := cfg.TRAIN.BATCH_SIZE) % 2:
            raise UserError(f"TRAIN.BATCH_SIZE {size} must be even with MIXUP.ENABLE: samples mix in pairs.")
        self.criterion = SoftTargetCrossEntropy()
        self.mixup = Mixup(
            mixup_alpha=mixup.ALPHA,
            cutmix_alpha=mixup.CUTMIX_ALPHA,
            prob=mixup.PROB,
            switch_prob=mixup.SWITCH_PROB,
            label_smoothing=mixup.LABEL_SMOOTH_VALUE,
            num_classes=cfg.MODEL.NUM_CLASSES,
        )


MIN_LOSS_SCALE = 2.0**-14  # the scale starts at 2**16, and every skipped step halves it


class NonFiniteError(ArithmeticError):
    """The loss or the gradient norm is NaN or infinite. The step has not changed the weights."""


@dataclass
class StepStats:
    """A step's numbers over all processes."""

    loss: float
    grad_norm: float  # before clipping
    tokens: dict[int, float]  # ATS block -> mean number of tokens kept
    loss_scale: float | None = None  # None without a scaler


def train_step(
    forward: nn.Module, x: Tensor, target: Tensor, state: TrainState, recipe: Recipe, batch_size: int | None = None
) -> StepStats:
    """One optimizer step on the mean loss of a batch, accumulated over `recipe.num_chunks` chunks.

    Args:
        forward: `data_parallel(state.model)`. state: its optimizer and scaler make the step.
        x: [B, 3, (T,) H, W], this process's share of the batch. target: labels [B], or soft targets [B, classes].
        batch_size: size of the batch over all processes; default: B.

    Raises:
        NonFiniteError: the loss is not finite; or the gradient is not, and there is no scaler to skip the step or it
            has already skipped too many in a row. Raised on all processes if it happens on one.
    """
    optimizer, scaler = state.optimizer, state.scaler
    optimizer.zero_grad(set_to_none=True)
    batch_size = batch_size or len(x)
    loss, tokens = x.new_zeros(()), dict[int, Tensor]()
    chunks = list(zip(x.chunk(recipe.num_chunks), target.chunk(recipe.num_chunks), strict=True))
    for number, (x_chunk, target_chunk) in enumerate(chunks, start=1):
        share = len(x_chunk) / batch_size
        # Processes exchange the accumulated gradients only in the last chunk.
        with forward.no_sync() if number < len(chunks) and world_size() > 1 else nullcontext():
            with autocast(x.device, recipe.amp_dtype):
                logits, trace = forward(x_chunk)
            chunk_loss = share * recipe.criterion(logits.float(), target_chunk)
            # DDP averages the gradients over the processes; the whole batch needs their sum.
            scaler.scale(world_size() * chunk_loss).backward()
        loss += chunk_loss.detach()
        for entry in trace:
            tokens[entry.block] = tokens.get(entry.block, 0) + share * entry.num_tokens.float().mean()
    scaler.unscale_(optimizer)
    grad_norm = clip_gradients(forward.parameters(), max_norm=recipe.clip_norm, max_value=recipe.clip_value)
    sums = all_reduce(torch.stack([loss, *tokens.values()]))
    grad_norm, loss, *token_means = torch.cat([grad_norm[None], sums]).tolist()  # the only host synchronisation
    if not math.isfinite(loss):
        raise NonFiniteError(f"The loss is {loss}")
    if not math.isfinite(grad_norm) and not scaler.is_enabled():
        raise NonFiniteError(f"The gradient's norm is {grad_norm} (loss {loss:.4g})")
    scaler.step(optimizer)
    scaler.update()
    scale = scaler.get_scale() if scaler.is_enabled() else None
    if scale is not None and scale < MIN_LOSS_SCALE and not math.isfinite(grad_norm):
        raise NonFiniteError(
            f"The gradient's norm is {grad_norm} (loss {loss:.4g}), even at float16's loss scale {scale:.3g}; "
            "TRAIN.AMP_DTYPE bfloat16 needs no loss scale. It happened"
        )
    return StepStats(loss, grad_norm, dict(zip(tokens, token_means, strict=True)), loss_scale=scale)
