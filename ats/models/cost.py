"""Multiply-adds of the parts of networks, as float64 tensors with one number per sequence.

As usual, they count matrix products and convolutions, including the scoring row, but no element-wise work (LayerNorm,
softmax, GELU, residuals, norms of values, sorting).

There are two accountings. As run: an ATS block projects and attends from kept queries only, plus one query (CLS) and
its row of scores. Paper: what the official code computes and the paper's tables count, i.e. all queries and the whole
N x N matrix of logits; dropped rows are gone from A^s V on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ats.models.weights import is_linear, projects_parts
from ats.tokens import BlockRecord

Grid = tuple[int, int, int]


@dataclass(frozen=True)
class BlockGrid:
    """Where the tokens of a block lie if none were dropped: grids (T, H, W) of one sequence."""

    tokens: Grid  # of the input
    queries: Grid  # of the output
    keys: Grid  # of the cells that are scored
    time_last: bool = False  # tokens are in the order (h, w, t)

    @classmethod
    def of(cls, *grid: int, time_last: bool = False) -> BlockGrid:
        """One grid (t, h, w) for all."""
        return cls(grid, grid, grid, time_last)

    def dense_record(self, block: int, num_sequences: int, num_prefix: int) -> BlockRecord:
        """The record of a dense block; its `max_tokens` is 0."""
        grids = (self.tokens, self.queries, self.keys, self.queries)
        return BlockRecord(block, *(torch.full((num_sequences,), num_prefix + size(grid)) for grid in grids))


def size(grid: Grid) -> int:
    """Positions of a grid."""
    return grid[0] * grid[1] * grid[2]


def vit_block_multiply_adds(block: nn.Module, record: BlockRecord, *, paper: bool, frames: int = 1) -> Tensor:
    """A ViT block with timm's names, [S]; see the module for the accountings. A block that merges or fuses tokens after
    the attention attends N x N in both. The score mean_attention pads the `frames` consecutive sequences of a sample to
    their longest.
    """
    attn, attn_dim = block.attn, block.attn.proj.in_features
    if getattr(attn, "qkv", None) is not None:
        whole = linear_multiply_adds(attn.qkv)
        q, kv = whole / 3, 2 * whole / 3
    else:
        q, kv = linear_multiply_adds(attn.q_proj), linear_multiply_adds(attn.k_proj) + linear_multiply_adds(attn.v_proj)
    n, m, reduction = record.num_in.double(), record.num_out.double(), record.reduction
    gate = getattr(attn, "gate", None)
    project = linear_multiply_adds(attn.proj) + (0 if gate is None else linear_multiply_adds(gate))
    mlp = linears_multiply_adds(block.mlp)
    extra, parts = 0, projects_parts(attn)
    if reduction is not None and not paper and not record.idle:
        extra = reduction.multiply_adds(n, m, head_dim=attn_dim // attn.num_heads, num_heads=attn.num_heads)
    if reduction is not None and reduction.after_attention:  # every token attends; fewer go on to the MLP
        return n * (q + kv) + 2 * n * n * attn_dim + n * project + m * mlp + extra
    after = m * (project + mlp) + extra
    if reduction is None or paper:
        return n * (q + kv) + n * n * attn_dim + m * n * attn_dim + after
    if not reduction.selects:
        scoring: Tensor | int = 0
    elif reduction.score == "mean_attention":
        scored = n.unflatten(0, (-1, frames)).amax(dim=1).repeat_interleave(frames)
        scoring = (n * q if parts else 0) + scored * scored * attn_dim
    else:
        scoring = (q if parts else 0) + n * attn_dim
    if parts:
        projecting = n * kv + m * q
    else:
        projecting = (n + m * reduction.merges) * (q + kv)  # queries of merged tokens are projected again
    return projecting + scoring + 2 * m * n * attn_dim + after


def linear_multiply_adds(layer: nn.Module, num_tokens: int = 1) -> int:
    """A linear layer on `num_tokens` tokens, its adapters included."""
    return num_tokens * linears_multiply_adds(layer)


def linears_multiply_adds(module: nn.Module) -> int:
    """Every linear layer of a module, once, on one token. For a layer that wraps others (an adapter), count those."""
    total: Any = 0
    for layer in module.modules():
        wraps = any(isinstance(own, nn.Linear) for own in layer.modules() if own is not layer)
        if is_linear(layer) and not wraps:
            total += layer.in_features * layer.out_features
    return total


def conv_multiply_adds(layer: nn.Conv2d | nn.Conv3d, num_outputs: int) -> int:
    """A convolution with `num_outputs` output positions."""
    return num_outputs * layer.weight.numel()
