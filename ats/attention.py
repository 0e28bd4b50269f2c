"""Attention from ragged queries to ragged keys: each sequence's queries to that sequence's keys and values.

One function, several backends that compute the same numbers:

* `padded`: scaled_dot_product_attention over sequences padded to the longest, with a mask. Runs everywhere.
* `loop`: one scaled_dot_product_attention per sequence. No wasted work, many calls: for the CPU.
* `varlen`: torch's variable-length flash attention. CUDA, half precision.

Shapes: S sequences, Tq / Tk packed queries / keys, H heads, D channels of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ats.tokens import SINGLE, Layout

BACKENDS = ("auto", "padded", "loop", "varlen")
SMALL_SEQUENCE = 2**14  # with fewer elements in a sequence's keys, a call per sequence costs more than copying them


def ragged_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    queries: Layout,
    keys: Layout,
    scale: float,
    dropout_p: float = 0.0,
    bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """softmax(q k^T scale + bias) v within each sequence.

    Args:
        q: [Tq, H, D]. k, v: [Tk, H, D].
        queries, keys: layouts of q and of k, v; the same number of sequences.
        dropout_p: dropout on the attention weights.
        bias: [S, 1 or H, 1 or Mq, Mk] in the padded layout, added to the logits. Not with the backend varlen.

    Returns:
        [Tq, H, D].
    """
    if backend == "auto":
        backend = choose_backend(q, queries=queries, keys=keys, dropout_p=dropout_p)
        if backend == "varlen" and bias is not None:
            backend = "padded"
    attend: Callable[..., Tensor] = _BACKENDS[backend]
    if bias is not None:
        return attend(q, k, v, queries, keys, scale, dropout_p, bias)
    if not q.is_cuda or keys.kind == "static" or torch.compiler.is_compiling():
        return attend(q, k, v, queries, keys, scale, dropout_p)
    # cuDNN attention builds a plan for lengths it has not seen before. With ragged sequences that is every call. Flash
    # attention needs no plan. Other people's traces show tens of milliseconds per plan; we have not measured it.
    allowed = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        return attend(q, k, v, queries, keys, scale, dropout_p)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(allowed)


def choose_backend(q: Tensor, *, queries: Layout, keys: Layout, dropout_p: float = 0.0) -> str:
    """The backend for these tensors. If lengths differ: varlen where it runs, the loop on a CPU, else padded."""
    if queries.uniform and keys.uniform:
        return "padded"  # already padded or equally long: one plain call
    if q.is_cuda:
        fits = q.dtype in (torch.float16, torch.bfloat16) and q.shape[2] % 8 == 0 and q.shape[2] <= 256
        return "varlen" if fits and dropout_p == 0 and _has_varlen() else "padded"
    # A compiled graph cannot loop over lengths it does not know.
    return "padded" if torch.compiler.is_compiling() else "loop"


def _padded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Layout,
    keys: Layout,
    scale: float,
    dropout_p: float,
    bias: Tensor | None = None,
) -> Tensor:
    if keys.kind == SINGLE:  # without the sequence axis, an engine's matmul reads the heads in place
        q, k, v = (t.transpose(0, 1) for t in (q, k, v))
        mask = None if bias is None else bias[0].to(q.dtype)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale)
        return out.transpose(0, 1)
    q, k, v = (layout.pad(t).transpose(1, 2) for t, layout in ((q, queries), (k, keys), (v, keys)))
    mask = None if keys.uniform and keys.full else keys.mask[:, None, None]
    if bias is not None:
        mask = (bias if mask is None else bias.masked_fill(~mask, -torch.inf)).to(q.dtype)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, scale=scale)
    return queries.unpad(out.transpose(1, 2))


def _loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Layout,
    keys: Layout,
    scale: float,
    dropout_p: float,
    bias: Tensor | None = None,
) -> Tensor:
    q, k, v = (t.transpose(0, 1)[None].split(layout.sizes, 2) for t, layout in ((q, queries), (k, keys), (v, keys)))
    if bias is None:
        masks: list[Tensor | None] = [None] * len(k)
    else:
        bias = bias.to(q[0].dtype)
        masks = [
            own[None, :, :num_q, :num_k] for own, num_q, num_k in zip(bias, queries.sizes, keys.sizes, strict=True)
        ]
    attended = (
        F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout_p, scale=scale)
        for query, key, value, mask in zip(q, k, v, masks, strict=True)
    )
    return torch.cat([own[0].transpose(0, 1) for own in attended])


def _varlen(q: Tensor, k: Tensor, v: Tensor, queries: Layout, keys: Layout, scale: float, dropout_p: float) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if dropout_p:
        raise ValueError("variable-length attention has no dropout on the attention weights; use the padded backend")
    lengths = queries.cu_seqlens, keys.cu_seqlens, queries.longest, keys.longest
    return varlen_attn(q, k, v, *lengths, scale=scale)  # type: ignore[return-value]  # a tuple only on request


def _has_varlen() -> bool:
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401
    except ImportError:
        return False
    return True


_BACKENDS = {"padded": _padded, "loop": _loop, "varlen": _varlen}


def cls_attention(q: Tensor, k: Tensor, *, keys: Layout, scale: float, bias: Tensor | None = None) -> Tensor:
    """The row of the attention matrix that scores tokens: attention of one query per sequence to all its keys.

    Args:
        q: [S, H, D], e.g. of CLS. k: [Tk, H, D].
        bias: [S, H, M], added to the logits.

    Returns:
        [S, H, M] float32 or better, 0 where there is no key.
    """
    q = q * scale
    one_product = keys.kind != "packed" or keys.num_sequences <= 1 or keys.longest * k[:1].numel() < SMALL_SEQUENCE
    if keys.kind == SINGLE:
        logits = (k.transpose(0, 1) @ q[0, :, :, None])[None, :, :, 0]
    elif k.is_cuda or (keys.uniform and one_product) or torch.compiler.is_compiling():
        logits = torch.einsum("shd,smhd->shm", q, keys.pad(k))
    else:  # one batched product would first copy all keys, which takes longer than the rest of the scoring
        rows = [own.transpose(0, 1) @ query[..., None] for own, query in zip(k.split(keys.sizes), q, strict=True)]
        logits = keys.pad(torch.cat(rows, dim=1).squeeze(2).t()).transpose(1, 2)
    return _softmax(logits if bias is None else logits + bias, keys)


def mean_attention(
    q: Tensor,
    k: Tensor,
    *,
    layout: Layout,
    scale: float,
    queries: Layout | None = None,
    bias: Tensor | None = None,
    chunk: int = 256,
) -> Tensor:
    """Attention each token receives, averaged over the tokens that attend; for networks without CLS.

    Rows are computed `chunk` at a time, so memory stays linear in the number of tokens.

    Args:
        q, k: [T, H, D].
        layout: where the sequences lie in k, and in q unless `queries` says otherwise.
        bias: [S, H, Mq, M], added to the logits.

    Returns:
        [S, H, M] float32 or better.
    """
    queries = layout if queries is None else queries
    q, k = queries.pad(q * scale), layout.pad(k)
    received: Tensor | int = 0
    if queries.kind == SINGLE:  # a graph cannot loop over a length it does not know
        starts, chunk = range(1), queries.longest
    else:
        starts = range(0, queries.longest, chunk)
    for start in starts:
        rows = torch.einsum("sqhd,smhd->shqm", q[:, start : start + chunk], k)
        rows = rows if bias is None else rows + bias[:, :, start : start + chunk]
        attention = _softmax(rows, layout)
        if not (queries.uniform and queries.full):
            attention = attention * queries.mask[:, None, start : start + chunk, None]
        received = received + attention.sum(dim=2)
    return received / queries.lengths[:, None, None]


def _softmax(logits: Tensor, keys: Layout) -> Tensor:
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if not (keys.uniform and keys.full):
        mask = keys.mask.reshape(keys.num_sequences, *[1] * (logits.ndim - 2), keys.longest)
        logits = logits.masked_fill(~mask, -torch.inf)
    return logits.softmax(dim=-1)
