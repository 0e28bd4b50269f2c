"""Multiply-adds of CvT, from the tokens that were kept.

Convolutions run on the whole grid and are counted so. Which keys are there follows from where the kept tokens lie, so
their masks are carried through the last stage as in the forward pass. As run, an ATS block projects and attends from
kept queries alone; in the paper's accounting every query is projected and meets every key.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ats.models.cost import conv_multiply_adds, linear_multiply_adds
from ats.models.cvt.ats_block import ConvATSBlock
from ats.models.dense_grid import kept_grid, present_cells
from ats.tokens import KeptTokens


def cvt_multiply_adds(
    model: nn.Module, trace: list[KeptTokens], input_shape: tuple[int, ...], *, paper: bool
) -> Tensor:
    """Multiply-adds [B] (float64) of a batch of `input_shape` whose forward pass left `trace`."""
    batch_size, _, *grid = input_shape
    kept_by = {entry.block: entry for entry in trace}
    device = trace[0].num_tokens.device if trace else None
    total = torch.full((batch_size,), linear_multiply_adds(model.head), dtype=torch.float64, device=device)
    index = 0
    for stage in model.stages:
        embed = stage.patch_embed.proj
        grid = conv_grid(grid, embed)
        total = total + conv_multiply_adds(embed, grid[0] * grid[1])
        mask = torch.ones(batch_size, 1, *grid, dtype=torch.bool, device=device)
        for block in stage.blocks:
            kept = kept_grid(kept_by[index], mask) if index in kept_by else mask
            total = total + block_multiply_adds(block, mask, kept, stage.num_prefix_tokens, paper=paper)
            mask, index = kept, index + 1
    return total


def block_multiply_adds(block: nn.Module, mask: Tensor, kept: Tensor, num_prefix: int, *, paper: bool) -> Tensor:
    """One block that gets the tokens of `mask` [B, 1, H, W] and keeps those of `kept`; [B]."""
    attn, dim, hidden = block.attn, block.spec.dim, block.mlp.fc1.out_features
    grid = list(mask.shape[2:])
    convolutions = 0
    for conv in (attn.conv_proj_q, attn.conv_proj_k, attn.conv_proj_v):
        if conv is not None and hasattr(conv, "conv"):
            height, width = conv_grid(grid, conv.conv)
            convolutions += conv_multiply_adds(conv.conv, height * width)
    n, m = (num_prefix + t.flatten(1).sum(1).double() for t in (mask, kept))
    keys = num_prefix + num_keys(block, mask)

    cost = convolutions + 2 * keys * dim * dim + m * dim * dim + 2 * m * dim * hidden
    sampler = block.sampler if isinstance(block, ConvATSBlock) else None
    if paper or sampler is None:
        return cost + n * dim * dim + (n + m) * keys * dim
    num_scoring = n if sampler.score == "mean_attention" else 1
    num_projected = n if sampler.score == "mean_attention" else m + 1
    return cost + num_projected * dim * dim + num_scoring * keys * dim + 2 * m * keys * dim


def num_keys(block: nn.Module, mask: Tensor) -> Tensor:
    """Keys [B] of the tokens in `mask` [B, 1, H, W], CLS left out."""
    conv = block.attn.conv_proj_k
    if conv is None:
        cells = mask
    elif isinstance(block, ConvATSBlock):
        cells = present_cells(mask, block.key_stride)
    elif hasattr(conv, "avg"):
        cells = torch.ones_like(conv.avg(mask.double()))
    else:
        cells = mask.new_ones(len(mask), *conv_grid(mask.shape[2:], conv.conv))
    return cells.flatten(1).sum(1).double()


def conv_grid(grid: list[int], conv: nn.Conv2d) -> list[int]:
    """Height and width after a convolution."""
    sizes = zip(grid, conv.kernel_size, conv.stride, conv.padding, strict=True)
    return [(size + 2 * padding - kernel) // stride + 1 for size, kernel, stride, padding in sizes]
