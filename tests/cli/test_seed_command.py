"""The project's first command, on files: DeiT-S + ATS evaluated on an ImageNet tree with a checkpoint in DeiT's format.

The files are golden case A4 (a true DeiT-S, images of 224 pixels), so the numbers in result.json are known.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from golden import golden_case, images, weights_by_recipe, write_deit_small
from test_config import OFFICIAL

from ats.cli.run_net import main

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
SEED_CONFIG = "configs/ImageNet/DeiT_S.yaml"
# A4's images went in as they are: no resize, another mean and deviation.
AS_GOLDEN = ["DATA.TEST_CROP_RATIO", "1.0", "DATA.MEAN", "[0.5,0.5,0.5]", "DATA.STD", "[0.25,0.25,0.25]"]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("imagenet")
    write_deit_small(folder)
    return folder


def words(files: Path, output: Path, *overrides: str, cfg: str = SEED_CONFIG) -> list[str]:
    """What is typed behind tools/run_net.py."""
    weights = ["TEST.CHECKPOINT_FILE_PATH", str(files / "deit_small_patch16_224-cd65a155.pth"), *overrides]
    data = ["DATA.PATH_TO_DATA_DIR", str(files), "DATA_LOADER.NUM_WORKERS", "0", "DEVICE", "cpu"]
    return ["--cfg", cfg, *data, *weights, "OUTPUT_DIR", str(output)]


def evaluate(files: Path, output: Path, *overrides: str, cfg: str = str(ROOT / SEED_CONFIG)) -> dict:
    """`result.json` of the command, without the start of a process."""
    assert main(words(files, output, *overrides, cfg=cfg)) == 0
    return json.loads((output / "result.json").read_text())


@pytest.fixture(scope="module")
def result(files, tmp_path_factory) -> dict:
    """Of the shipped config on A4's images as they are."""
    return evaluate(files, tmp_path_factory.mktemp("result"), *AS_GOLDEN)


def test_golden_numbers(result):
    """Every image is classified as the official code does, with the official number of tokens in every block."""
    _, golden = golden_case("A4_deit_small_recipe")
    assert result["top1"] == result["top5"] == 100
    assert result["num_samples"] == len(golden["logits"]) == 4
    for block in range(3, 12):
        kept = (golden[f"ats{block}_kept"] >= 0).sum(1).mean() + 1
        assert result["tokens_per_block"][str(block)] == pytest.approx(kept)
    gflops = result["gflops"]
    assert set(gflops) == {"mean", "std", "min", "p5", "p50", "p95", "max", "paper_mean", "dense"}
    assert gflops["min"] <= gflops["p5"] <= gflops["p50"] <= gflops["p95"] <= gflops["max"] < gflops["dense"]
    assert gflops["min"] < gflops["mean"] < gflops["paper_mean"] < gflops["dense"]
    assert gflops["dense"] == pytest.approx(4.6, abs=0.02)
    assert result["params_m"] == pytest.approx(22.05, abs=0.005)
    assert result["images_per_second"] > 0
    assert {"versions", "config_sha256"} <= set(result)


def test_the_official_yaml_gives_the_same(files, result, tmp_path):
    (tmp_path / "official.yaml").write_text(OFFICIAL)
    theirs = evaluate(files, tmp_path / "out", *AS_GOLDEN, cfg=str(tmp_path / "official.yaml"))
    for key in ("top1", "top5", "num_samples", "gflops", "tokens_per_block", "params_m"):
        assert theirs[key] == result[key]


def test_ats_off_is_timms_deit(files, tmp_path):
    """ATS.ENABLE False: the predictions of timm's model with the same weights, at the dense cost."""
    case, golden = golden_case("A4_deit_small_recipe")
    model = timm.create_model("deit_small_patch16_224").eval()
    model.load_state_dict(weights_by_recipe(case["weights"]))
    with torch.no_grad():
        predicted = model(images(golden["image_u8"])).argmax(1).numpy()
    result = evaluate(files, tmp_path, *AS_GOLDEN, "ATS.ENABLE", "False")
    assert result["top1"] == 100 * (predicted == golden["logits"].argmax(1)).mean()
    assert result["gflops"]["mean"] == result["gflops"]["dense"] == result["gflops"]["paper_mean"]
    assert result["tokens_per_block"] == {}


def test_the_command_verbatim(files, tmp_path):
    """With DeiT's own preprocessing, as typed in the README, as a process in the repository."""
    command = [sys.executable, "tools/run_net.py", *words(files, tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "GFLOPs" in done.stdout
    assert json.loads((tmp_path / "result.json").read_text())["num_samples"] == 4
