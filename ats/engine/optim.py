"""Optimizer, learning-rate schedule and gradient clipping.

The learning rate is a pure function of the training progress, as in SlowFast: nothing to save, nothing to restore.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from timm.optim import create_optimizer_v2, list_optimizers, param_groups_layer_decay, param_groups_weight_decay
from torch import Tensor, nn

from ats.config import CfgNode
from ats.errors import UserError, suggest


def build_optimizer(model: nn.Module, cfg: CfgNode) -> torch.optim.Optimizer:
    """The optimizer of `SOLVER.*`: timm's by name, its learning rate set by `set_lr` at every step.

    With `SOLVER.ZERO_WD_1D_PARAM` neither one-dimensional parameters (biases, norms) nor those of
    `model.no_weight_decay()` (position embedding, prefix tokens) decay. `SOLVER.LAYER_DECAY` scales the rate of each
    block, for models that say which parameter is in which (`group_matcher`, as in timm).

    Raises:
        UserError: timm knows no such optimizer or refuses its settings; layer decay without a `group_matcher`.
    """
    name = cfg.SOLVER.OPTIMIZING_METHOD.lower()
    exclude = cfg.SOLVER.ZERO_WD_1D_PARAM
    param_groups = param_groups_weight_decay
    if cfg.SOLVER.LAYER_DECAY != 1.0:
        if not hasattr(model, "group_matcher"):
            raise UserError(f"SOLVER.LAYER_DECAY is not supported by {type(model).__name__}: it must be 1.")
        param_groups = partial(param_groups_layer_decay, layer_decay=cfg.SOLVER.LAYER_DECAY)
    try:
        return create_optimizer_v2(
            model,
            opt=name,
            lr=cfg.SOLVER.BASE_LR,
            weight_decay=cfg.SOLVER.WEIGHT_DECAY,
            momentum=cfg.SOLVER.MOMENTUM,
            param_group_fn=partial(
                param_groups,
                weight_decay=cfg.SOLVER.WEIGHT_DECAY,
                weight_decay_exclude_1d=exclude,
                no_weight_decay_list=model.no_weight_decay() if exclude and hasattr(model, "no_weight_decay") else (),
            ),
        )
    except (ValueError, AssertionError, ImportError) as error:  # needs a package or a GPU, or refuses another setting
        if name.removeprefix("lookahead_") not in list_optimizers():
            suggestion = suggest(name, list_optimizers())
            raise UserError(f"SOLVER.OPTIMIZING_METHOD {name}: timm has no such optimizer.{suggestion}") from error
        raise UserError(f"The optimizer {name} cannot be built with these settings of SOLVER: {error}.") from error


def lr_at(
    progress: float,
    *,
    base_lr: float,
    num_epochs: float,
    end_lr: float = 0.0,
    warmup_epochs: float = 0.0,
    warmup_start_lr: float = 0.0,
    policy: str = "cosine",
    cosine_after_warmup: bool = True,
    steps: Sequence[float] = (),
    relative_lrs: Sequence[float] = (),
) -> float:
    """Learning rate after `progress` epochs (a fraction counts the steps of the running epoch).

    `policy` "constant" stays at `base_lr`; "cosine" falls from `base_lr` to `end_lr` at `num_epochs`, starting after
    the warm-up, or, without `cosine_after_warmup`, at epoch 0; "steps_with_relative_lrs" is `base_lr` times the entry
    of `relative_lrs` that belongs to the last of `steps` (ascending epochs, the first 0) reached. The warm-up is a line
    from `warmup_start_lr` to the policy's value at `warmup_epochs`.
    """
    start = warmup_epochs * cosine_after_warmup

    def policy_lr(progress: float) -> float:
        if policy == "steps_with_relative_lrs":
            return base_lr * relative_lrs[bisect_right(steps, progress) - 1]
        if policy == "constant" or progress <= start:
            return base_lr
        share = min((progress - start) / (num_epochs - start), 1.0) if num_epochs > start else 1.0
        return end_lr + (base_lr - end_lr) * 0.5 * (1.0 + math.cos(math.pi * share))

    if progress < warmup_epochs:
        return warmup_start_lr + (policy_lr(warmup_epochs) - warmup_start_lr) * progress / warmup_epochs
    return policy_lr(progress)


def lr_schedule(cfg: CfgNode) -> Callable[[float], float]:
    """`lr_at` with the settings of `SOLVER.*`: progress in epochs -> learning rate.

    Raises:
        UserError: SOLVER.STEPS and SOLVER.LRS do not fit together.
    """
    steps, relative_lrs = cfg.SOLVER.STEPS, cfg.SOLVER.LRS
    if cfg.SOLVER.LR_POLICY == "steps_with_relative_lrs" and (
        not steps or steps[0] != 0 or steps != sorted(set(steps)) or len(steps) != len(relative_lrs)
    ):
        raise UserError(
            "SOLVER.LR_POLICY steps_with_relative_lrs needs SOLVER.STEPS, ascending epochs from 0 on, and as many "
            f"SOLVER.LRS, such as [0, 11, 14] and [1, 0.1, 0.01]; got {steps} and {relative_lrs}."
        )
    return partial(
        lr_at,
        base_lr=cfg.SOLVER.BASE_LR,
        num_epochs=cfg.SOLVER.MAX_EPOCH,
        end_lr=cfg.SOLVER.COSINE_END_LR,
        warmup_epochs=cfg.SOLVER.WARMUP_EPOCHS,
        warmup_start_lr=cfg.SOLVER.WARMUP_START_LR,
        policy=cfg.SOLVER.LR_POLICY,
        cosine_after_warmup=cfg.SOLVER.COSINE_AFTER_WARMUP,
        steps=steps,
        relative_lrs=relative_lrs,
    )


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group its learning rate: `lr` times the group's layer decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def clip_gradients(
    parameters: Iterable[nn.Parameter], *, max_norm: float | None = None, max_value: float | None = None
) -> Tensor:
    """Clip gradients in place, entries to `max_value` first, then all of them to the L2 norm `max_norm`.

    Returns:
        The L2 norm before clipping, a scalar tensor on the gradients' device.
    """
    parameters = [p for p in parameters if p.grad is not None]
    grad_norm = nn.utils.get_total_norm([p.grad for p in parameters])
    if max_value is not None:
        nn.utils.clip_grad_value_(parameters, max_value)
    if max_norm is not None:
        clipped = grad_norm if max_value is None else nn.utils.get_total_norm([p.grad for p in parameters])
        nn.utils.clip_grads_with_norm_(parameters, max_norm, clipped)
    return grad_norm
