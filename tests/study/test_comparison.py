"""tools/compare.py: every method at the same cost, on the same images; what was measured is not measured again."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import compare
import numpy as np
import pytest
import timm
import torch

from ats.cli.make_digits import make_digits
from ats.errors import UserError
from ats.flops import gflops
from ats.study.compare import HOLDS, NOISE
from ats.study.comparison import METHODS, Cell, Comparison
from ats.study.comparison_page import difference
from ats.study.subjects import QUICK, Features, shipped


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "digits"
    make_digits(folder, train_per_digit=1, val_per_digit=1, num_workers=2)
    return folder


def test_the_short_form_runs_and_resumes(digits, tmp_path, capsys, monkeypatch):
    """All methods meet the budget; the page has every table; a second run measures nothing."""
    monkeypatch.setattr(compare, "make_digits", lambda folder: None)
    words = ["--quick", "--on", "digits", "--digits", digits, "--results", tmp_path / "kept", "--output", tmp_path]
    arguments = [str(word) for word in words]
    assert compare.main(arguments) == 0
    page = (tmp_path / "COMPARISON.md").read_text()
    for text in ("## The answer", "## Digits, off the shelf", "## Digits, fine-tuned for 1 steps", "| off the shelf |"):
        assert text in page
    rows = json.loads((tmp_path / "comparison.json").read_text())["Digits"]
    off_the_shelf = [row for row in rows if row["ms"] is not None and row["method"] != "dense"]
    assert [row["method"] for row in off_the_shelf] == [METHODS[id].name for id in QUICK.methods]
    assert all(row["gflops_over_dense"] == pytest.approx(0.6, rel=0.06) for row in off_the_shelf)
    assert all(row["ms"] > 0 for row in off_the_shelf)
    assert (tmp_path / "images" / "comparison.png").stat().st_size > 10_000
    monkeypatch.setattr(Comparison, "_at_budget", lambda *_: pytest.fail("measured again"))
    assert compare.main(arguments) == 0
    assert (tmp_path / "COMPARISON.md").read_text() == page


def test_every_method_is_one_that_runs(digits, tmp_path):
    """Each entry of comparison.yaml meets a budget on the images that it is set on."""
    size = replace(QUICK, methods=None, images=8)
    comparison = Comparison(shipped("digits", digits, size), folder=tmp_path, size=size)
    for method in METHODS.values():
        model = comparison._at_budget(method, 0.6)
        x = comparison.subject.calibration
        with torch.inference_mode():
            cost = gflops(model, model.forward_tokens(x)[1], x.shape).as_run.mean().item()
        assert cost / comparison.dense_gflops == pytest.approx(0.6, rel=0.1), method.id


def test_features_of_a_timm_model(tmp_path):
    """By their cosine with the dense network's, which keep-all leaves at 1; half of the images set the budget."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(6):
        pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    name = "vit_tiny_patch16_224"
    torch.save({"model": timm.create_model(name, num_classes=0).state_dict()}, tmp_path / "w.pth")
    subject = Features(name, tmp_path / "w.pth", tmp_path, QUICK)
    assert len(subject.measured) == len(subject.calibration) == 3
    every = {"SAMPLER": "tome", "BLOCKS": list(range(12)), "R": 0}
    values, cost = subject.values(subject.network([every]))
    assert values == [pytest.approx([100] * 3, abs=1e-3)] * 2  # of CLS and of the patches
    fewer, less = subject.values(subject.network([every | {"R": 12}]))
    assert max(max(own) for own in fewer) < 100
    assert less < cost
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds 0 images"):
        Features(name, tmp_path / "w.pth", tmp_path / "empty", QUICK)


def cell(values: np.ndarray) -> Cell:
    return Cell(METHODS["tome"], 0.5, np.reshape(values, (1, 1, -1)), 0.5, [])


def test_differences_are_paired_and_count_clusters_once():
    rng = np.random.default_rng(0)
    hard = 100.0 * (rng.random(400) < 0.5)  # what both get right differs from image to image
    better = np.where(rng.random(400) < 0.05, 100.0, hard)
    assert difference(cell(better), cell(hard), None).verdict() == HOLDS
    one_cluster_differs = np.concatenate([np.full(40, 100.0), np.zeros(360)])
    clusters = np.repeat(np.arange(10), 40)
    assert difference(cell(one_cluster_differs), cell(np.zeros(400)), None).verdict() == HOLDS
    assert difference(cell(one_cluster_differs), cell(np.zeros(400)), clusters).verdict() == NOISE


def test_mistakes_are_said(tmp_path, capsys):
    assert compare.main(["--quick"]) == 1
    assert "--output DIR" in capsys.readouterr().err
    assert compare.main(["--on", "cifar10", "--cifar10", str(tmp_path / "none")]) == 1
    assert "python tools/prepare_cifar10.py --help" in capsys.readouterr().err
