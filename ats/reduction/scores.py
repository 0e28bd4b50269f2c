"""Significance scores [paper, section 3]: how much the output of CLS would change without a token.

    (1)  s_j = sum_h A_h[cls, j] * ||v_j||

`||v_j||` is the norm of the concatenated heads. Variants omit the norm (`cls_attention`), or use the mean attention
that a token gets (`mean_attention`, for networks without CLS). Scores are not normalised: that cancels in the CDF.

Scores are computed in float32 or better, also under autocast: half precision must not decide which token wins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ats.lazy import torch
from ats.reduction.base import Candidates

if TYPE_CHECKING:
    from torch import Tensor

    from ats.tokens import Layout, RaggedTokens


def significance_score(attention: Tensor, value_norm: Tensor | None) -> Tensor:
    """(1), not normalised.

    Args:
        attention: [S, H, M] attention of CLS (or of all tokens on average) to each candidate.
        value_norm: [S, M] norm of each candidate's value over all heads; None leaves it out.

    Returns:
        [S, M] scores.
    """
    score = attention.sum(dim=1)
    return score if value_norm is None else score * value_norm


def usable(scores: Tensor, valid: Tensor) -> Tensor:
    """Scores in float32 or better. A sequence whose scores are not finite or have no mass gets `valid`, i.e. ones."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    total = scores.sum(dim=1, keepdim=True)
    return torch.where((total > 0) & (total < torch.inf), scores, valid)


def average_over_frames(candidates: Candidates, frames_per_clip: int) -> Candidates:
    """One set of candidates per clip, whose `frames_per_clip` consecutive sequences hold the same tokens.

    Each frame's scores are normalised before averaging, so all frames count equally.
    """
    scores = usable(candidates.scores, candidates.valid)
    return Candidates(
        (scores / scores.sum(dim=1, keepdim=True)).unflatten(0, (-1, frames_per_clip)).mean(dim=1),
        lengths=candidates.lengths[::frames_per_clip].contiguous(),
        max_tokens=candidates.max_tokens,
        num_positions=candidates.num_positions,
        position=lambda: candidates.position[::frames_per_clip],
        merged=candidates.merged,
    )


def score_candidates(
    score: str,
    keys: RaggedTokens,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    queries: Layout | None = None,
    bias: Tensor | None = None,
) -> Candidates:
    """The tokens of `keys` as candidates, with their scores.

    Args:
        score: name in `base.SCORES`.
        keys: the tokens to score; their x is not read.
        q: [S, H, D] of CLS; for mean_attention [T_q, H, D] of all queries.
        k, v: [T, H, D].
        queries: layout of q for mean_attention; None: the layout of the keys.
        bias: added to the logits, [S, 1 or H, Mq, M]; Mq is 1 for CLS.
    """
    from ats import kernels

    layout, num_prefix = keys.layout, keys.num_prefix_tokens
    scores = None
    if bias is None and score != "mean_attention":
        value = v if score == "cls_attention_value_norm" else None
        scores = kernels.cls_scores(q, k, value, keys=layout, scale=scale)
    if scores is not None:
        scores = scores[:, num_prefix:]
    else:
        scores = _plain_scores(score, keys, q, k, v, scale=scale, queries=queries, bias=bias)
        if not (layout.full and layout.uniform):
            scores = scores.masked_fill(~layout.mask[:, num_prefix:], 0)
    return Candidates(
        scores,
        lengths=layout.lengths - num_prefix,
        max_tokens=keys.max_tokens - num_prefix,
        num_positions=keys.num_positions,
        position=lambda: layout.pad(keys.position)[:, num_prefix:],
        merged=keys.size is not None,
    )


def _plain_scores(
    score: str,
    keys: RaggedTokens,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    queries: Layout | None,
    bias: Tensor | None,
) -> Tensor:
    """[S, M] of the candidates; arbitrary past the end of a sequence."""
    from ats.attention import cls_attention, mean_attention

    layout, num_prefix = keys.layout, keys.num_prefix_tokens
    dtype = torch.promote_types(k.dtype, torch.float32)
    with torch.autocast(k.device.type, enabled=False):
        q, k = q.to(dtype), k.to(dtype)
        if score == "mean_attention":
            attention = mean_attention(q, k, layout=layout, queries=queries, scale=scale, bias=bias)
        else:
            attention = cls_attention(q, k, keys=layout, scale=scale, bias=None if bias is None else bias[:, :, 0])
        value_norm = None
        if score == "cls_attention_value_norm":
            value_norm = layout.pad(torch.linalg.vector_norm(v.flatten(1), dim=1, dtype=dtype))[:, num_prefix:]
        return significance_score(attention[:, :, num_prefix:], value_norm)
