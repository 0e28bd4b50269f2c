"""PPT (Wu et al., PPT: Token Pruning and Pooling for Efficient Vision Transformers, 2023): in a few blocks, after the
attention, every image loses r tokens. If its significance scores are nearly equal it merges similar tokens, as in ToMe;
if they vary it drops the lowest ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ats.lazy import torch
from ats.options import FROM_0, option
from ats.reduction.base import Scheduled, Step, register
from ats.reduction.merging import Matching, bipartite_soft_matching, cls_row, inverse, repack_matched, sizes
from ats.reduction.scores import significance_score, usable

if TYPE_CHECKING:
    from torch import Tensor

    from ats.tokens import RaggedTokens


@register("ppt")
@dataclass(frozen=True)
class PPT(Scheduled):
    """Drop or merge, image by image."""

    title = "PPT"
    amount = "r"
    after_attention = True
    needs_cls = drops = True

    r: int = option(
        50,
        "Of ATS.SAMPLER ppt: tokens to drop or merge away in each of ATS.BLOCKS (at most half of those present); or a "
        "list with one entry per block of the network.",
        within=FROM_0,
        types=(int, list),
        per_block=True,
        give="the number of tokens to drop or merge away, 0 or more",
    )
    threshold: float = option(
        7e-5,
        "Of ATS.SAMPLER ppt: an image merges tokens if the variance of its scores (summing to 1) is below this, else "
        "it drops them. The variance falls with the square of the number of tokens: the default is for 196 patches.",
        within=FROM_0,
    )
    prop_attn: bool = option(
        True,
        "Of ATS.SAMPLER ppt: proportional attention, which adds the log of a key's size to its logits; False: averages "
        "ignore sizes too.",
    )

    @property
    def size_factor(self) -> float:
        return float(self.prop_attn)

    def num_gone(self, num_tokens: int) -> int:
        """How many of `num_tokens` tokens, prefix tokens included, are dropped or merged away."""
        return max(min(self.r, (num_tokens - self.num_prefix_tokens) // 2), 0)

    def limit(self, max_tokens: int) -> int:
        return max_tokens - self.num_gone(max_tokens)

    def merge(self, step: Step) -> RaggedTokens:
        """The tokens that stay, after a merge in ToMe's order, else by descending score. The order is not spatial, and
        it decides how a later merge splits the tokens.
        """
        tokens, layout, num_prefix = step.kept, step.kept.layout, self.num_prefix_tokens
        if self.num_gone(tokens.max_tokens) == 0:
            return tokens  # no sequence has any to lose, in any batch
        lengths = None if layout.uniform and layout.full else layout.lengths
        dtype = torch.promote_types(step.k.dtype, torch.float32)
        with torch.autocast(step.k.device.type, enabled=False):
            norm = layout.pad(torch.linalg.vector_norm(step.v.detach().flatten(1), dim=1, dtype=dtype))
            valid = layout.mask[:, num_prefix:]
            score = significance_score(cls_row(step).detach(), norm)[:, num_prefix:].masked_fill(~valid, 0)
            score = usable(score, valid)
            score = score / score.sum(dim=1, keepdim=True)
            metric = layout.pad(step.k.detach().to(dtype).mean(dim=1))
            merging = bipartite_soft_matching(metric, self.r, num_prefix_tokens=num_prefix, lengths=lengths)
            dropping = keep_highest(score.masked_fill(~valid, -1), merging, num_prefix_tokens=num_prefix)
            merges = (variance(score, valid) < self.threshold)[:, None]
            matching = Matching(
                torch.where(merges, merging.order, dropping.order),
                torch.where(merges, merging.target, dropping.target),
                merging.lengths,
            )
            size = sizes(tokens if self.prop_attn else replace(tokens, size=None), dtype)
            return repack_matched(
                step,
                matching,
                layout.pad(size),
                max_tokens=self.limit(tokens.max_tokens),
                size_factor=self.size_factor,
                uniform=lengths is None,
            )

    def multiply_adds(self, num_in: Tensor, num_out: Tensor, *, head_dim: int, num_heads: int) -> Tensor:
        """Of the attention row of CLS and of the similarities, which every image computes."""
        num_a = torch.ceil(num_in / 2)
        return num_in * head_dim * num_heads + num_a * (num_in - num_a) * head_dim

    @classmethod
    def usual_blocks(cls, depth: int) -> list[int]:
        """After a quarter, a half and three quarters of the depth."""
        return sorted({depth * quarter // 4 for quarter in (1, 2, 3)})

    def scaled(self, scale: float, max_tokens: int, stagger: float) -> PPT:
        r = (1 - scale) * (max_tokens // 2) * self.schedule_factor
        return replace(self, r=max(math.floor(r + stagger), 0))


def variance(scores: Tensor, valid: Tensor) -> Tensor:
    """[S] unbiased variance of scores [S, M] where `valid`; NaN for a single score."""
    num = valid.sum(dim=1)
    mean = scores.sum(dim=1) / num
    return ((scores - mean[:, None]) * valid).square().sum(dim=1) / (num - 1)


def keep_highest(scores: Tensor, like: Matching, *, num_prefix_tokens: int) -> Matching:
    """Keep the highest scores, in descending order, as many as the matching `like` leaves; drop the others.

    Args:
        scores: [S, M] without prefix tokens, below 0 for padding.
    """
    order = scores.sort(dim=1, descending=True, stable=True).indices + num_prefix_tokens
    prefix = torch.arange(num_prefix_tokens, device=order.device).expand(order.shape[0], -1)
    order = torch.cat([prefix, order], dim=1)
    rank = inverse(order)
    return Matching(order[:, : like.order.shape[1]], rank.masked_fill(rank >= like.lengths[:, None], -1), like.lengths)
