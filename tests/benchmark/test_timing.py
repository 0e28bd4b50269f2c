"""Ratios and counts of the variants that `measure` times."""

from __future__ import annotations

import pytest
import torch
from tiny_vit import tiny

from ats.benchmark import tables
from ats.benchmark.suite import sampler_rows
from ats.benchmark.timing import BenchmarkSettings, Measured, measure
from ats.errors import UserError


def test_measure_reports_every_variant_beside_dense():
    """Every round has a time, dense is 1 by definition, FLOPs and tokens are the variant's own."""
    cfg = tiny("ATS.NUM_TOKENS", 0.5, "DEVICE", "cpu")
    settings = BenchmarkSettings(("ats", "topk", "padded"), rounds=3, equal_gflops=False)
    rows = list(measure(cfg, {2: torch.randn(2, 3, 224, 224)}, settings))
    by_name = {row.variant: row for row in rows}
    assert list(by_name) == ["dense", "ats", "topk", "padded"]
    dense, topk = by_name["dense"], by_name["topk"]
    assert dense.ratios == [1, 1, 1]
    assert set(dense.flop_ratios) == set(dense.efficiencies) == {1}
    assert not dense.tokens_per_block
    assert set(topk.tokens_per_block[3]) == {98}  # K of 197 slots, not imposed
    for row in rows:
        assert len(row.seconds) == 3
        assert min(row.seconds) > 0
        assert sum(row.parts.values()) == pytest.approx(1)
        assert row.as_dict()["flop_ratio"] == pytest.approx(
            row.gflops_dense / torch.tensor(row.gflops).mean().item(), rel=0.05
        )
    assert by_name["ats"].parts["scoring and sampling"] > 0 == dense.parts["scoring and sampling"]
    assert by_name["ats"].gflops == by_name["padded"].gflops
    assert dense.linear_efficiency == 1
    assert by_name["ats"].linear_efficiency > 0
    assert "linear alone" in tables.table([row.as_dict() for row in rows])


def test_training_reports_what_backward_keeps():
    """With fewer tokens, less is saved for the backward pass."""
    cfg = tiny("DEVICE", "cpu")
    dense, ats = measure(cfg, {2: torch.randn(2, 3, 224, 224)}, BenchmarkSettings(train=True, rounds=2))
    assert 0 < ats.saved_for_backward_mb < dense.saved_for_backward_mb


def test_efficiency_is_time_ratio_over_flop_ratio():
    """By hand: twice as fast with a quarter of the FLOPs is one half."""
    row = Measured("ats", 1, 1.0, gflops=[1.0], gflops_paper=[1.0], seconds=[1.0, 1.0, 0.5])
    row.ratios, row.flop_ratios = [2.0, 2.0, 4.0], [4.0, 4.0, 4.0]
    assert row.efficiencies == [0.5, 0.5, 1.0]
    found = row.as_dict()
    assert (found["speedup"]["p50"], found["flop_ratio"], found["efficiency"]["p50"]) == (2, 4, 0.5)
    assert found["latency_ms"]["p50"] == 1000
    assert found["samples_per_second"] == 1


def test_rounds_stop_when_the_time_is_up():
    """At least three count, however short the time."""
    settings = BenchmarkSettings(rounds=50, max_seconds=0)
    rows = list(measure(tiny("DEVICE", "cpu"), {1: torch.randn(1, 3, 224, 224)}, settings))
    assert [len(row.ratios) for row in rows] == [3, 3]
    assert [len(row.efficiencies) for row in rows] == [3, 3]


def test_half_precision_has_its_weights_in_it():
    """Inference casts the network once, so no pass pays for it. A graph needs a GPU and is not for training."""
    cfg, x = tiny("DEVICE", "cpu"), {1: torch.randn(1, 3, 224, 224)}
    seen = []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda _m, _a, out: seen.append(out))
    try:
        rows = list(measure(cfg, x, BenchmarkSettings(dtype="bfloat16", rounds=1, parts=False)))
    finally:
        hook.remove()
    assert {row.dtype for row in rows} == {"bfloat16"}
    assert {out.dtype for out in seen if isinstance(out, torch.Tensor)} == {torch.bfloat16}
    with pytest.raises(UserError, match="are for inference"):
        list(measure(cfg, x, BenchmarkSettings(("dense_graph",), train=True)))
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="PyTorch sees no GPU"):
            list(measure(cfg, x, BenchmarkSettings(("dense_graph",))))


def test_sampler_alone():
    """A row per size; the plain version beside the kernel is for a GPU."""
    rows = sampler_rows((16, 64), num_sequences=2, device="cpu", min_seconds=0.01)
    assert [row["patches"] for row in rows] == [16, 64]
    assert all(row[key] > 0 for row in rows for key in ("sampling ms", "packing ms"))
    assert "plain ms" not in rows[0]
