"""Ragged tokens on their dense grid, for networks whose blocks convolve or pool it (MViT, CvT).

The dense grid has zeros (or another value) for dropped tokens. A cell of a coarser grid covers the tokens p with
p // stride == cell, and is present if one of these tokens is. If a stride does not divide the grid, the last cells of
an axis cover fewer tokens.

Shapes: as in `ats/tokens.py`; grids are (T, H, W) in (t h w) order, T = 1 for images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ats.models.cost import Grid
from ats.tokens import Layout, RaggedTokens

ONE: Grid = (1, 1, 1)


def coarsen(tokens: RaggedTokens, stride: Grid) -> RaggedTokens:
    """The present cells of a grid coarser by `stride`. Their x is only a placeholder, unless the grids are equal."""
    if stride == ONE:
        return tokens
    num_prefix = tokens.num_prefix_tokens
    present = tokens.to_grid(torch.ones_like(tokens.position, dtype=torch.bool))[:, num_prefix:]
    present = present.unflatten(1, tokens.grid)[:, None].float()
    mask = F.max_pool3d(present, stride, stride, ceil_mode=True)[:, 0] > 0
    grid = tuple(mask.shape[1:])
    mask = F.pad(mask.flatten(1), (num_prefix, 0), value=True)
    position = mask.nonzero()[:, 1]
    return replace(
        tokens,
        x=position,
        layout=Layout.from_lengths(mask.sum(dim=1), longest_of_none=mask.shape[1]),
        position=position,
        num_positions=mask.shape[1],
        max_tokens=rescale(tokens.max_tokens, tokens.num_positions, mask.shape[1], num_prefix),
        grid=grid,
    )


def tokens_of_cells(cells: Tensor, grid: Grid, stride: Grid) -> Tensor:
    """A mask of cells [S, t, h, w] -> the mask of the tokens they cover on `grid`, [S, T, H, W]."""
    for axis, step in enumerate(stride):
        cells = cells.repeat_interleave(step, dim=axis + 1)
    return cells[:, : grid[0], : grid[1], : grid[2]]


def rescale(max_tokens: int, num_positions: int, new_num_positions: int, num_prefix: int) -> int:
    """`max_tokens` of one grid for another, in proportion. Rounding makes cells -> tokens -> cells the identity."""
    bound, old, new = max_tokens - num_prefix, num_positions - num_prefix, new_num_positions - num_prefix
    return num_prefix + (max(bound * new // old, min(bound, 1)) if new < old else -(-bound * new // old))


def divide(grid: Grid, stride: Grid) -> Grid:
    """Grid over stride, rounded up."""
    return tuple(-(-n // s) for n, s in zip(grid, stride, strict=True))


def convolved_grid(
    sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[int, ...]:
    """Output sizes of a convolution or pooling."""
    return tuple((n + 2 * p - k) // s + 1 for n, k, s, p in zip(sizes, kernel, stride, padding, strict=True))
