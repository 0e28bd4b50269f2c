"""Where time and GFLOPs of a network go, by part and by block."""

from __future__ import annotations

import pytest
import torch
from helpers import video_model
from tiny_vit import tiny

from ats.benchmark.breakdown import PARTS, part_seconds
from ats.benchmark.timing import token_ratio
from ats.config import load_config
from ats.flops import gflops
from ats.models import build_model


def test_parts_add_up_and_leave_the_network_alone():
    """Each part takes time, and the model still computes the same."""
    model = build_model(tiny()).eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        want = model(x)
        seconds = part_seconds(model, x, rounds=1)
        assert torch.equal(model(x), want)
    assert set(seconds) == set(PARTS)
    assert seconds.pop("scatter and gather") == 0  # a ViT does not use the grid
    assert min(seconds.values()) > 0


@pytest.mark.parametrize("config", ["MViTv2_T_ATS", "CvT_13_ATS"])
def test_parts_of_networks_that_use_the_grid(config):
    """MViT and CvT tell the clock where they scatter and gather, too."""
    model = build_model(load_config(f"configs/ImageNet/{config}.yaml")).eval()
    seconds = part_seconds(model, torch.randn(1, 3, 224, 224), rounds=1)
    assert min(seconds[part] for part in ("scatter and gather", "scoring and sampling", "attention", "mlp")) > 0


@pytest.mark.parametrize(
    ("make", "shape", "num_blocks"),
    [
        (lambda: build_model(tiny("ATS.NUM_TOKENS", 0.5)), (2, 3, 224, 224), 12),
        (lambda: video_model("xvit", "ATS.ENABLE", True, dtype=torch.float32), (2, 3, 8, 32, 32), 4),
        (lambda: video_model("divided", "ATS.ENABLE", True, dtype=torch.float32), (2, 3, 8, 32, 32), 4),
        (lambda: build_model(load_config("configs/ImageNet/MViTv2_T_ATS.yaml")), (1, 3, 224, 224), 10),
        (lambda: build_model(load_config("configs/ImageNet/CvT_13_ATS.yaml")), (1, 3, 224, 224), 13),
        (lambda: build_model(load_config("configs/ImageNet/PSViT_Ti_14_ATS.yaml")), (1, 3, 224, 224), 12),
    ],
)
def test_gflops_of_blocks_add_up(make, shape, num_blocks):
    """Their sum is the total without what lies outside the blocks, which the dense network has too."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.inference_mode():
        trace = model.forward_tokens(torch.randn(shape))[1]
    whole = gflops(model, trace, shape)
    for paper, total in ((False, whole.as_run), (True, whole.paper)):
        blocks = torch.stack(model.block_multiply_adds(trace, shape, paper=paper)) / 1e9
        dense = torch.stack(model.block_multiply_adds([], (1, *shape[1:]), paper=True)) / 1e9
        assert blocks.shape == (num_blocks, shape[0])
        assert (blocks.sum(dim=0) < total).all()
        torch.testing.assert_close(total - blocks.sum(dim=0), (whole.dense - dense.sum()).expand(shape[0]))


def test_tokens_over_dense_tokens():
    """By hand, from what each block keeps; None where the network itself shrinks the grid."""
    model, x = build_model(tiny("ATS.NUM_TOKENS", 0.5)).eval(), torch.randn(2, 3, 224, 224)
    with torch.inference_mode():
        trace = model.forward_tokens(x)[1]
    tokens = [197.0] * 3 + [entry.num_tokens.double().mean().item() for entry in trace]
    assert token_ratio(model, trace, x.shape) == pytest.approx(sum(tokens) / (12 * 197))
    assert token_ratio(build_model(load_config("configs/ImageNet/MViTv2_T_ATS.yaml")), [], (1, 3, 224, 224)) is None
