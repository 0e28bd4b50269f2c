"""Multiply-adds of a timm vision transformer from its token counts; conventions in `cost.py`."""

from __future__ import annotations

import copy

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ats.models.cost import blocks_multiply_adds, conv_multiply_adds, linear_multiply_adds, linears_multiply_adds
from ats.tokens import KeptTokens


def model_multiply_adds(
    model: nn.Module, trace: list[KeptTokens], input_shape: tuple[int, ...], *, paper: bool
) -> Tensor:
    """Multiply-adds of each image [B] (float64): embedding, blocks, pooling and head."""
    batch_size, _, height, width = input_shape
    grid = model.patch_embed.dynamic_feat_size((height, width))
    num_patches = grid[0] * grid[1]
    num_tokens = model.num_prefix_tokens + num_patches
    total = blocks_multiply_adds(model.blocks, trace, num_tokens, batch_size, paper=paper)
    total = total + _embedding_multiply_adds(model, input_shape, num_patches)
    left = trace[-1].num_tokens.double() if trace else torch.full_like(total, num_tokens)
    pool = getattr(model, "attn_pool", None)
    if pool is not None:
        has_switch = hasattr(model, "pool_include_prefix")
        num_pooled = left - model.num_prefix_tokens if has_switch and not model.pool_include_prefix else left
        total = total + _attention_pool_multiply_adds(pool, num_pooled)
    rows = left if model.global_pool == "" and pool is None else 1
    heads = [head for head in (model.head, getattr(model, "head_dist", None)) if isinstance(head, nn.Linear)]
    return total + rows * sum(map(linear_multiply_adds, heads))


def _embedding_multiply_adds(model: nn.Module, input_shape: tuple[int, ...], num_patches: int) -> int:
    """Of the patch embedding, per image. That of hybrids is a convolutional network: it is counted while it runs, with
    shapes alone.
    """
    embed = model.patch_embed
    if type(embed) is PatchEmbed and isinstance(embed.proj, nn.Conv2d):
        return conv_multiply_adds(embed.proj, num_patches)
    counts, key = model.ats_state.embedding_costs, tuple(input_shape[1:])
    if key not in counts:
        shapes = copy.deepcopy(embed).to("meta").eval()
        x = torch.empty(1, *key, device="meta", dtype=next(embed.parameters()).dtype)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            shapes(x)
        counts[key] = counter.get_total_flops() // 2
    return counts[key]


def _attention_pool_multiply_adds(pool: nn.Module, num_tokens: Tensor) -> Tensor:
    """timm's AttentionPoolLatent over `num_tokens` [B]."""
    latents = pool.latent_len
    per_latent = sum(linears_multiply_adds(part) for part in (pool.q, pool.proj, pool.mlp) if part is not None)
    attention = 2 * latents * num_tokens * pool.kv.in_features
    return latents * per_latent + num_tokens * linear_multiply_adds(pool.kv) + attention
