"""Multiply-adds of MViT, from the tokens that were kept.

What a block computes depends on where the kept tokens lie (a cell is there if one of its tokens is), so the masks of
kept tokens are carried through the network as in the forward pass. Convolutions run on the whole grid and are counted
so. As run, an ATS block attends from kept queries alone; relative positions are a product with all distances and part
of wider queries and keys, with values as wide (`mvit_ats.py`). In the paper's accounting every query is projected and
meets every key, and positions are an added matrix, as in the dense block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ats.models.cost import conv_multiply_adds, linear_multiply_adds
from ats.models.dense_grid import ONE, Grid, kept_grid, present_cells
from ats.models.mvit.ats_block import MultiScaleATSBlock
from ats.models.mvit.dense import convolved_grid
from ats.tokens import KeptTokens


@dataclass
class Counts:
    """Tokens of a block, per sequence [S], CLS counted: that come in, queries before sampling, keys, kept queries."""

    num_in: Tensor
    queries: Tensor
    keys: Tensor
    kept: Tensor


def mvit_multiply_adds(
    model: nn.Module, trace: list[KeptTokens], input_shape: tuple[int, ...], *, paper: bool
) -> Tensor:
    """Multiply-adds [B] (float64) of a batch of `input_shape` whose forward pass left `trace`."""
    num_prefix, stem = model.num_prefix_tokens, model.patch_embed.proj
    grid: Grid = (1, *convolved_grid(input_shape[2:], stem.kernel_size, stem.stride, stem.padding))[-3:]
    kept_by = {entry.block: entry for entry in trace}
    device = trace[0].num_tokens.device if trace else None
    mask = torch.ones(input_shape[0], *grid, dtype=torch.bool, device=device)
    total = torch.zeros(input_shape[0], dtype=torch.float64, device=device)
    total += conv_multiply_adds(stem, grid[0] * grid[1] * grid[2]) + linear_multiply_adds(model.head.projection)
    for index, block in enumerate(model.blocks):
        spec = block.spec
        query_mask = present_cells(mask, ONE if spec.pool_q is None else spec.pool_q.stride)
        key_mask = present_cells(mask, ONE if spec.pool_kv is None else spec.pool_kv.stride)
        kept_mask = query_mask
        if index in kept_by:
            kept_mask = kept_grid(kept_by[index], query_mask)
        counts = Counts(*(num_prefix + m.flatten(1).sum(1).double() for m in (mask, query_mask, key_mask, kept_mask)))
        total = total + block_multiply_adds(block, counts, grid, num_prefix, paper=paper)
        mask, grid = kept_mask, spec.query_grid(grid)
    return total


def block_multiply_adds(block: nn.Module, counts: Counts, grid: Grid, num_prefix: int, *, paper: bool) -> Tensor:
    """One block with an input on `grid`; see the module for the accountings."""
    spec, attn = block.spec, block.attn
    dim = spec.dim_attn
    n, queries, keys, m = counts.num_in, counts.queries, counts.keys, counts.kept
    query_grid, key_grid = spec.query_grid(grid), spec.key_grid(grid)
    is_ats = isinstance(block, MultiScaleATSBlock)
    sampler = block.sampler if is_ats else None

    cost = 2 * n * spec.dim_in * dim  # keys and values
    for pool, size in ((attn.pool_q, query_grid), (attn.pool_k, key_grid), (attn.pool_v, key_grid)):
        if isinstance(pool, nn.Conv3d):
            cost = cost + attn.num_heads * conv_multiply_adds(pool, size[0] * size[1] * size[2])
    tables = (attn.rel_pos_t, attn.rel_pos_h, attn.rel_pos_w)
    sizes = [sizes for table, *sizes in zip(tables, query_grid, key_grid, strict=True) if table is not None]
    coordinates = sum(num_k for _, num_k in sizes)
    if paper or not is_ats:
        cost = cost + coordinates * dim * (queries - num_prefix)
        cost = cost + n * spec.dim_in * dim + queries * keys * dim + m * keys * dim
    else:
        if attn.has_rel_pos:
            num_distances = sum(2 * max(size) - 1 for size in sizes)
            cost = cost + (num_distances + 1) * dim * queries
        width = dim + attn.num_heads * (coordinates + -coordinates % 8)  # of queries, keys and values, all heads
        num_projected = n if block.projects_all_queries else m + (sampler is not None)
        cost = cost + num_projected * spec.dim_in * dim + 2 * m * keys * width
        if sampler is not None:
            cost = cost + keys * width * (queries if sampler.score == "mean_attention" else 1)

    cost = cost + m * dim * dim + m * dim * block.mlp.fc1.out_features + m * block.mlp.fc1.out_features * spec.dim_out
    if block.proj is not None:
        before_pooling = block.widens_in_attention and block.pool_skip is not None
        cost = cost + (n if before_pooling else m) * spec.dim_out * (spec.dim_in if block.widens_in_attention else dim)
    return cost
