"""RaggedTokens and ragged attention: packing loses nothing, and every backend is the same attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ats.attention import cls_attention, mean_attention, ragged_attention
from ats.tokens import KeptTokens, Layout, RaggedTokens

lengths_of_sequences = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@given(lengths_of_sequences)
@settings(max_examples=50)
def test_pad_and_unpad_are_inverse(lengths):
    layout = Layout.from_lengths(torch.tensor(lengths))
    x = torch.randn(sum(lengths), 3)
    padded = layout.pad(x, value=-1)
    assert padded.shape == (len(lengths), max(lengths), 3)
    assert torch.equal(layout.unpad(padded), x)
    assert (padded[~layout.mask] == -1).all()
    assert layout.cu_seqlens.tolist() == [0, *torch.tensor(lengths).cumsum(0).tolist()]
    assert layout.uniform == (len(set(lengths)) == 1)


@given(st.integers(1, 4), st.integers(3, 12), st.integers(1, 2), st.integers(0, 2**30))
@settings(max_examples=50)
def test_keep_remembers_where_tokens_come_from(num_sequences, length, num_prefix, seed):
    """After two rounds of keeping, every token still equals the original at its position, and the grid holds the rest
    as zeros.
    """
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(num_sequences, length, 2, generator=generator)
    tokens = RaggedTokens.from_dense(dense, num_prefix)
    for _ in range(2):
        mask = torch.rand(num_sequences, tokens.layout.longest, generator=generator) < 0.6
        mask[:, :num_prefix] = True
        kept, index = tokens.keep(mask & tokens.layout.mask, max_tokens=length)
        assert torch.equal(kept.x, tokens.x[index])
        tokens = kept
    assert torch.equal(tokens.x, dense.flatten(0, 1)[tokens.grid_index])
    assert torch.equal(tokens.prefix(), dense[:, :num_prefix])
    grid = tokens.to_grid()
    assert torch.equal(tokens.from_grid(grid), tokens.x)
    assert (grid != 0).any(-1).sum() == len(tokens.x)
    entry = KeptTokens.of(tokens, block=5)
    for i, patches in enumerate(entry.patches):
        assert len(patches) == entry.num_tokens[i] - num_prefix
        assert torch.equal(
            tokens.x[tokens.layout.cu_seqlens[i] + num_prefix : tokens.layout.cu_seqlens[i + 1]],
            dense[i, num_prefix + patches],
        )


@pytest.mark.parametrize("layout", ["packed", "padded", "static"])
def test_no_sequences_at_all(layout):
    """Of an empty batch nothing is dropped, and what is asked of tokens has its usual shape."""
    tokens = RaggedTokens.from_dense(torch.zeros(0, 5, 3), 1, layout=layout)
    kept, index = tokens.keep(torch.zeros(0, 5, dtype=torch.bool), max_tokens=4)
    assert (kept.max_tokens, kept.x.shape, index.dtype, index.shape) == (4, (0, 3), torch.int64, (0,))
    assert kept.prefix().shape == (0, 1, 3)
    assert kept.to_grid().shape == (0, 5, 3)
    assert KeptTokens.of(kept, block=0).patches == []
    assert Layout.from_lengths(torch.zeros(0, dtype=torch.int64)).start.shape == (0,)


@pytest.mark.parametrize("value", [0.0, -torch.inf])
def test_grid_and_its_gradient(value):
    """Placing tokens with and without a gradient gives the same grid, the value where none is; gradients come back."""
    tokens = RaggedTokens.from_dense(torch.randn(2, 6, 3), 1)
    mask = torch.tensor([[1, 1, 0, 1, 0, 1], [1, 0, 0, 0, 1, 0]], dtype=torch.bool)
    tokens = tokens.keep(mask, max_tokens=6)[0]
    grid = tokens.to_grid(value=value)
    assert (grid[~mask] == value).all()
    assert torch.equal(grid[mask], tokens.x)
    x = tokens.x.clone().requires_grad_()
    with_gradient = tokens.to_grid(x, value)
    assert torch.equal(with_gradient, grid)
    weight = torch.randn(2, 6, 3)
    with_gradient.backward(weight)
    assert torch.equal(x.grad, weight[mask])


def reference_attention(q, k, v, q_sizes, k_sizes, scale):
    """Sequence by sequence, softmax written out."""
    out = []
    for q_s, k_s, v_s in zip(q.split(q_sizes), k.split(k_sizes), v.split(k_sizes), strict=True):
        attention = (torch.einsum("qhd,khd->hqk", q_s, k_s) * scale).softmax(-1)
        out.append(torch.einsum("hqk,khd->qhd", attention, v_s))
    return torch.cat(out)


def random_qkv(k_sizes, q_sizes, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(sum(k_sizes))
    q = torch.randn(sum(q_sizes), 2, 8, generator=generator, dtype=torch.float64).to(device, dtype)
    k, v = (
        torch.randn(sum(k_sizes), 2, 8, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(2)
    )
    return q, k, v


@pytest.mark.parametrize("backend", ["padded", "loop", "auto"])
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5))
@settings(max_examples=25)
def test_attention_backends_agree(backend, sizes):
    """Values and gradients of each backend equal attention written out, for any query and key lengths."""
    q_sizes, k_sizes = [min(s) for s in sizes], [max(s) for s in sizes]
    q, k, v = (t.requires_grad_() for t in random_qkv(k_sizes, q_sizes))
    layouts = {
        "queries": Layout.from_lengths(torch.tensor(q_sizes)),
        "keys": Layout.from_lengths(torch.tensor(k_sizes)),
    }
    out = ragged_attention(q, k, v, **layouts, scale=0.3, backend=backend)
    want = reference_attention(q, k, v, q_sizes, k_sizes, 0.3)
    torch.testing.assert_close(out, want, rtol=0, atol=1e-12)
    weight = torch.randn_like(out)
    got_grads, want_grads = (torch.autograd.grad((t * weight).sum(), (q, k, v)) for t in (out, want))
    for got, expected in zip(got_grads, want_grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_varlen_attention_agrees(dtype):
    q_sizes, k_sizes = [5, 1, 60], [9, 130, 64]
    q, k, v = random_qkv(k_sizes, q_sizes, dtype, "cuda")
    layouts = {
        "queries": Layout.from_lengths(torch.tensor(q_sizes).cuda()),
        "keys": Layout.from_lengths(torch.tensor(k_sizes).cuda()),
    }
    out = ragged_attention(q, k, v, **layouts, scale=0.3, backend="varlen")
    want = reference_attention(q.double(), k.double(), v.double(), q_sizes, k_sizes, 0.3)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=2e-2)


@given(lengths_of_sequences)
@settings(max_examples=25)
def test_scoring_rows_are_rows_of_the_attention_matrix(sizes):
    """cls_attention is row 0 of the softmax matrix, mean_attention the mean of its rows, whatever the chunk."""
    q, k, _ = random_qkv(sizes, sizes)
    layout = Layout.from_lengths(torch.tensor(sizes))
    cls = cls_attention(q[layout.cu_seqlens[:-1].long()], k, keys=layout, scale=0.3)
    mean = mean_attention(q, k, layout=layout, scale=0.3, chunk=2)
    for i, (q_s, k_s) in enumerate(zip(q.split(sizes), k.split(sizes), strict=True)):
        matrix = (torch.einsum("qhd,khd->hqk", q_s, k_s) * 0.3).softmax(-1)
        torch.testing.assert_close(cls[i, :, : sizes[i]], matrix[:, 0], rtol=0, atol=1e-12)
        torch.testing.assert_close(mean[i, :, : sizes[i]], matrix.mean(1), rtol=0, atol=1e-12)
        assert (cls[i, :, sizes[i] :] == 0).all()
