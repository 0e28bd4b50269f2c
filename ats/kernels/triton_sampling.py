"""Inverse transform sampling (official rule) as one GPU kernel: from scores to a mask without leaving the chip.

One program per sequence replaces about twenty kernels of `ats.reduction.inverse_transform.official_rule`: sort,
cumulative sum, and the closed form that picks the entries nearest to the sample points. That function is the reference
and runs everywhere else; tests/kernels/test_triton_sampling.py compares the two, number by number.

The sort must be stable and carry the token's index along. Sorting 64-bit keys does both: the score's bits (a
non-negative float orders like its bits) in the upper half, the index in the lower.

The sum is taken in float64 and rounded once, as PyTorch does on a CPU, so the order of additions does not decide which
token wins.
"""

from __future__ import annotations

import logging

import torch
import triton
import triton.language as tl
from torch import Tensor

logger = logging.getLogger(__name__)

MAX_CANDIDATES = 4096  # a program holds its whole sequence; 1024 x 1024 pixels have as many patches of 16 x 16
_failed = False


def official_rule(scores: Tensor, lengths: Tensor, full_length: int, num_points: int) -> Tensor:
    """See `ats.kernels.official_rule`; scores float32. NaN or infinity makes a sequence's scores unusable."""
    num_sequences, num_candidates = scores.shape
    keep = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    block = triton.next_power_of_2(num_candidates)
    scores = scores if scores.stride(1) == 1 else scores.contiguous()
    _official_rule[(num_sequences,)](
        scores,
        lengths,
        keep,
        num_candidates,
        scores.stride(0),
        full_length,
        num_points,
        BLOCK=block,
        num_warps=min(max(block // 64, 1), 16),
        enable_fp_fusion=False,  # rounded where PyTorch rounds
    )
    return keep


def try_official_rule(scores: Tensor, lengths: Tensor, full_length: int, num_points: int) -> Tensor | None:
    """`official_rule` if it can run: float32 on a GPU, at most MAX_CANDIDATES; else None. Also None once Triton has
    failed to build the kernel (it needs a C compiler); the log says so once.
    """
    global _failed
    num_sequences, num_candidates = scores.shape
    fits = scores.is_cuda and scores.dtype == torch.float32 and num_sequences and 0 < num_candidates <= MAX_CANDIDATES
    if _failed or not fits:
        return None
    try:
        with torch.cuda.device_of(scores):  # Triton launches on the current device
            return official_rule(scores, lengths, full_length, num_points)
    except Exception as error:  # Triton raises anything from RuntimeError to CalledProcessError
        _failed = True
        logger.warning("The sampling kernel cannot run (%s: %s); PyTorch samples instead.", type(error).__name__, error)
        return None


# Numbers that change from batch to batch must not trigger a recompilation.
@triton.jit(do_not_specialize=["num_candidates", "score_row", "full_length", "num_points"])
def _official_rule(scores, lengths, keep, num_candidates, score_row, full_length, num_points, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, BLOCK)
    length = tl.load(lengths + row).to(tl.int32)
    is_valid = index < length

    # As in `usable`: if a sequence's scores are not finite or have no mass, all its tokens count equally.
    score = tl.where(is_valid, tl.load(scores + row * score_row + index, mask=is_valid, other=0.0), 0.0)
    total = tl.sum(score, axis=0)
    score = tl.where((total > 0) & (total < float("inf")), score, 1.0)  # false for NaN

    bits = tl.where(is_valid, score, float("inf")).to(tl.int32, bitcast=True)
    keys = tl.sort((bits.to(tl.int64) << 32) | index.to(tl.int64))
    ranked = (keys >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    order = (keys & 0xFFFFFFFF).to(tl.int32)
    taken = index < length  # ranks, from here on: valid entries have come first

    cdf = tl.cumsum(tl.where(taken, ranked, 0.0).to(tl.float64), axis=0).to(tl.float32)
    last = tl.max(cdf, axis=0)
    lowest = tl.where(length == full_length, tl.min(cdf, axis=0), 0.0)
    lowest = tl.where(last > lowest, lowest, 0.0)
    cdf = tl.div_rn(cdf - lowest, (last - lowest) + tl.zeros_like(cdf))
    first = tl.min(tl.where(cdf > 0, cdf, float("inf")), axis=0)
    step = tl.div_rn(1 - first, tl.maximum(num_points - 1, 1).to(tl.float32))

    # As in `nearest_to_points`: points below the midpoint to the next entry, minus those below that to the previous.
    middle = (cdf + tl.gather(cdf, tl.minimum(index + 1, BLOCK - 1), axis=0)) * 0.5
    step = tl.maximum(step, 1.1754943508222875e-38)  # the smallest normal float32
    below = tl.floor(tl.div_rn(middle - first, step + tl.zeros_like(cdf))) + 1
    below = tl.minimum(tl.maximum(below, 0.0), num_points.to(tl.float32))
    below = tl.where(index + 1 < length, below, num_points.to(tl.float32))
    before = tl.where(index > 0, tl.gather(below, tl.maximum(index - 1, 0), axis=0), 0.0)
    tl.store(keep + row * num_candidates + order, (below > before) & taken, mask=order < num_candidates)
