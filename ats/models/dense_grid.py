"""Ragged tokens on their grid: for networks whose blocks convolve or pool it (MViT, CvT).

A canvas is the whole grid with zeros (or another value) where tokens were dropped. A cell of a coarser grid stands for
the tokens p with p // stride == cell, and is there if one of them is.

Shapes: as in `ats/tokens.py`; grids are (T, H, W) in (t h w) order, T = 1 for images.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from ats.tokens import KeptTokens, Layout, RaggedTokens

Grid = tuple[int, int, int]
ONE: Grid = (1, 1, 1)


def coarsen(tokens: RaggedTokens, grid: Grid, stride: Grid) -> RaggedTokens:
    """The cells of a grid coarser by `stride` that stand for at least one of the tokens on `grid`.

    Returns:
        Layout, positions and slots of the cells. Their x is the tokens' own where the grids are the same, else only
        a placeholder.
    """
    if stride == ONE:
        return tokens
    num_prefix = tokens.num_prefix_tokens
    there = torch.ones_like(tokens.position, dtype=torch.bool)
    mask = present_cells(tokens.to_grid(there)[:, num_prefix:].unflatten(1, grid), stride).flatten(1)
    mask = F.pad(mask, (num_prefix, 0), value=True)
    position = mask.nonzero()[:, 1]
    return replace(
        tokens,
        x=position,
        layout=Layout.from_lengths(mask.sum(dim=1), longest_of_none=mask.shape[1]),
        position=position,
        num_positions=mask.shape[1],
        slots=rescale(tokens.slots, tokens.num_positions, mask.shape[1], num_prefix),
    )


def present_cells(mask: Tensor, stride: Grid) -> Tensor:
    """[S, T, H, W] bool, True where a token is -> the same of a grid coarser by `stride`, sizes rounded up."""
    if stride == ONE:
        return mask
    return F.max_pool3d(mask[:, None].float(), stride, stride, ceil_mode=True)[:, 0] > 0


def tokens_of_cells(cells: Tensor, grid: Grid, stride: Grid) -> Tensor:
    """[S, t, h, w] bool, True at some cells -> [S, T, H, W], True at the tokens on `grid` they stand for."""
    for axis, step in enumerate(stride):
        cells = cells.repeat_interleave(step, dim=axis + 1)
    return cells[:, : grid[0], : grid[1], : grid[2]]


def kept_grid(entry: KeptTokens, like: Tensor) -> Tensor:
    """The patches of a trace entry as a mask [S, T, H, W]."""
    mask = torch.zeros_like(like)
    sequence = torch.arange(len(mask), device=mask.device).repeat_interleave(entry.num_tokens)
    is_patch = entry.position >= entry.num_prefix_tokens
    mask.flatten(1)[sequence[is_patch], entry.position[is_patch] - entry.num_prefix_tokens] = True
    return mask


def rescale(slots: int, num_positions: int, new_num_positions: int, num_prefix: int) -> int:
    """Token slots on a grid as slots on another, in proportion: a number of the configuration alone.

    Rounded up on a finer grid and down on a coarser one, so that cells told in tokens and in cells again are as many.
    """
    slots, old, new = slots - num_prefix, num_positions - num_prefix, new_num_positions - num_prefix
    return num_prefix + (max(slots * new // old, min(slots, 1)) if new < old else -(-slots * new // old))
