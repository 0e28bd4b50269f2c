"""Scores, inverse transform sampling (official rule) and the choice of rows: native functions for a CPU, by Numba.

In PyTorch they are some eighty operations, and for a few images cost what calling eighty operations costs. Here they
are three calls, each of which looks at one sequence after the other, so what a sequence gets cannot depend on its
batch. PyTorch's operations (`sampling.py`, `models/ats_block.py`, `tokens.py`) are the reference and what runs
everywhere else; tests/test_numba_kernels.py compares the two: the choice of tokens number by number, the scores to
round-off.

Numba builds the functions when they are first called (seconds) and keeps the result on disk.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

_TINY = np.float32(torch.finfo(torch.float32).tiny)


def official_rule(scores: Tensor, lengths: Tensor, slots: int, num_points: int) -> Tensor:
    """See `ats.kernels.official_rule`; scores float32."""
    keep = torch.zeros(scores.shape, dtype=torch.bool)
    _official_rule(scores.detach().numpy(), lengths.numpy(), slots, num_points, keep.numpy())
    return keep


def cls_scores(
    q: Tensor, k: Tensor, v: Tensor | None, *, lengths: Tensor, longest: int, rows_apart: int, scale: float
) -> Tensor:
    """See `ats.kernels.cls_scores`; computed in float32, channels side by side.

    Args:
        rows_apart: from the first row of a sequence to that of the next; 0: as many as it has.
    """
    with_norm = v is not None
    v = v if with_norm else k
    scores = np.zeros((len(q), longest), np.float32)
    _cls_scores(
        *_flat(q), *_flat(k), *_flat(v),
        lengths.numpy(), rows_apart, q.shape[1], q.shape[2], v.shape[2], scale, with_norm, scores,
    )  # fmt: skip
    return torch.from_numpy(scores)


def kept_rows(mask: Tensor, position: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `ats.kernels.kept_rows`."""
    rows, kept_position, kept_lengths = _kept_rows(mask.numpy(), position.numpy(), lengths.numpy())
    return torch.from_numpy(rows), torch.from_numpy(kept_position), torch.from_numpy(kept_lengths)


def _flat(x: Tensor) -> tuple[np.ndarray, int, int]:
    """[T, H, D] as one row of float32 that lie side by side, for the compiler to see it, and the strides of T and H."""
    x = x.detach().float()
    (rows, heads, width), (row, head, _) = x.shape, x.stride()
    size = (rows - 1) * row + (heads - 1) * head + width
    return x.as_strided((size,), (1,)).numpy(), row, head


@njit(cache=True, nogil=True)
def _official_rule(scores, lengths, slots, num_points, keep):
    half, one = np.float32(0.5), np.float32(1)
    for s in range(len(lengths)):
        count = lengths[s]
        if count == 0:
            continue
        total = np.float32(0)
        for i in range(count):
            total += scores[s, i]
        usable = total > 0 and total < np.inf
        # Bits of a float that is not negative order like the float: sorting them with the index below is stable.
        keys = np.empty(count, np.uint64)
        row = np.ones(count, np.float32)
        if usable:
            for i in range(count):
                row[i] = scores[s, i]
        bits = row.view(np.uint32)
        for i in range(count):
            keys[i] = (np.uint64(bits[i]) << np.uint64(32)) | np.uint64(i)
        keys.sort()
        # Summed in float64 and rounded at each entry, as PyTorch does.
        cdf = np.empty(count, np.float32)
        running = 0.0
        for i in range(count):
            running += row[keys[i] & np.uint64(0xFFFFFFFF)]
            cdf[i] = running
        lowest = row[keys[0] & np.uint64(0xFFFFFFFF)]
        last = cdf[count - 1]
        if not (count == slots and lowest < last):
            lowest = np.float32(0)
        first = np.float32(np.inf)
        for i in range(count):
            cdf[i] = max((cdf[i] - lowest) / (last - lowest), np.float32(0))
            if cdf[i] > 0 and cdf[i] < first:
                first = cdf[i]
        step = max((one - first) / np.float32(max(num_points - 1, 1)), _TINY)
        below = np.float32(0)
        for i in range(count):
            upper = np.float32(num_points)
            if i + 1 < count:
                middle = (cdf[i] + cdf[i + 1]) * half
                upper = np.float32(math.floor(min((middle - first) / step, upper))) + one
                upper = min(max(upper, np.float32(0)), np.float32(num_points))
            keep[s, keys[i] & np.uint64(0xFFFFFFFF)] = upper > below
            below = upper


@njit(cache=True, nogil=True, fastmath={"reassoc", "contract", "nsz"})
def _cls_scores(
    q, q_row, q_head, k, k_row, k_head, v, v_row, v_head,
    lengths, rows_apart, num_heads, head_dim, value_dim, scale, with_norm, scores,
):  # fmt: skip
    scaled = np.empty(head_dim, np.float32)
    logits = np.empty(scores.shape[1], np.float32)
    first, after = 0, 0
    for s in range(len(lengths)):
        count = lengths[s]
        first, after = after, after + (rows_apart if rows_apart else count)
        for h in range(num_heads):
            query = q[s * q_row + h * q_head : s * q_row + h * q_head + head_dim]
            for d in range(head_dim):
                scaled[d] = query[d] * np.float32(scale)
            highest = np.float32(-np.inf)
            for t in range(count):
                at = (first + t) * k_row + h * k_head
                key = k[at : at + head_dim]
                logit = np.float32(0)
                for d in range(head_dim):
                    logit += scaled[d] * key[d]
                logits[t] = logit
                highest = max(highest, logit)
            total = np.float32(0)
            for t in range(count):
                logits[t] = np.exp(logits[t] - highest)
                total += logits[t]
            for t in range(count):
                scores[s, t] += logits[t] / total
        if with_norm:
            for t in range(count):
                square = np.float32(0)
                for h in range(num_heads):
                    at = (first + t) * v_row + h * v_head
                    value = v[at : at + value_dim]
                    for d in range(value_dim):
                        square += value[d] * value[d]
                scores[s, t] *= math.sqrt(square)


@njit(cache=True, nogil=True)
def _kept_rows(mask, position, lengths):
    rows, kept_position = np.empty_like(position), np.empty_like(position)
    kept_lengths = np.empty_like(lengths)
    first, total = 0, 0
    for s in range(len(lengths)):
        before = total
        for t in range(lengths[s]):
            if mask[s, t]:
                rows[total] = first + t
                kept_position[total] = position[first + t]
                total += 1
        first += lengths[s]
        kept_lengths[s] = total - before
    return rows[:total], kept_position[:total], kept_lengths
