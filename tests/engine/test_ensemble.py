"""Multi-view testing (golden case, counting, result.json) and the learning-rate schedules."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import encode
from torch import Tensor, nn

from ats import models
from ats.checkpoint import save_safetensors
from ats.config import get_cfg, load_config
from ats.datasets import Sample
from ats.engine.evaluate import evaluate, evaluate_weights
from ats.engine.step import lr_schedule
from ats.engine.tally import Ensemble, build_ensemble
from ats.engine.train import train
from ats.errors import UserError

FOLDER = Path(__file__).parents[1] / "fixtures" / "video_data_path"
GOLDEN = json.loads((FOLDER / "case.json").read_text())


def test_golden_meter():
    """SlowFast's TestMeter: scores, counts and accuracy, with clips in its order of arrival."""
    case = GOLDEN["meter"]
    arrays = {name: np.load(FOLDER / "arrays.npz")[f"meter.{name}"] for name in ("preds", "labels", "video_preds")}
    order = torch.from_numpy(np.load(FOLDER / "arrays.npz")["meter.clip_ids_in_arrival_order"])
    preds, labels = torch.from_numpy(arrays["preds"]), torch.from_numpy(arrays["labels"])
    assert sorted(order.tolist()) == list(range(30))
    ensemble = Ensemble(num_videos=case["num_videos"], num_views=case["num_clips"])
    for index in order.split(7):
        ensemble.add(preds[index], labels[index // case["num_clips"]], index)
    np.testing.assert_allclose(ensemble.scores().numpy(), arrays["video_preds"], rtol=0, atol=1e-6)
    assert ensemble.labels.tolist() == labels.tolist()
    assert [f"{value:.2f}" for value in ensemble.accuracy()] == [case["top1_acc"], case["top5_acc"]]


@pytest.mark.parametrize("clip_score", ["logits", "softmax"])
@pytest.mark.parametrize("method", ["sum", "max"])
def test_scores_by_hand_in_any_order(method, clip_score):
    logits = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))
    scores = (logits.double().softmax(1) if clip_score == "softmax" else logits.double()).view(4, 3, 5)
    expected = scores.sum(1) if method == "sum" else scores.amax(1)
    for order in (torch.arange(12), torch.arange(12).flip(0)):
        ensemble = Ensemble(num_videos=4, num_views=3, method=method, clip_score=clip_score)
        for index in order.split(5):
            ensemble.add(logits[index], index // 3, index)
        torch.testing.assert_close(ensemble.scores(), expected, rtol=1e-14, atol=1e-14)


def test_every_clip_counts_once():
    ensemble = Ensemble(num_videos=2, num_views=2)
    one = torch.zeros(1, 3)
    ensemble.add(one, torch.tensor([1]), torch.tensor([0]))
    for index, match in ((0, r"came twice: \[0\]"), (4, "clips 0 to 3"), (-1, "clips 0 to 3")):
        with pytest.raises(RuntimeError, match=match):
            ensemble.add(one, torch.tensor([1]), torch.tensor([index]))
    with pytest.raises(RuntimeError, match="came twice"):
        ensemble.add(torch.zeros(2, 3), torch.tensor([0, 0]), torch.tensor([2, 2]))
    with pytest.raises(RuntimeError, match=r"1 videos lack some|2 videos lack some of their 2 clips: \[0, 1\]"):
        ensemble.scores()
    with pytest.raises(RuntimeError, match="Clip 1 has another label"):
        ensemble.add(one, torch.tensor([0]), torch.tensor([1]))


def test_label_zero_is_compared_too():
    ensemble = Ensemble(num_videos=1, num_views=2)
    with pytest.raises(RuntimeError, match="another label"):
        ensemble.add(torch.zeros(2, 3), torch.tensor([0, 2]), torch.tensor([0, 1]))


class _ByBrightness(nn.Module):
    """The class is the clip's brightness, in quarters; claims to cost 2 GFLOPs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward_tokens(self, x: Tensor) -> tuple[Tensor, list]:
        assert x.ndim == 5
        assert x.isfinite().all()
        centres = torch.tensor([0.125, 0.375, 0.625, 0.875])
        return -((x.mean(dim=(1, 2, 3, 4))[:, None] * self.weight - centres) ** 2), []

    def multiply_adds(self, trace: list, input_shape: tuple[int, ...], *, paper: bool) -> Tensor:
        return torch.full((input_shape[0],), 2e9, dtype=torch.float64)


def test_videos_left_out(caplog):
    """A video with an unreadable clip is left out with all its clips, whichever batches they are in."""
    label = torch.tensor([0, 0, 3, 3, 1, 1])
    x = torch.tensor([0.1, 0.1, 0.9, torch.nan, 0.9, 0.3]).view(6, 1, 1, 1, 1).expand(6, 3, 2, 4, 4)
    whole = Sample(x, label, torch.arange(6), ["", "", "", "v/b.mp4", "", ""])
    for size in (6, 1, 2):
        batches = [
            Sample(*(part[i : i + size] for part in whole[:3]), whole.bad[i : i + size]) for i in range(0, 6, size)
        ]
        ensemble = Ensemble(num_videos=3, num_views=2)
        result = evaluate(_ByBrightness(), batches, device=torch.device("cpu"), ensemble=ensemble)
        assert (result.top1, result.video["clip_top1"]) == (50.0, 75.0)  # 0.9 outvotes 0.3
        assert {key: result.video[key] for key in ("num_videos", "num_clips", "num_views", "num_skipped_videos")} == {
            "num_videos": 2,
            "num_clips": 4,
            "num_views": 2,
            "num_skipped_videos": 1,
        }
        assert "v/b.mp4 cannot be read; its video is left out" in caplog.text
    bad = Sample(x[:2], label[:2], torch.arange(2), ["a", "a"])
    with pytest.raises(UserError, match="nothing to evaluate"):
        evaluate(_ByBrightness(), [bad], device=torch.device("cpu"), ensemble=Ensemble(num_videos=1, num_views=2))


@pytest.fixture
def config(tmp_path, monkeypatch):
    """A config for four videos of constant brightness, and the model that classifies them."""
    monkeypatch.setitem(models.MODELS, "Brightness", lambda cfg: _ByBrightness())
    for label in range(4):
        frame = np.full((48, 64, 3), (32, 96, 160, 224)[label], np.uint8)
        encode(tmp_path / "data" / f"{label}.mp4", [frame] * 20)
    (tmp_path / "data" / "test.csv").write_text("".join(f"{label}.mp4 {label}\n" for label in range(4)))
    save_safetensors(tmp_path / "w.safetensors", _ByBrightness().state_dict())
    settings = {
        "MODEL.NAME": "Brightness",
        "MODEL.NUM_CLASSES": 4,
        "TEST.DATASET": "kinetics",
        "TEST.NUM_ENSEMBLE_VIEWS": 2,
        "TEST.BATCH_SIZE": 5,
        "TEST.CHECKPOINT_FILE_PATH": tmp_path / "w.safetensors",
        "DATA.PATH_TO_DATA_DIR": tmp_path / "data",
        "DATA.NUM_FRAMES": 4,
        "DATA.TEST_CROP_SIZE": 16,
        "DATA.MEAN": [0, 0, 0],
        "DATA.STD": [1, 1, 1],
        "DATA_LOADER.NUM_WORKERS": 0,
        "OUTPUT_DIR": tmp_path / "out",
    }
    words = [str(word) for pair in settings.items() for word in pair]
    return lambda *overrides: load_config(None, [*words, *overrides])


def test_result_file_of_videos(config, tmp_path, capsys):
    evaluate_weights(config())
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["top1"], result["top5"], result["num_videos"], result["num_clips"]) == (100.0, 100.0, 4, 24)
    assert (result["num_views"], result["num_skipped_videos"], result["gflops"]["mean"]) == (6, 0, 2.0)
    assert result["gflops_per_video"] == {"mean": 12.0, "paper_mean": 12.0, "dense": 12.0}
    table = capsys.readouterr().out
    assert "2 x 6" in table
    assert "clips/s" in table
    assert "clips/s is no benchmark: tools/benchmark.py times the network beside the dense one." in table


def test_training_on_clips(config, tmp_path, caplog):
    """The training loop takes clips like images, with mixup."""
    for split in ("train", "val"):
        (tmp_path / "data" / f"{split}.csv").write_text((tmp_path / "data" / "test.csv").read_text())
    settings = ["TRAIN.DATASET", "kinetics", "TRAIN.BATCH_SIZE", "4", "SOLVER.MAX_EPOCH", "2", "MIXUP.ENABLE", "True"]
    settings += ["DATA.TRAIN_CROP_SIZE", "16", "DATA.TRAIN_JITTER_SCALES", "[16, 20]", "AUG.RE_PROB", "0"]
    caplog.set_level("INFO", logger="ats")
    train(config("TRAIN.ENABLE", "True", *settings))
    assert " clips/s, " in caplog.text
    log = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [line["event"] for line in log] == ["train", "val"] * 2
    assert log[-1]["top1"] == 100.0


def test_bad_video_in_testing(config, tmp_path):
    """It is an error with line and path, or it is left out and counted."""
    (tmp_path / "data" / "2.mp4").write_bytes(b"")
    with pytest.raises(UserError, match=rf"test\.csv, line 3: Cannot read the video {tmp_path}/data/2\.mp4"):
        evaluate_weights(config())
    evaluate_weights(config("TEST.ON_BAD_VIDEO", "skip", "DATA_LOADER.NUM_WORKERS", "1"))
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (result["num_videos"], result["num_skipped_videos"], result["num_clips"]) == (3, 1, 18)
    assert result["top1"] == 100.0


def test_images_have_one_view():
    cfg = get_cfg()
    assert build_ensemble(cfg, object()) is None
    cfg.TEST.NUM_ENSEMBLE_VIEWS = 5
    with pytest.raises(UserError, match="images have one view; type 1"):
        build_ensemble(cfg, object())


@pytest.mark.parametrize("name", GOLDEN["lr_schedules"])
def test_golden_learning_rates(name):
    case, cfg = GOLDEN["lr_schedules"][name], get_cfg()
    cfg.SOLVER.update(case["solver"])
    schedule = lr_schedule(cfg)
    for epoch, expected in case["lr_at_epoch"]:
        assert schedule(epoch) == pytest.approx(expected, rel=1e-9)


def test_steps_from_the_config():
    policy = ["SOLVER.LR_POLICY", "steps_with_relative_lrs", "SOLVER.WARMUP_EPOCHS", "0", "SOLVER.BASE_LR", "0.005"]
    schedule = lr_schedule(load_config(None, [*policy, "SOLVER.STEPS", "[0, 11, 14]", "SOLVER.LRS", "[1, 0.1, 0.01]"]))
    assert [schedule(epoch) for epoch in (0, 10.99, 11, 14, 99)] == pytest.approx([5e-3, 5e-3, 5e-4, 5e-5, 5e-5])
    for steps, rates in (("[]", "[]"), ("[1, 2]", "[1, 0.1]"), ("[0, 5, 3]", "[1, 1, 1]"), ("[0, 5]", "[1]")):
        with pytest.raises(UserError, match=r"needs SOLVER\.STEPS, ascending epochs that start at 0"):
            lr_schedule(load_config(None, [*policy, "SOLVER.STEPS", steps, "SOLVER.LRS", rates]))
