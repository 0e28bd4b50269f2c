"""The scripts of examples/ run offline, as a reader would run them."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from plug_into_timm import main

TINY = ["--model", "vit_tiny_patch16_224", "--blocks", "4", "8"]


def test_plug_into_timm(tmp_path, capsys):
    """With random weights and scikit-learn's photographs, it prints the kept counts, at most K, and saves a picture."""
    assert main([*TINY, "--num-tokens", "60", "--output", str(tmp_path / "kept.png")]) == 0
    said = capsys.readouterr().out
    kept = {int(block): eval(counts) for block, counts in re.findall(r"kept by block +(\d+): (\[.*\])", said)}
    assert list(kept) == [4, 8]
    assert all(8 <= after <= before <= 60 for before, after in zip(kept[4], kept[8], strict=True))
    assert "random weights" in said
    assert "input tokens: 197" in said
    as_run, dense = re.search(r"GFLOPs: (.*) instead of (.*)", said).groups()
    assert all(float(value) < float(dense) for value in as_run.split(", "))
    width, height = Image.open(tmp_path / "kept.png").size
    assert width > height > 100


def test_plug_into_timm_with_a_checkpoint_and_an_image(tmp_path, capsys):
    """With given weights and pictures, the classes are those of the weights."""
    torch.manual_seed(1)
    weights = timm.create_model("vit_tiny_patch16_224").state_dict()
    weights["head.bias"][123] = 1e3
    torch.save(weights, tmp_path / "weights.pth")
    Image.effect_mandelbrot((300, 260), (-2, -1, 1, 1), 50).save(tmp_path / "image.png")
    files = ["--checkpoint", str(tmp_path / "weights.pth"), "--image", str(tmp_path / "image.png")]
    assert main([*TINY, *files, "--output", str(tmp_path / "kept.png")]) == 0
    said = capsys.readouterr().out
    assert f"weights of {tmp_path}" in said
    assert "classes: [123]" in said
    assert "dense again: classes [123]" in said


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (
            ["--model", "vit_tinny_patch16_224"],
            "timm has no such model. Did you mean vit_tiny",
        ),
        (["--model", "resnet10t"], "ats.patch cannot take ResNet"),
        ([*TINY, "--image", "nowhere.png"], "--image: "),
        ([*TINY, "--checkpoint", "nowhere.pth"], "nowhere.pth"),
        ([*TINY, "--num-tokens", "-3"], "num_tokens -3.0 (block 4): give a ratio"),
    ],
)
def test_mistakes_are_explained(words, text, capsys):
    assert main(words) == 1
    assert text in capsys.readouterr().err
