"""Multiply-adds of the parts models are made of, from token counts; float64 tensors, one number per sequence.

Counted: matrix products and convolutions, the scoring row included. Not counted, as everywhere in the field: element-
    wise work
(LayerNorm, softmax, GELU, residuals, the norm of the values, sorting 200 numbers).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ats.models.block import ATSBlock
from ats.reduction.sampling import BlockSampler
from ats.tokens import KeptTokens


def block_multiply_adds(
    block: nn.Module, num_in: Tensor, num_out: Tensor, *, paper: bool, num_scored: Tensor | None = None
) -> Tensor:
    """A ViT block that gets `num_in` [S] tokens and keeps `num_out` [S].

    As run, an ATS block projects and attends from kept queries alone, and pays for one more query (CLS) and its row of
    scores. In the paper's accounting, which is the official code's work, it projects all queries and computes the whole
    N x N matrix of logits; dropped rows are left out from A^s V on. A block that merges or fuses tokens attends N x N;
    as run, it also pays for finding which.

    Args:
        num_scored: [S] side of the N x N matrix of the score mean_attention, by default `num_in`; frames of a clip are
            padded to their longest.
    """
    attn, attn_dim = block.attn, block.attn.proj.in_features
    if getattr(attn, "qkv", None) is not None:
        q, kv = attn.qkv.in_features * attn_dim, 2 * attn.qkv.in_features * attn_dim
    else:
        q, kv = linear_multiply_adds(attn.q_proj), linear_multiply_adds(attn.k_proj) + linear_multiply_adds(attn.v_proj)
    n, m = num_in, num_out
    gate = getattr(attn, "gate", None)
    project = linear_multiply_adds(attn.proj) + (0 if gate is None else linear_multiply_adds(gate))
    mlp = linears_multiply_adds(block.mlp)
    after = m * (project + mlp)
    sampler = block.sampler if isinstance(block, ATSBlock) else None
    if sampler is not None and not isinstance(sampler, BlockSampler):  # every token attends; fewer go on to the MLP
        extra = 0 if paper else sampler.multiply_adds(n, attn_dim // attn.num_heads, attn.num_heads)
        return n * (q + kv) + 2 * n * n * attn_dim + n * project + m * mlp + extra
    if sampler is None or paper:
        return n * (q + kv) + n * n * attn_dim + m * n * attn_dim + after
    if sampler.score == "mean_attention":
        scored = n if num_scored is None else num_scored
        scoring = n * q + scored * scored * attn_dim
    else:
        scoring = q + n * attn_dim
    return n * kv + scoring + m * q + 2 * m * n * attn_dim + after


def blocks_multiply_adds(
    blocks: nn.ModuleList,
    trace: list[KeptTokens],
    num_tokens: int,
    num_sequences: int,
    *,
    paper: bool,
    num_frames: int = 1,
) -> Tensor:
    """All blocks of a ViT: `num_tokens` come in, `trace` says how many leave each ATS block.

    Args:
        num_frames: consecutive sequences that make a sample.

    Returns:
        [S], per sequence.
    """
    kept = {entry.block: entry.num_tokens.double() for entry in trace}
    n = torch.full(
        (num_sequences,), num_tokens, dtype=torch.float64, device=trace[0].num_tokens.device if trace else None
    )
    total = torch.zeros_like(n)
    for index, block in enumerate(blocks):
        m = kept.get(index, n)
        longest = n.unflatten(0, (-1, num_frames)).amax(dim=1).repeat_interleave(num_frames)
        total = total + block_multiply_adds(block, n, m, paper=paper, num_scored=longest)
        n = m
    return total


def linear_multiply_adds(layer: nn.Linear, num_tokens: int = 1) -> int:
    """A linear layer on `num_tokens` tokens."""
    return num_tokens * layer.in_features * layer.out_features


def linears_multiply_adds(module: nn.Module) -> int:
    """Every linear layer of a module, once, on one token."""
    return sum(linear_multiply_adds(layer) for layer in module.modules() if isinstance(layer, nn.Linear))


def conv_multiply_adds(layer: nn.Conv2d | nn.Conv3d, num_outputs: int) -> int:
    """A convolution with `num_outputs` output positions."""
    return num_outputs * layer.weight.numel()
