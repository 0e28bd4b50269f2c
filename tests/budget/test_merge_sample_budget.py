"""`calibrate` finds R of ATS.SAMPLER merge_sample, and with refine_rounds where it changes over."""

from __future__ import annotations

import pytest
import torch
import yaml
from test_rivals import pictures, tiny

import ats


@pytest.mark.parametrize("refine_rounds", [0, 1])
def test_one_number_meets_the_budget(refine_rounds):
    """The lines that it prints make the network that it leaves."""
    keys = ["ATS.ENABLE", True, "ATS.SAMPLER", "merge_sample"]
    model, x = tiny(*keys, dtype=torch.float32), pictures(6, torch.float32)
    found = ats.calibrate(model, x, speedup=1.5, progress=False, refine_rounds=refine_rounds, tolerance=0.03)
    assert found.found.gflops.mean() == pytest.approx(found.dense / 1.5, rel=0.04)
    lines = yaml.safe_load(found.yaml())["MERGE_SAMPLE"]
    assert set(lines) == {"R", "SWITCH", "POINTS"}
    words = [word for name, value in lines.items() for word in (f"MERGE_SAMPLE.{name}", value)]
    again = tiny(*keys, *words, dtype=torch.float32)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))
