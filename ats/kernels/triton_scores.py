"""Significance scores (sum over heads of CLS's attention, times the value's norm) in two GPU kernels.

They read packed keys and values in their own precision: no float32 copy, no padded keys, and nothing of size N x H x D
is written. `ats.reduction.scores.score_candidates` in PyTorch is the reference and runs everywhere else;
tests/kernels/test_triton_scores.py compares the two.

* `_logits`: a program per sequence and tile of tokens; reads each key and value once, in float32 on the chip.
* `_scores`: a program per sequence; softmax of every head's row, their sum, times the norm.
"""

from __future__ import annotations

import logging

import torch
import triton
import triton.language as tl
from torch import Tensor

logger = logging.getLogger(__name__)

MAX_TOKENS = 8192  # `_scores` holds a row of them
TILE = 32
_failed = False


def cls_scores(
    q: Tensor, k: Tensor, v: Tensor | None, *, start: Tensor, lengths: Tensor, longest: int, scale: float
) -> Tensor:
    """See `ats.kernels.cls_scores`. The channels of q, k and v must have stride 1; scores are float32."""
    num_sequences, num_heads, head_dim = q.shape
    logits = torch.empty(num_sequences, num_heads, longest, device=k.device, dtype=torch.float32)
    norms = torch.empty(num_sequences, longest, device=k.device, dtype=torch.float32)
    scores = torch.empty_like(norms)
    with_norm = v is not None
    v = k if v is None else v
    _logits[(num_sequences, triton.cdiv(longest, TILE))](
        q, k, v, start, lengths, logits, norms, scale, longest, num_heads, head_dim,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        TILE=TILE, WIDTH=triton.next_power_of_2(head_dim), WITH_NORM=with_norm, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    block = triton.next_power_of_2(longest)
    _scores[(num_sequences,)](
        logits, norms, lengths, scores, longest, num_heads,
        BLOCK=block, WITH_NORM=with_norm, num_warps=min(max(block // 256, 1), 16), enable_fp_fusion=True,
    )  # fmt: skip
    return scores


def try_cls_scores(
    q: Tensor, k: Tensor, v: Tensor | None, *, start: Tensor, lengths: Tensor, longest: int, scale: float
) -> Tensor | None:
    """`cls_scores` if it can run: on a GPU, float32 or less, at most MAX_TOKENS per sequence; else None. Also None once
    Triton has failed to build the kernels; the log says so once.
    """
    global _failed
    tensors = [t for t in (q, k, v) if t is not None]
    fits = k.is_cuda and len(q) and 0 < longest <= MAX_TOKENS
    fits = fits and all(t.stride(-1) == 1 and t.dtype in _DTYPES for t in tensors)
    if _failed or not fits:
        return None
    try:
        with torch.cuda.device_of(k):  # Triton launches on the current device
            return cls_scores(q, k, v, start=start, lengths=lengths, longest=longest, scale=scale)
    except Exception as error:  # Triton raises anything from RuntimeError to CalledProcessError
        _failed = True
        logger.warning("The scoring kernels cannot run (%s: %s); PyTorch scores instead.", type(error).__name__, error)
        return None


_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit(do_not_specialize=["longest"])
def _logits(
    q, k, v, start, lengths, logits, norms, scale, longest, num_heads: tl.constexpr, head_dim,
    q_row, q_head, k_row, k_head, v_row, v_head,
    TILE: tl.constexpr, WIDTH: tl.constexpr, WITH_NORM: tl.constexpr,
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * TILE + tl.arange(0, TILE)
    channel = tl.arange(0, WIDTH)
    is_channel = channel < head_dim
    there = (token < tl.load(lengths + sequence))[:, None] & is_channel[None, :]
    row = (tl.load(start + sequence) + token)[:, None]
    square = tl.zeros([TILE], dtype=tl.float32)
    for head in range(num_heads):
        query = tl.load(q + sequence * q_row + head * q_head + channel, mask=is_channel, other=0.0).to(tl.float32)
        key = tl.load(k + row * k_row + head * k_head + channel[None, :], mask=there, other=0.0).to(tl.float32)
        logit = tl.sum(key * (query * scale)[None, :], axis=1)
        tl.store(logits + (sequence * num_heads + head) * longest + token, logit, mask=token < longest)
        if WITH_NORM:
            value = tl.load(v + row * v_row + head * v_head + channel[None, :], mask=there, other=0.0).to(tl.float32)
            square += tl.sum(value * value, axis=1)
    if WITH_NORM:
        tl.store(norms + sequence * longest + token, tl.sqrt(square), mask=token < longest)


@triton.jit(do_not_specialize=["longest"])
def _scores(
    logits, norms, lengths, scores, longest, num_heads: tl.constexpr, BLOCK: tl.constexpr, WITH_NORM: tl.constexpr
):  # fmt: skip
    sequence = tl.program_id(0).to(tl.int64)
    token = tl.arange(0, BLOCK)
    there = token < tl.load(lengths + sequence)
    score = tl.zeros([BLOCK], dtype=tl.float32)
    for head in range(num_heads):
        row = logits + (sequence * num_heads + head) * longest
        logit = tl.load(row + token, mask=there, other=-float("inf"))
        weight = tl.exp(logit - tl.max(logit, axis=0))
        score += weight / tl.sum(weight, axis=0)
    if WITH_NORM:
        score *= tl.load(norms + sequence * longest + token, mask=there, other=0.0)
    tl.store(scores + sequence * longest + token, tl.where(there, score, 0.0), mask=token < longest)
