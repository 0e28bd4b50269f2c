"""Activation checkpointing (Chen et al., 2016): a block keeps only its input and runs again in the backward pass. This
saves memory at the cost of one more forward pass. Losses and gradients do not change.

The second pass repeats the first: random states for dropout and stochastic depth are restored, so the block has the
same scores and keeps the same tokens. Batch norm (CvT) must not update its running statistics twice, so these are
restored too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ats.tokens import RaggedTokens

BLOCK_LISTS = ("blocks", "trans_layers")  # names of block lists in networks


def set_grad_checkpointing(model: nn.Module, enable: bool = True) -> None:
    """Turn activation checkpointing on or off in a network of this package or of timm."""
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(enable)
        return
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in BLOCK_LISTS:
            for block in module:
                block.grad_checkpointing = enable


def run_block(block: nn.Module, x: Tensor | RaggedTokens, *args: object) -> Any:
    """`block(x, *args)`, with activation checkpointing if `set_grad_checkpointing` turned it on."""
    if not (getattr(block, "grad_checkpointing", False) and torch.is_grad_enabled()):
        return block(x, *args)
    again = partial(checkpoint, use_reentrant=False, context_fn=lambda: (nullcontext(), _statistics_kept(block)))
    if not isinstance(x, RaggedTokens):
        return again(block, x, *args)
    # Pass the values as a tensor, so that autograd's hooks for saved tensors see it, e.g. to offload it.
    places = x.with_x(x.x.new_empty(0))
    return again(lambda values: block(places.with_x(values), *args), x.x)


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    # Restore the statistics instead of switching updates off: the operator must save the same tensors as before.
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)
