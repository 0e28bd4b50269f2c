"""Other methods get the cost of ATS."""

from __future__ import annotations

import re
import statistics

import pytest
import torch
from tiny_vit import tiny

from ats.benchmark.timing import BenchmarkSettings, measure


def test_other_methods_cost_what_ats_costs():
    """GFLOPs agree within 2 %, in the blocks their authors use, and the rows state the setting.

    ats is measured although nobody asked for it.
    """
    torch.manual_seed(0)
    cfg = tiny("DEVICE", "cpu")
    settings = BenchmarkSettings(("tome", "evit", "topk", "random"), rounds=1)
    by_name = {row.variant: row for row in measure(cfg, {8: torch.randn(8, 3, 224, 224)}, settings)}
    assert list(by_name) == ["dense", "ats", "tome", "evit", "topk", "random"]
    target = statistics.fmean(by_name["ats"].gflops)
    assert target < 0.75 * by_name["ats"].gflops_dense
    for name in ("tome", "evit", "topk", "random"):
        assert statistics.fmean(by_name[name].gflops) == pytest.approx(target, rel=0.02)
    assert list(by_name["tome"].tokens_per_block) == list(range(12))
    assert list(by_name["evit"].tokens_per_block) == [3, 6, 9]
    assert re.fullmatch(r"r (\d+, )+\d+ in blocks 0-11|r \d+ in blocks 0-11", by_name["tome"].setting)
    assert re.fullmatch(r"keep rate 0\.\d+ in blocks 3, 6, 9", by_name["evit"].setting)
    assert by_name["ats"].setting == "K 1 in blocks 3-11"
