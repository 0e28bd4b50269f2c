"""Scoring and sampling without PyTorch's operations: Triton kernels on a GPU, Numba functions on a CPU.

Each function returns its result, or None if it cannot run: nothing is installed for this device, the dtype is not
supported, or something must see PyTorch's own operations (a compiler, a tracer, a FLOP counter, a torch.func
transform). On None, the caller runs plain PyTorch operations, which are the reference.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from ats.compat import DisableTorchFunction, current_dispatch_mode, is_functorch_wrapped_tensor

logger = logging.getLogger(__name__)

_HAS_TRITON = find_spec("triton") is not None


class Rows(Protocol):
    """The part of a `Layout` that this module uses (`tokens.py` imports this module, not the reverse)."""

    lengths: Tensor
    longest: int
    uniform: bool

    @property
    def start(self) -> Tensor: ...


def official_rule(scores: Tensor, lengths: Tensor, full_length: int, num_points: int) -> Tensor | None:
    """[S, M] bool, which candidates inverse transform sampling keeps by the official rule.

    Args:
        scores, lengths, full_length: see `ats.reduction.Candidates`.
        num_points: sample points, K minus the prefix tokens.
    """
    if _triton_may_run(scores):
        from ats.kernels.triton_sampling import try_official_rule

        return try_official_rule(scores, lengths, full_length, num_points)
    numba = _numba_for(scores) if scores.dtype == torch.float32 else None
    if numba is None:
        return None
    with DisableTorchFunction():
        return numba.official_rule(scores, lengths, full_length, num_points)


def cls_scores(q: Tensor, k: Tensor, v: Tensor | None, *, keys: Rows, scale: float) -> Tensor | None:
    """Significance scores [S, M] of all tokens, prefix tokens included; 0 past the end of a sequence.

    Args:
        q: [S, H, D], of CLS. k, v: [T, H, D] of the tokens; if v is None, its norm is omitted. keys: their layout.
    """
    if _triton_may_run(k):
        from ats.kernels.triton_scores import try_cls_scores

        return try_cls_scores(q, k, v, start=keys.start, lengths=keys.lengths, longest=keys.longest, scale=scale)
    fits = k.dtype != torch.float64 and all(t.stride(-1) == 1 for t in (q, k, k if v is None else v))
    numba = _numba_for(k) if fits else None
    if numba is None:
        return None
    rows_apart = keys.longest if keys.uniform else 0
    with DisableTorchFunction():
        return numba.cls_scores(q, k, v, lengths=keys.lengths, longest=keys.longest, rows_apart=rows_apart, scale=scale)


def kept_rows(mask: Tensor, position: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
    """The tokens of packed sequences that a mask keeps.

    Args:
        mask: [S, M] bool, False past the end of a sequence. position: [T] int64. lengths: [S] int64.

    Returns:
        Their packed rows [T'] int64, their entries of `position` [T'], and how many each sequence keeps [S].
    """
    numba = _numba_for(mask)
    if numba is None:
        return None
    with DisableTorchFunction():
        return numba.kept_rows(mask, position, lengths)


def _triton_may_run(x: Tensor) -> bool:
    return x.is_cuda and _HAS_TRITON and not torch.compiler.is_compiling()


def _numba_for(x: Tensor) -> ModuleType | None:
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return None
    observed = current_dispatch_mode() is not None or is_functorch_wrapped_tensor(x)
    return None if observed else _numba_kernels()


@cache
def _numba_kernels() -> ModuleType | None:
    """`numba_kernels`; None without Numba. The import takes a moment, so it waits for the first image to be sampled."""
    try:
        from ats.kernels import numba_kernels

        numba_kernels.prepare()
    except ImportError:
        return None
    except Exception as error:  # Numba can raise anything
        logger.warning("Numba's functions cannot run (%s); PyTorch scores and samples instead, more slowly.", error)
        return None
    return numba_kernels
