"""The GFLOPs formula: equal to torch's own counter at batch size 1, and to the published figures."""

from __future__ import annotations

import pytest
import torch
from helpers import randomise
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ats.config import get_cfg
from ats.flops import dense_gflops, gflops
from ats.models import build_model
from ats.models.block import ats_blocks
from ats.tokens import LAYOUTS, BlockRecord, Trace


def counted(model: torch.nn.Module, x: torch.Tensor) -> tuple[float, Trace]:
    """GFLOPs (multiply-adds) by torch's counter; unfused attention, since older counters miss the CPU's fused one."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _, trace = model.forward_tokens(x)
    return counter.get_total_flops() / 2 / 1e9, trace


@pytest.mark.parametrize("score", ["cls_attention_value_norm", "cls_attention", "mean_attention"])
@pytest.mark.parametrize("distilled", [False, True])
@pytest.mark.parametrize("blocks", [None, [0], [1, 3], [2, 3]], ids=str)
@pytest.mark.parametrize("size", [32, 48])
def test_formula_equals_counter(score, distilled, blocks, size):
    """To the last multiply-add: dense, single-stage, interleaved and multi-stage networks, another image size."""
    cfg = get_cfg()
    cfg.merge_from_list([
        "VIT.IMG_SIZE", 32, "VIT.PATCH_SIZE", 4, "VIT.EMBED_DIM", 48, "VIT.DEPTH", 4, "VIT.NUM_HEADS", 3,
        "VIT.MLP_RATIO", 3,
        "VIT.DISTILLED", distilled, "MODEL.NUM_CLASSES", 11, "ATS.SCORE", score, "ATS.NUM_TOKENS", 0.8,
        "ATS.ENABLE", blocks is not None, "ATS.BLOCKS", blocks or [0],
    ])  # fmt: skip
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    x = torch.randn(1, 3, size, size)
    total, trace = counted(model, x)
    cost = gflops(model, trace, x.shape)
    assert cost.as_run.item() * 1e9 == pytest.approx(total * 1e9, abs=0.5)
    if blocks is None:
        assert cost.dense == cost.paper.item() == cost.as_run.item()
    else:
        assert cost.as_run.item() < cost.dense or score == "mean_attention"


def test_each_image_is_counted_by_its_own_tokens():
    """A batch's GFLOPs are those of its images one by one."""
    cfg = get_cfg()
    cfg.merge_from_list(
        ["VIT.IMG_SIZE", 32, "VIT.PATCH_SIZE", 4, "VIT.EMBED_DIM", 32, "VIT.NUM_HEADS", 2, "ATS.ENABLE", True]
    )
    torch.manual_seed(0)
    model = build_model(cfg).double().eval()
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    together = gflops(model, model.forward_tokens(x)[1], x.shape)
    for i in range(4):
        alone = gflops(model, model.forward_tokens(x[i : i + 1])[1], x[:1].shape)
        assert alone.as_run.item() == together.as_run[i].item()
        assert alone.paper.item() == together.paper[i].item()
    assert len(set(together.as_run.tolist())) > 1


STAGES = {
    "sampling": [{"BLOCKS": [1, 3], "NUM_TOKENS": 0.7}],
    "random by mean attention": [{"SAMPLER": "random", "BLOCKS": [0, 2], "NUM_TOKENS": 30, "SCORE": "mean_attention"}],
    "tome": [{"SAMPLER": "tome", "BLOCKS": [0, 1, 2, 3], "R": [9, 0, 5, 40]}],
    "evit after sampling": [{"BLOCKS": [1], "NUM_TOKENS": 30}, {"SAMPLER": "evit", "BLOCKS": [2], "KEEP_RATE": 0.95}],
    "tome before top-k": [{"SAMPLER": "tome", "BLOCKS": [0], "R": 9}, {"SAMPLER": "topk", "BLOCKS": [2, 3]}],
    "merging what is dropped": [{"DROPPED": "merge", "BLOCKS": [1, 2], "NUM_TOKENS": 0.7}],
    "fusing what is dropped": [{"DROPPED": "fuse", "BLOCKS": [0, 2], "NUM_TOKENS": 0.7}],
    "ppt, pitome": [{"SAMPLER": "ppt", "BLOCKS": [1], "R": 12}, {"SAMPLER": "pitome", "BLOCKS": [0, 2], "RATIO": 0.8}],
    "merge early, sample late": [{"SAMPLER": "merge_sample", "BLOCKS": [0, 1, 2, 3], "RATIO": 0.8}],
    "merge by thresholds": [{"SAMPLER": "merge_sample", "BLOCKS": [0, 1, 2, 3], "RATIO": 0.8, "THRESHOLD": 0.5}],
}
PSVIT = [
    "MODEL.NAME", "PSViT", "DATA.TRAIN_CROP_SIZE", 32, "PSVIT.NUM_POINTS", [6, 6], "PSVIT.EMBED_DIM", 24,
    "PSVIT.NUM_HEADS", 3, "PSVIT.DEPTH", 6, "PSVIT.NUM_ITERS", 2, "PSVIT.STEM_DIMS", [8, 8, 16],
]  # fmt: skip


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("stages", STAGES)
def test_padding_is_counted_as_run(stages, layout, batch):
    """Rows of padding are computed, so they count as run; the paper's accounting is of tokens, in every layout."""
    cfg = get_cfg()
    cfg.merge_from_list([
        "VIT.IMG_SIZE", 32, "VIT.PATCH_SIZE", 4, "VIT.EMBED_DIM", 24, "VIT.DEPTH", 4, "VIT.NUM_HEADS", 3,
        "ATS.ENABLE", True, "ATS.LAYOUT", layout, "ATS.STAGES", STAGES[stages],
    ])  # fmt: skip
    model = randomise(build_model(cfg)).eval()
    x = torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    total, trace = counted(model, x)
    cost = gflops(model, trace, x.shape)
    if layout != "packed" or batch == 1:  # the counter sees a packed batch's attention padded
        assert cost.as_run.sum().item() * 1e9 == pytest.approx(total * 1e9, abs=0.5)
    model.layout = "packed"
    want = gflops(model, model.forward_tokens(x)[1], x.shape)
    assert torch.equal(cost.paper, want.paper)
    assert (cost.as_run >= want.as_run).all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_padding_is_counted_behind_moving_points(layout):
    """PS-ViT, whose first blocks have no padding."""
    cfg = get_cfg()
    cfg.merge_from_list([*PSVIT, "ATS.ENABLE", True, "ATS.LAYOUT", layout, "ATS.BLOCKS", [3, 5], "ATS.NUM_TOKENS", 20])
    model, x = randomise(build_model(cfg)).eval(), torch.randn(1, 3, 32, 32)
    total, trace = counted(model, x)
    assert gflops(model, trace, x.shape).as_run.item() * 1e9 == pytest.approx(total * 1e9, abs=0.5)


@pytest.mark.parametrize(
    ("embed_dim", "num_heads", "published"),
    [(192, 3, 1.3), (258, 6, 2.2), (318, 6, 3.2), (384, 6, 4.6), (768, 12, 17.6)],
)
def test_published_dense_gflops(embed_dim, num_heads, published):
    """DeiT-Ti, widths 258 and 318 of the paper's scaling figure, DeiT-S and DeiT-B at 224 pixels."""
    cfg = get_cfg()
    cfg.merge_from_list(["VIT.EMBED_DIM", embed_dim, "VIT.NUM_HEADS", num_heads])
    with torch.device("meta"):
        model = build_model(cfg)
    assert dense_gflops(model, (1, 3, 224, 224)) == pytest.approx(published, abs=0.06)


def test_papers_token_counts_give_the_papers_gflops():
    """With the mean tokens of the paper's histograms DeiT-S costs about the paper's 2.9 GFLOPs (3.1 with counts read
    off a plot).
    """
    cfg = get_cfg()
    cfg.merge_from_list(["VIT.EMBED_DIM", 384, "VIT.NUM_HEADS", 6, "ATS.ENABLE", True])
    with torch.device("meta"):
        model = build_model(cfg)
    means = [162, 146, 132, 117, 105, 98, 82, 72, 62]
    counts = [torch.tensor([n]) for n in (197, *means)]
    records = [
        BlockRecord(block.index, n, n, n, kept, reduction=block.reduction)
        for block, n, kept in zip(ats_blocks(model), counts, counts[1:], strict=False)
    ]
    cost = gflops(model, Trace(records), (1, 3, 224, 224))
    assert cost.paper.item() == pytest.approx(3.1, abs=0.06)
    assert cost.as_run.item() < cost.paper.item() < cost.dense
