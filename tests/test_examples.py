"""The scripts of examples/ run offline, as a reader would run them."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import dense_maps
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
    as_run, dense = re.search(r"GFLOPs per picture: (.*) instead of (.*)", said).groups()
    assert all(float(value) < float(dense) for value in as_run.split(", "))
    width, height = Image.open(tmp_path / "kept.png").size
    assert width > height > 100


def test_plug_into_timm_shows_the_point(tmp_path, capsys):
    """As typed, it runs a trained network, on which two photographs keep different numbers of tokens."""
    assert main(["--output", str(tmp_path / "kept.png")]) == 0
    said = capsys.readouterr().out
    assert "weights of configs/CIFAR10/weights/vit_dense.safetensors" in said
    kept = [eval(counts) for counts in re.findall(r"kept by block +\d+: (\[.*\])", said)]
    assert sum(abs(one - other) for one, other in kept) >= 20
    as_run, dense = re.search(r"GFLOPs per picture: (.*) instead of (.*)", said).groups()
    one, other = (float(value) for value in as_run.split(", "))
    assert other - one > 0.05 * float(dense)
    assert Image.open(tmp_path / "kept.png").size[0] > 1000


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
    assert "classes: 123\n" in said
    assert "dense again: classes 123\n" in said


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


def test_the_notebook_runs(monkeypatch, capsys):
    """Cell by cell; what it prints is what is stored in it."""
    monkeypatch.setenv("MPLBACKEND", "Agg")
    folder = Path(__file__).parents[1] / "examples"
    monkeypatch.chdir(folder)
    names: dict = {}
    for cell in json.loads((folder / "plug_in.ipynb").read_text())["cells"]:
        if cell["cell_type"] != "code":
            continue
        capsys.readouterr()
        exec("".join(cell["source"]), names)
        stored = "".join("".join(out["text"]) for out in cell["outputs"] if out["output_type"] == "stream")
        if "num_tokens=[1" not in stored:  # what calibration finds is within a token of it
            assert capsys.readouterr().out == stored


@pytest.mark.long
def test_dense_maps(tmp_path, capsys):
    """A table of all methods, and a picture of the maps that the weights' decoder makes."""
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0)
    narrow = nn.BatchNorm2d(4)
    decoder = {f"bn1.{key}": value for key, value in narrow.state_dict().items() if key != "num_batches_tracked"}
    decoder |= {"upconv1.weight": torch.randn(192, 4, 4, 4), "upconv1.bias": torch.randn(4)}
    decoder |= {"final_conv.weight": torch.randn(1, 4, 1, 1), "final_conv.bias": torch.randn(1)}
    torch.save({"model": model.state_dict(), "decoder": decoder}, tmp_path / "weights.pth")
    for i in range(4):
        Image.effect_mandelbrot((300, 260), (-2 + i / 8, -1, 1, 1), 50).save(tmp_path / f"{i}.png")
    words = ["--model", "vit_tiny_patch16_224", "--images", str(tmp_path), "--budgets", "0.6"]
    words += ["--output", str(tmp_path / "maps" / "maps.png")]
    assert dense_maps.main([*words, "--weights", str(tmp_path / "weights.pth")]) == 0
    said = capsys.readouterr().out
    found = re.findall(r"\| +(zero|last|nearest) +\| ([-0-9.]+)", said)
    assert [mode for mode, _ in found] == ["zero", "last", "nearest", "nearest", "nearest", "nearest"]
    assert all(-1 <= float(value) < 1 for _, value in found)
    assert "mean of 4 images" in said
    width, height = Image.open(tmp_path / "maps" / "maps.png").size
    assert 300 < width < height


def test_dense_maps_without_a_decoder():
    """Principal components: what features vary most in comes first, all in 0..1."""
    features = torch.randn(3, 4, 4, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 9, *[0.1] * 6])
    shown = dense_maps.components(features)(features)
    assert shown.shape == (3, 3, 4, 4)
    assert (shown.min(), shown.max()) == (0, 1)
    pairs = zip(shown[:, 0].flatten(), features[..., 1].flatten(), strict=True)
    assert abs(torch.corrcoef(torch.tensor([[*map(float, pair)] for pair in pairs]).T)[0, 1]) > 0.95


def test_dense_maps_explains_mistakes(tmp_path, capsys):
    assert dense_maps.main(["--images", str(tmp_path), "--weights", "nowhere.pth"]) == 1
    assert "--weights nowhere.pth: there is no such file" in capsys.readouterr().err
    torch.save(timm.create_model("vit_tiny_patch16_224", num_classes=0).state_dict(), tmp_path / "w.pth")
    words = ["--images", str(tmp_path), "--model", "vit_tiny_patch16_224", "--weights", str(tmp_path / "w.pth")]
    assert dense_maps.main(words) == 1
    assert "it holds 0 images" in capsys.readouterr().err
