"""The CPU's native functions against PyTorch's operations: the choice of tokens exactly, the scores to round-off."""

from __future__ import annotations

import shutil
import sys
from importlib import import_module
from pathlib import Path
from unittest import mock

import numba
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models import small_vit
from test_triton_sampling import cases, plain_rule
from torch.utils.flop_counter import FlopCounterMode

from ats import kernels
from ats.kernels import numba_kernels
from ats.reduction import Candidates
from ats.reduction.scores import _plain_scores
from ats.tokens import Layout, RaggedTokens


@pytest.mark.parametrize("size", [1, 2, 3, 7, 33, 196, 577])
def test_rule_keeps_what_the_plain_version_keeps(size):
    """NaN, infinity, no mass, equal scores, ties, one candidate, padding; scores as a view, as behind prefix tokens."""
    for candidates, points in cases(size):
        scores = torch.nn.functional.pad(candidates.scores, (2, 0), value=1)[:, 2:]
        kept = numba_kernels.official_rule(scores, candidates.lengths, candidates.full_length, points)
        assert torch.equal(kept, plain_rule(candidates, points))


@given(
    st.lists(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=40), min_size=1, max_size=4),
    st.integers(1, 60),
    st.integers(0, 40),
)
@settings(max_examples=200)
def test_rule_keeps_what_the_plain_version_keeps_of_any_scores(rows, points, full_length):
    """To the last digit: what one version rounds the other must not."""
    scores = torch.zeros(len(rows), max(map(len, rows)))
    for own, row in zip(scores, rows, strict=True):
        own[: len(row)] = torch.tensor(row)
    lengths = torch.tensor([len(row) for row in rows])
    candidates = Candidates(scores, lengths=lengths, max_tokens=full_length, num_positions=0, position=lambda: scores)
    kept = numba_kernels.official_rule(scores, candidates.lengths, full_length, points)
    assert torch.equal(kept, plain_rule(candidates, points))


@pytest.mark.parametrize("layout", ["packed", "padded", "static"])
@pytest.mark.parametrize("with_norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_those_of_the_plain_version(layout, with_norm, dtype):
    """Sequences of 1 to 70 tokens, keys and values side by side as the host projects them; NaN stays where it is."""
    torch.manual_seed(0)
    tokens = RaggedTokens.from_dense(torch.zeros(3, 70, 1), 1, layout=layout)
    for _ in range(2):  # of equal lengths, and not
        rows = tokens.layout.total
        q = torch.randn(3, 2, 24, dtype=dtype, requires_grad=True)
        k, v = torch.randn(rows, 2, 2, 24, dtype=dtype).unbind(1)
        k[1, 1] *= 30  # one token takes nearly all attention
        name = "cls_attention_value_norm" if with_norm else "cls_attention"
        want = _plain_scores(name, tokens, q, k, v, scale=0.3, queries=None, bias=None)
        want = want.masked_fill(~tokens.layout.mask[:, 1:], 0).detach()
        got = kernels.cls_scores(q, k, v if with_norm else None, keys=tokens.layout, scale=0.3)
        torch.testing.assert_close(got[:, 1:], want, rtol=1e-5, atol=1e-6)
        k[0, 0, 0] = torch.nan
        got = kernels.cls_scores(q, k, v, keys=tokens.layout, scale=0.3)
        assert got[0, : tokens.layout.lengths[0]].isnan().all()
        assert got[1:].isfinite().all()
        tokens = tokens.keep(torch.arange(70) < torch.tensor([[41], [70], [1]]), max_tokens=70)[0]


def test_scores_of_a_sequence_do_not_see_the_batch():
    """Bit for bit: each sequence is computed by itself."""
    torch.manual_seed(0)
    lengths = torch.tensor([13, 50, 1, 29])
    q, k, v = torch.randn(4, 3, 16), *torch.randn(2, 93, 3, 16)
    together = kernels.cls_scores(q, k, v, keys=Layout.from_lengths(lengths), scale=0.2)
    start = 0
    for i, length in enumerate(lengths.tolist()):
        own = slice(start, start + length)
        alone = Layout.from_lengths(lengths[i : i + 1])
        assert torch.equal(kernels.cls_scores(q[i : i + 1], k[own], v[own], keys=alone, scale=0.2)[0],
                           together[i, :length])  # fmt: skip
        start += length


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=4))
@settings(max_examples=100)
def test_kept_rows_are_those_of_the_plain_version(rows):
    """The same tokens, positions and lengths, sequence after sequence."""
    lengths = torch.tensor([len(row) for row in rows])
    layout = Layout.from_lengths(lengths)
    mask = torch.zeros(len(rows), layout.longest, dtype=torch.bool)
    for own, row in zip(mask, rows, strict=True):
        own[0] = True
        own[1 : len(row)] = torch.tensor(row[1:], dtype=torch.bool)
    total = layout.total
    tokens = RaggedTokens(torch.randn(total, 2), layout, torch.randperm(total), 1, total, total)
    native, index = tokens.keep(mask, max_tokens=9)
    with mock.patch("ats.kernels.kept_rows", return_value=None):
        plain, plain_index = tokens.keep(mask, max_tokens=9)
    assert torch.equal(index, plain_index)
    assert torch.equal(native.x, plain.x)
    assert torch.equal(native.position, plain.position)
    assert native.layout.sizes == plain.layout.sizes
    assert torch.equal(native.layout.lengths, plain.layout.lengths)


def test_numbers_that_do_not_lie_side_by_side():
    """Scores, lengths, masks and positions as views, and lengths of another type: read as what they say."""
    torch.manual_seed(0)
    scores, lengths = torch.rand(3, 20), torch.tensor([20, 7, 13])
    want = numba_kernels.official_rule(scores, lengths, 20, 9)
    for apart in (lengths.repeat_interleave(2)[::2], lengths.int()):
        assert torch.equal(numba_kernels.official_rule(scores.t().contiguous().t(), apart, 20, 9), want)
    position = torch.randperm(40)
    packed = numba_kernels.kept_rows(want, position, lengths)
    apart = (want.t().contiguous().t(), position.repeat_interleave(3)[::3], lengths.repeat_interleave(2)[::2])
    assert all(map(torch.equal, numba_kernels.kept_rows(*apart), packed))
    q, k = torch.randn(3, 2, 8), torch.randn(40, 2, 8)
    about = {"longest": 20, "rows_apart": 0, "scale": 0.3}
    want = numba_kernels.cls_scores(q, k, k, lengths=lengths, **about)
    k = k.transpose(0, 1).contiguous().transpose(0, 1)
    assert torch.equal(numba_kernels.cls_scores(q, k, k, lengths=lengths.int(), **about), want)


def test_another_default_type_changes_nothing():
    """The functions write float32 whatever `torch.set_default_dtype` says."""
    torch.manual_seed(0)
    q, k, layout = torch.randn(2, 2, 8), torch.randn(30, 2, 8), Layout.from_lengths(torch.tensor([20, 10]))
    want = kernels.cls_scores(q, k, k, keys=layout, scale=0.3)
    torch.set_default_dtype(torch.float64)
    try:
        got = kernels.cls_scores(q, k, k, keys=layout, scale=0.3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)


def test_a_network_keeps_the_same_tokens_without_numba(monkeypatch):
    """That it is not installed is no error."""
    model, x = (
        small_vit(num_tokens=0.6, dtype=torch.float32),
        torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)),
    )
    with torch.no_grad():
        logits, trace = model.forward_tokens(x)
        monkeypatch.setitem(sys.modules, "ats.kernels.numba_kernels", None)
        monkeypatch.delattr("ats.kernels.numba_kernels")
        kernels._numba_kernels.cache_clear()
        try:
            assert kernels.kept_rows(torch.ones(1, 2, dtype=torch.bool), torch.arange(2), torch.tensor([2])) is None
            plain, plain_trace = model.forward_tokens(x)
        finally:
            kernels._numba_kernels.cache_clear()
    torch.testing.assert_close(logits, plain)
    assert all(torch.equal(a.position, b.position) for a, b in zip(trace, plain_trace, strict=True))


@pytest.fixture
def imported_anew(monkeypatch, tmp_path):
    """A function that imports the kernels again, with Numba's cache, as it is now, in the folder it returns."""

    folder = tmp_path

    def again() -> Path:
        monkeypatch.delitem(sys.modules, "ats.kernels.numba_kernels", raising=False)
        monkeypatch.delattr("ats.kernels.numba_kernels", raising=False)
        kernels._numba_kernels.cache_clear()
        return folder

    numba_kernels.prepare()
    built = Path(numba_kernels._kept_rows.stats.cache_path)
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    again()
    folder = Path(import_module("ats.kernels.numba_kernels")._kept_rows.stats.cache_path)
    for file in built.glob("numba_kernels.*.nb?"):
        shutil.copy2(file, folder)
    again()
    yield again
    kernels._numba_kernels.cache_clear()


def kept_of_two() -> list[list[int]]:
    """What `kept_rows` gives for two tokens, the second of which is kept."""
    mask = torch.tensor([[False, True]])
    return [t.tolist() for t in kernels.kept_rows(mask, torch.arange(2), torch.tensor([2]))]


DAMAGES = {
    "no pickle": lambda data: b"no pickle",
    "empty": lambda data: b"",
    "cut short": lambda data: data[: len(data) // 2],
    "begins wrong": lambda data: bytes(40) + data[40:],
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", ["nbi", "nbc"])
def test_a_damaged_cache_is_built_anew(imported_anew, kind, damage, caplog):
    """One warning, and the next process finds a good one."""
    kept_of_two()
    assert not caplog.text
    folder = imported_anew()
    files = list(folder.glob(f"numba_kernels._kept_rows*.{kind}"))
    assert files
    for file in files:
        file.write_bytes(DAMAGES[damage](file.read_bytes()))
    assert kept_of_two() == [[1], [1], [1]]
    assert len([r for r in caplog.records if "Numba's cache in" in r.message]) == len(caplog.records) == 1
    imported_anew()
    assert kept_of_two() == [[1], [1], [1]]
    assert len(caplog.records) == 1


def test_a_cache_that_cannot_be_written(imported_anew, monkeypatch, caplog):
    """A full disk, or a folder that lost its permissions: compiled without a cache."""

    def full(*_):
        raise OSError(28, "No space left on device")

    folder = imported_anew()
    for file in folder.glob("numba_kernels._kept_rows*.nb?"):
        file.unlink()
    monkeypatch.setattr("numba.core.caching.IndexDataCacheFile._save_index", full)
    assert kept_of_two() == [[1], [1], [1]]
    assert ["No space left on device" in r.message for r in caplog.records] == [True]


def test_no_folder_for_a_cache(imported_anew, monkeypatch, caplog):
    """Numba then raises as it meets a function: one warning, compiled for this process."""
    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])
    monkeypatch.setattr("numba.core.dispatcher.Dispatcher.__call__", lambda *_: 0)
    assert kernels.kept_rows(torch.ones(1, 2, dtype=torch.bool), torch.arange(2), torch.tensor([2])) is not None
    assert ["no locator available" in r.message for r in caplog.records] == [True]


def test_numba_does_not_work(monkeypatch, caplog):
    """A warning, once, and the plain operations."""

    def no_locator(**_):
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(numba, "njit", no_locator)
    monkeypatch.delitem(sys.modules, "ats.kernels.numba_kernels")
    monkeypatch.delattr("ats.kernels.numba_kernels")
    kernels._numba_kernels.cache_clear()
    try:
        for _ in range(2):
            assert kernels.kept_rows(torch.ones(1, 2, dtype=torch.bool), torch.arange(2), torch.tensor([2])) is None
    finally:
        kernels._numba_kernels.cache_clear()
    assert caplog.text.count("no locator available") == 1


def test_counters_and_tracers_see_the_plain_operations(monkeypatch):
    """Where a dispatch mode counts, or in float64, PyTorch computes."""
    monkeypatch.setattr(numba_kernels, "cls_scores", mock.Mock(side_effect=AssertionError))
    monkeypatch.setattr(numba_kernels, "official_rule", mock.Mock(side_effect=AssertionError))
    model, x = small_vit(num_tokens=0.6, dtype=torch.float32), torch.randn(2, 3, 32, 32)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    assert counter.get_total_flops() > 0
    with torch.no_grad():
        small_vit(num_tokens=0.6)(x.double())
        with pytest.raises(AssertionError):
            model(x)


def test_gradients_by_torch_func():
    """`torch.func.grad`, whose tensors have no storage, gives what `backward` gives."""
    model, x = small_vit(num_tokens=0.6, dtype=torch.float32), torch.randn(2, 3, 32, 32)
    parameters = dict(model.named_parameters())
    model(x).square().sum().backward()
    found = torch.func.grad(lambda own: torch.func.functional_call(model, own, (x,)).square().sum())(parameters)
    for name, parameter in parameters.items():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-4)
