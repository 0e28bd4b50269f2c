"""`calibrate` finds the ratio and the thresholds of ATS.SAMPLER merge_sample, and with refine_rounds where it changes
over.
"""

from __future__ import annotations

import pytest
import torch
import yaml
from test_rivals import pictures, tiny

import ats
from ats.budget.network import Network
from ats.models.block import ats_blocks

KEYS = ["ATS.ENABLE", True, "ATS.SAMPLER", "merge_sample"]


@pytest.mark.parametrize("refine_rounds", [0, 1])
def test_one_number_meets_the_budget(refine_rounds):
    """The lines that it prints make the network that it leaves, which works on images one by one."""
    model, x = tiny(*KEYS, dtype=torch.float32), pictures(16, torch.float32)
    found = ats.calibrate(model, x, speedup=1.4, progress=False, refine_rounds=refine_rounds, tolerance=0.03)
    assert found.found.gflops.mean() == pytest.approx(found.dense / 1.4, rel=0.04)
    lines = yaml.safe_load(found.yaml())["MERGE_SAMPLE"]
    assert set(lines) == {"RATIO", "THRESHOLD", "SWITCH", "POINTS"}
    keys = [*KEYS, *(word for name, value in lines.items() for word in (f"MERGE_SAMPLE.{name}", value))]
    stages = yaml.safe_load(found.yaml(as_stages=True))["ATS"]["STAGES"]
    for words in (keys, ["ATS.ENABLE", True, "ATS.STAGES", stages]):
        again = tiny(*words, dtype=torch.float32)
        again.load_state_dict(model.state_dict())
        assert torch.equal(again(x), model(x))
    torch.testing.assert_close(torch.cat([model(image[None]) for image in x]), model(x), atol=1e-5, rtol=0)


def test_thresholds_leave_every_image_what_it_needs():
    """The mean over the images is that of the ratio; images differ, where without thresholds they do not."""
    x = pictures(64, torch.float32)
    model = tiny(*KEYS, "MERGE_SAMPLE.SWITCH", 1.0, "MERGE_SAMPLE.RATIO", 0.8, dtype=torch.float32)
    fixed = model.forward_tokens(x)[1][0].num_tokens
    assert len(fixed.unique()) == 1
    found = ats.calibrate(model, x, speedup=1.3, progress=False)
    for block in ats_blocks(model):
        assert 0 < block.reduction.threshold < 1
    left = model.forward_tokens(x)[1][0].num_tokens
    assert len(left.unique()) > 3
    num_patches = model.forward_tokens(x)[1].records[0].num_in[0] - 1
    assert (left - 1).double().mean() / num_patches == pytest.approx(found.setting[0].ratio, abs=0.02)


def test_the_same_setting_learns_once():
    """So a search by time, which tries settings again and again, times what it returns."""
    model, x = tiny(*KEYS, dtype=torch.float32), pictures(8, torch.float32)
    network = Network(model, [x], "run", progress=False)
    setting = network.knobs.at(0.8)
    assert network.learned(setting) is network.learned(setting)
    assert network.run(setting).setting == network.learned(setting) != setting
    assert network.learned(network.knobs.at(0.9)) != network.learned(setting)
