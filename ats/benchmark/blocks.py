"""GFLOPs and tokens of each block: what the closed formulas of `ats/flops.py` add up, taken down block by block.

A block is what its own formula counts: the temporal attention of a divided TimeSformer and the offsets of PS-ViT are
outside, like stem and head.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from unittest import mock

import torch
from torch import Tensor, nn

from ats.models import cost, psvit
from ats.models.cvt import cost as cvt_cost
from ats.models.mvit import cost as mvit_cost
from ats.tokens import KeptTokens

Call = tuple[tuple, Tensor]  # arguments of a block's formula, and what it gave
# Modules whose `block_multiply_adds` is called once per block, in order; PS-ViT's own blocks come before the others.
FORMULAS = (psvit, cost, cvt_cost, mvit_cost)


def _calls(
    model: nn.Module, trace: list[KeptTokens], input_shape: tuple[int, ...], *, paper: bool
) -> list[tuple[str, Call]]:
    """Every call of a block's formula, with the module it is of."""
    found: dict[str, list[Call]] = {module.__name__: [] for module in FORMULAS}

    def recorded(function: Callable[..., Tensor], calls: list[Call]) -> Callable[..., Tensor]:
        @wraps(function)
        def call(*args, **kwargs) -> Tensor:
            result = function(*args, **kwargs)
            calls.append((args, result))
            return result

        return call

    with ExitStack() as stack:
        for module in FORMULAS:
            wrapped = recorded(module.block_multiply_adds, found[module.__name__])
            stack.enter_context(mock.patch.object(module, "block_multiply_adds", wrapped))
        model.multiply_adds(trace, input_shape, paper=paper)
    return [(name, call) for name, calls in found.items() for call in calls]


def block_gflops(
    model: nn.Module, trace: list[KeptTokens], input_shape: tuple[int, ...], *, paper: bool
) -> list[Tensor]:
    """Of each block, [B] float64; arguments as of `ats.flops.gflops`."""
    size = input_shape[0]
    costs = [result for _, (_, result) in _calls(model, trace, input_shape, paper=paper)]
    # a number for every frame of a clip, or one for all images
    return [(c.reshape(size, -1).sum(dim=1) if c.ndim else c.expand(size)) / 1e9 for c in costs]


def token_ratio(model: nn.Module, trace: list[KeptTokens], input_shape: tuple[int, ...]) -> float | None:
    """Tokens that leave the blocks of a ViT over those of the dense network, mean of blocks and samples; None for
    networks whose blocks change the grid.
    """
    calls = _calls(model, trace, input_shape, paper=False)
    if not calls or any(name != cost.__name__ for name, _ in calls):
        return None
    num_tokens = calls[0][1][0][1].mean().item()
    left = torch.stack([args[2].mean() for _, (args, _) in calls])
    return left.mean().item() / num_tokens
