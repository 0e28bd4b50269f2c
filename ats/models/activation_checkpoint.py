"""Activation checkpointing (Chen et al., 2016): a block keeps its input alone and is computed again in the backward
pass. Memory for one more forward pass in time; losses and gradients stay what they are.

The second time everything is as it was the first: dropout and stochastic depth draw the same numbers (their generators
are set back), so the block sees the same input, gives the same scores and keeps the same tokens. What must not happen
twice is the update of batch norm's running statistics (CvT): they are put back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ats.tokens import RaggedTokens

BLOCK_LISTS = ("blocks", "trans_layers")  # what networks call the list of blocks that they run by `run_block`


def set_grad_checkpointing(model: nn.Module, enable: bool = True) -> None:
    """Recompute (or not) the blocks of a network of this package, or of timm's, in training."""
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(enable)
        return
    lists = [module for name, module in model.named_modules() if name.rpartition(".")[2] in BLOCK_LISTS]
    for block in [block for blocks in lists for block in blocks]:
        block.grad_checkpointing = enable


def run_block(block: nn.Module, x: Tensor | RaggedTokens, *args: object) -> object:
    """`block(x, *args)`, to be computed again in the backward pass if `set_grad_checkpointing` says so."""
    if not (getattr(block, "grad_checkpointing", False) and torch.is_grad_enabled()):
        return block(x, *args)
    again = partial(checkpoint, use_reentrant=False, context_fn=partial(_contexts, block))
    if not isinstance(x, RaggedTokens):
        return again(block, x, *args)
    # The values go in as a tensor of their own: what autograd keeps is then seen by its hooks, e.g. to offload it.
    places = x.with_x(x.x.new_empty(0))
    return again(lambda values: block(places.with_x(values), *args), x.x)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Where the block runs the first and the second time."""
    return nullcontext(), _statistics_kept(block)


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    # Put back rather than switched off: the operator must save for its backward pass what it saved the first time.
    norms = [module for module in block.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    before = [(buffer, buffer.clone()) for norm in norms for buffer in norm.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)
