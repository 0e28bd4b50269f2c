"""The shipped weights of the small XViT do what docs/DEMOS.md says."""

from __future__ import annotations

import demo
import demo_video
import pytest
from helpers import demo_table

from ats.cli import make_moving_digits
from ats.datasets import build_loader

pytestmark = pytest.mark.long


def test_shipped_weights(tmp_path, monkeypatch):
    """Half of the videos: near the table of docs/DEMOS.md, and with shuffled frames far below, as a network that uses
    time is; the test set does not depend on the training set, of which little is made.
    """
    splits = make_moving_digits.split_digits(seed=0)
    few = splits | {"train": make_moving_digits.Digits(*(a[:10] for a in splits["train"]))}
    monkeypatch.setattr(make_moving_digits, "split_digits", lambda seed: few)
    make_moving_digits.make_moving_digits(tmp_path / "data", train_per_digit=1, val_per_digit=1, num_workers=2)
    table = demo_table("## Digits in motion", [row.name for row in demo_video.ROWS])
    assert len(table) == len(demo_video.ROWS)
    rows = {row.name: row for row in demo_video.ROWS}
    loader = build_loader(demo.row_config(demo_video.ROWS[0], data=tmp_path / "data", output=tmp_path), "test")
    batches = list(loader)
    for name in ("dense", "ATS fine-tuned, blocks 5-11"):
        cfg = demo.row_config(rows[name], data=tmp_path / "data", output=tmp_path)
        model, device = demo.load_model(cfg)
        result, shuffled = demo_video.evaluate_both(model, batches, device=device, cfg=cfg, dataset=loader.dataset)
        top1, shuffled_top1, as_run, paper, dense = map(float, table[name][:5])
        assert result.video["num_videos"] == 359
        assert result.top1 == pytest.approx(top1, abs=4)  # twice the sampling error of 359 videos
        assert shuffled.top1 == pytest.approx(shuffled_top1, abs=6)
        assert shuffled.top1 < 0.75 * result.top1
        for value, kind in ((as_run, "mean"), (paper, "paper_mean"), (dense, "dense")):
            assert result.gflops[kind] == pytest.approx(value, rel=0.03)
