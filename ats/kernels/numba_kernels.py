"""Native CPU functions built by Numba: scores, inverse transform sampling (official rule), and rows to keep.

In PyTorch these are about eighty operations, dispatch-bound for a few images. Here they are three calls. Each one
handles the sequences one by one, so a sequence's result cannot depend on its batch. PyTorch's operations (`reduction/`,
`tokens.py`) are the reference and run everywhere else. tests/kernels/test_numba_kernels.py compares the two: the choice
of tokens exactly, the scores to round-off.

`prepare` compiles the functions (seconds), or loads them from Numba's cache on disk. They take addresses, because
passing tensors as NumPy arrays takes longer than the work for one image. The wrappers cast dtypes and pass strides
explicitly.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numba import carray, jit, njit, types
from numba.extending import intrinsic
from torch import Tensor

logger = logging.getLogger(__name__)
_warned = False

_TINY = np.float32(torch.finfo(torch.float32).tiny)
# Shapes and strides keep all reads inside the tensor. Numba cuts slices at an array's declared end, so declare none.
_ENDLESS = 2**48


def official_rule(scores: Tensor, lengths: Tensor, full_length: int, num_points: int) -> Tensor:
    """See `ats.kernels.official_rule`; scores float32."""
    lengths = lengths.long().contiguous()
    num_sequences, longest = scores.shape
    keep = scores.new_zeros((num_sequences, longest), dtype=torch.bool)
    _official_rule(
        scores.data_ptr(), *scores.stride(), lengths.data_ptr(), full_length, num_points, num_sequences, longest,
        keep.data_ptr(),
    )  # fmt: skip
    return keep


def cls_scores(
    q: Tensor, k: Tensor, v: Tensor | None, *, lengths: Tensor, longest: int, rows_apart: int, scale: float
) -> Tensor:
    """See `ats.kernels.cls_scores`; computes in float32, channels must have stride 1.

    Args:
        rows_apart: rows from the start of one sequence to the start of the next; 0: its length.
    """
    q, k, with_norm = q.float(), k.float(), v is not None
    v = v.float() if with_norm else k
    lengths = lengths.long().contiguous()
    num_sequences, num_heads, head_dim = q.shape
    scores = q.new_empty((num_sequences, longest))
    _cls_scores(
        q.data_ptr(), *q.stride()[:2], k.data_ptr(), *k.stride()[:2], v.data_ptr(), *v.stride()[:2],
        lengths.data_ptr(), rows_apart, num_sequences, longest, num_heads, head_dim, v.shape[2], scale, with_norm,
        scores.data_ptr(),
    )  # fmt: skip
    return scores


def kept_rows(mask: Tensor, position: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See `ats.kernels.kept_rows`."""
    mask, position, lengths = mask.bool(), position.long().contiguous(), lengths.long().contiguous()
    num_sequences, size = len(lengths), len(position)
    kept = position.new_empty(2 * size + num_sequences)
    total = _kept_rows(
        mask.data_ptr(), *mask.stride(), position.data_ptr(), lengths.data_ptr(), num_sequences, size, kept.data_ptr()
    )
    return kept[:total], kept[size : size + total], kept[2 * size :]


def prepare() -> None:
    """Load or compile each function by calling it with nothing to do. A cache that cannot be read or written is
    emptied, or not used if that fails; the log says so.
    """
    for name, nothing in (
        ("_official_rule", (0,) * 9),
        ("_cls_scores", (*(0,) * 16, 0.0, True, 0)),
        ("_kept_rows", (0,) * 8),
    ):
        function = globals()[name]
        try:
            function(*nothing)
        except Exception as error:  # unpickling can raise anything
            _warn_of_cache(f"{type(error).__name__}: {error}", str(function.stats.cache_path))
            try:
                function.recompile()  # empties its cache
                function(*nothing)
            except Exception:
                globals()[name] = jit(**function.targetoptions)(function.py_func)
                globals()[name](*nothing)


def _warn_of_cache(reason: str, path: str) -> None:
    """Log one warning for all functions."""
    global _warned
    if _warned:
        return
    _warned = True
    where = f" in {path}" if path else ""
    logger.warning("Numba's cache%s cannot be used (%s); compiling again, which takes seconds.", where, reason)


def native(**options: Any) -> Callable:
    """`njit`, with a cache on disk if there is a folder for it."""

    def decorate(function: Callable) -> Callable:
        try:
            return njit(cache=True, nogil=True, **options)(function)
        except RuntimeError as error:
            compiled = njit(nogil=True, **options)(function)
            _warn_of_cache(str(error), "")
            return compiled

    return decorate


def _pointer_to(element: types.Type) -> Callable:
    """For Numba functions: turns a tensor's address into a pointer to elements of this type."""

    @intrinsic
    def pointer(context, address):
        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

        return types.CPointer(element)(types.int64), generate

    return pointer


_floats, _integers, _booleans = _pointer_to(types.float32), _pointer_to(types.int64), _pointer_to(types.boolean)


@native()
def _official_rule(scores, scores_row, scores_column, lengths, full_length, num_points, num_sequences, longest, keep):
    scores = carray(_floats(scores), _ENDLESS)
    lengths = carray(_integers(lengths), num_sequences)
    keep = carray(_booleans(keep), (num_sequences, longest))
    half, one = np.float32(0.5), np.float32(1)
    for s in range(num_sequences):
        count = lengths[s]
        if count == 0:
            continue
        total = np.float32(0)
        for i in range(count):
            total += scores[s * scores_row + i * scores_column]
        usable = total > 0 and total < np.inf
        # The bits of a non-negative float sort like the float. With the index in the lower half, the sort is stable.
        keys = np.empty(count, np.uint64)
        row = np.ones(count, np.float32)
        if usable:
            for i in range(count):
                row[i] = scores[s * scores_row + i * scores_column]
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
        if not (count == full_length and lowest < last):
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


@native(fastmath={"reassoc", "contract", "nsz"})
def _cls_scores(
    q, q_row, q_head, k, k_row, k_head, v, v_row, v_head,
    lengths, rows_apart, num_sequences, longest, num_heads, head_dim, value_dim, scale, with_norm, scores,
):  # fmt: skip
    lengths = carray(_integers(lengths), num_sequences)
    q, k, v = carray(_floats(q), _ENDLESS), carray(_floats(k), _ENDLESS), carray(_floats(v), _ENDLESS)
    scores = carray(_floats(scores), (num_sequences, longest))
    scores[:] = 0
    scaled = np.empty(head_dim, np.float32)
    logits = np.empty(longest, np.float32)
    first, after = 0, 0
    for s in range(num_sequences):
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


@native()
def _kept_rows(mask, mask_row, mask_column, position, lengths, num_sequences, size, kept):
    """`kept` receives rows [size], positions [size] and lengths [num_sequences]. Returns how many rows were kept."""
    mask = carray(_booleans(mask), _ENDLESS)
    position, lengths = carray(_integers(position), size), carray(_integers(lengths), num_sequences)
    kept = carray(_integers(kept), 2 * size + num_sequences)
    first, total = 0, 0
    for s in range(num_sequences):
        before = total
        for t in range(lengths[s]):
            if mask[s * mask_row + t * mask_column]:
                kept[total] = first + t
                kept[size + total] = position[first + t]
                total += 1
        first += lengths[s]
        kept[2 * size + s] = total - before
    return total
