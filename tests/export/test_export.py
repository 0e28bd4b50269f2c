"""Exported files compute what the network computes, for every batch size, and say what they need."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import onnxruntime
import pytest
import torch
from test_timm_config import config as timm_config
from torch import nn

from ats.checkpoint import load_checkpoint, save_safetensors
from ats.cli import export as tool
from ats.config import CfgNode, get_cfg
from ats.errors import UserError
from ats.export import graph as export
from ats.export import runner
from ats.models import build_model

SMALL = [
    "MODEL.NUM_CLASSES", 4, "VIT.IMG_SIZE", 32, "VIT.PATCH_SIZE", 4, "VIT.EMBED_DIM", 32, "VIT.DEPTH", 2,
    "VIT.NUM_HEADS", 2, "DATA.TEST_CROP_SIZE", 32, "DATA.TEST_CROP_RATIO", 1.0, "ATS.BLOCKS", [0, 1],
    "ATS.NUM_TOKENS", 40,
]  # fmt: skip
NETWORKS = {
    "ViT": [*SMALL, "ATS.ENABLE", True],
    "distilled, mean attention, top k": [
        *SMALL, "ATS.ENABLE", True, "VIT.DISTILLED", True, "ATS.SCORE", "mean_attention", "ATS.SAMPLER", "topk",
    ],
    "ToMe": [*SMALL, "ATS.ENABLE", True, "ATS.SAMPLER", "tome", "TOME.R", 20],
    "EViT behind sampling": [
        *SMALL, "ATS.ENABLE", True, "ATS.STAGES", [{"BLOCKS": [0]}, {"SAMPLER": "evit", "BLOCKS": [1]}],
    ],
    "PS-ViT": [
        "MODEL.NAME", "PSViT", "MODEL.NUM_CLASSES", 4, "PSVIT.NUM_POINTS", [6, 5], "PSVIT.NUM_ITERS", 2,
        "PSVIT.STEM_DIMS", [8, 4, 12], "PSVIT.DEPTH", 4, "PSVIT.EMBED_DIM", 24, "PSVIT.NUM_HEADS", 2,
        "DATA.TRAIN_CROP_SIZE", 32, "DATA.TEST_CROP_SIZE", 32, "DATA.TEST_CROP_RATIO", 1.0,
        "ATS.ENABLE", True, "ATS.BLOCKS", [2, 3], "ATS.NUM_TOKENS", 12,
    ],
    "dense": [*SMALL, "DATA.MEAN", [0.5, 0.4, 0.3]],
}  # fmt: skip


def trained(cfg: CfgNode, path) -> CfgNode:
    """The config with a file of weights that make tokens differ."""
    torch.manual_seed(0)
    model = build_model(cfg)
    for name, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.1)
        if parameter.ndim == 1 and name.endswith("weight"):  # of a norm
            parameter.data += 1
    save_safetensors(path, model.state_dict())
    cfg.TEST.CHECKPOINT_FILE_PATH = str(path)
    return cfg


def settings(name: str) -> CfgNode:
    if name.startswith("timm/"):
        small = "[[img_size, 32], [patch_size, 8], [embed_dim, 48], [depth, 2], [num_heads, 3]]"
        score = "mean_attention" if "gap" in name else "cls_attention_value_norm"
        return timm_config(name.removeprefix("timm/"), "ATS.BLOCKS", [0, 1], "ATS.SCORE", score, small=small)
    cfg = get_cfg()
    cfg.merge_from_list(NETWORKS[name])
    return cfg


# ONNX takes several seconds to write, so it has one network of every kind.
CASES = [(name, ".onnx") for name in (*NETWORKS, "timm/vit_base_patch16_siglip_gap_224")] + [
    (name, ".pt2") for name in ("ViT", "timm/deit3_small_patch16_224", "timm/beit_base_patch16_224")
]


@pytest.mark.long
@pytest.mark.parametrize(("name", "suffix"), CASES)
def test_files_equal_the_eager_network(name, suffix, tmp_path):
    """Logits to 1e-4 and every kept count of the packed network, at batch sizes that the export has not seen; the file
    says what its input is.
    """
    cfg = trained(settings(name), tmp_path / "weights.safetensors")
    exported = export.export(cfg)
    slots = {"ToMe": [45, 25], "EViT behind sampling": [40, 30], "PS-ViT": [12, 12], "dense": []}
    slots = slots.get(name, [12, 12] if name.startswith("timm/") else [40, 40])
    assert list(exported.slots.values()) == slots
    path = tmp_path / f"network{suffix}"
    export.save(exported, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [path.name, "weights.safetensors"]
    run = export.load(path)
    for batch_size in (1, 3, 8):
        x = torch.randn(batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(batch_size))
        with torch.no_grad():
            logits, trace = exported.eager.forward_tokens(x)
        got = run(x)
        torch.testing.assert_close(got[0], logits, atol=1e-4, rtol=0)
        assert len(got) == (2 if cfg.ATS.ENABLE else 1)
        if trace:
            kept = torch.stack([entry.num_tokens for entry in trace], dim=1)
            assert torch.equal(got[1], kept)
            assert batch_size == 1 or cfg.ATS.SAMPLER in ("topk", "tome") or len(kept.unique()) > 1
    if suffix == ".onnx":
        check_facts(path, cfg)


def check_facts(path: Path, cfg: CfgNode) -> None:
    """The file's metadata, and the names and shapes of what goes in and comes out."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    facts = session.get_modelmeta().custom_metadata_map
    assert json.loads(facts["input_size"]) == [3, 32, 32]
    assert json.loads(facts["mean"]) == (cfg.DATA.MEAN or [0.485, 0.456, 0.406])
    assert json.loads(facts["std"]) == [0.229, 0.224, 0.225]
    assert (facts["num_classes"], facts["ats_blocks"]) == ("4", str(cfg.ATS.BLOCKS if cfg.ATS.ENABLE else []))
    assert [(i.name, i.shape) for i in session.get_inputs()] == [("images", ["batch", 3, 32, 32])]
    names = ["logits", "num_tokens"] if cfg.ATS.ENABLE else ["logits"]
    assert [(out.name, out.shape[0]) for out in session.get_outputs()] == [(name, "batch") for name in names]


def test_the_command_checks_on_random_and_real_images(colours, tmp_path, capsys, monkeypatch):
    """tools/export.py by its command line; then with a file that computes something else."""
    cfg = trained(settings("ViT"), tmp_path / "weights.safetensors")
    cfg.DATA.PATH_TO_DATA_DIR = str(colours)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    path = tmp_path / "made" / "vit.pt2"
    words = ["--cfg", str(tmp_path / "config.yaml"), "-o", str(path), "--images", "6", "ATS.NUM_TOKENS", "30"]
    assert tool.main(words) == 0
    printed = capsys.readouterr().out
    assert "Token slots after block 0: 30, 1: 30 (ATS.NUM_TOKENS 30)." in printed
    assert "On 6 random images: difference of logits" in printed
    assert f"On 6 images of {colours}: difference of logits" in printed
    assert printed.count("other token counts in 0 of 6 images") == 2
    extra = {runner.FACTS: ""}
    with open(path, "rb") as file:
        torch.export.load(file, extra_files=extra)
    assert json.loads(extra[runner.FACTS])["num_classes"] == "4"

    load = export.load
    monkeypatch.setattr(export, "load", lambda *args, **kwargs: lambda x: [out + 1 for out in load(*args, **kwargs)(x)])
    assert tool.main([*words, "--dense"]) == 1
    captured = capsys.readouterr()
    assert "Dense: no block samples tokens." in captured.out
    assert "does not compute what the network does (6 of 6 random images are far off)" in captured.err


@pytest.mark.parametrize(
    ("overrides", "output", "text"),
    [
        (["MODEL.NAME", "XViT"], "x.onnx", r"MODEL.NAME XViT cannot be exported; ViT .*, PSViT and timm/<name> can"),
        (
            ["ATS.ENABLE", "True", "ATS.BLOCKS", "[0]", "ATS.SAMPLER", "random"],
            "x.pt2",
            "random cannot be exported; .*topk, tome, evit, .* can",
        ),
        (["--dens"], "x.pt2", r"Unknown option --dens. Did you mean --dense"),
        ([], "x.onnx", "TEST.CHECKPOINT_FILE_PATH is empty"),
        ([], "x.onx", r"choose .onnx or .pt2.*Did you mean onnx"),
        (["--format", "tflite"], "x.bin", "--format tflite: choose"),
        (["--images", "0"], "x.pt2", "--images: give a whole number from 1"),
        (["TEST.CHECKPOINT_FILE_PATH"], "x.pt2", "has no value"),
    ],
)
def test_mistakes_are_explained(overrides, output, text, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("VIT: {DEPTH: 1, EMBED_DIM: 24, NUM_HEADS: 2}")
    assert tool.main(["--cfg", str(tmp_path / "c.yaml"), "-o", str(tmp_path / output), *overrides]) == 1
    with pytest.raises(AssertionError, match=text):
        raise AssertionError(capsys.readouterr().err)
    assert not (tmp_path / output).exists()


def test_a_network_that_gives_no_numbers_is_not_passed(tmp_path, capsys):
    cfg = trained(settings("ViT"), tmp_path / "weights.safetensors")
    weights = load_checkpoint(tmp_path / "weights.safetensors")
    weights["head.bias"][0] = torch.nan
    save_safetensors(tmp_path / "weights.safetensors", weights)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    assert tool.main(["--cfg", str(tmp_path / "config.yaml"), "-o", str(tmp_path / "a.pt2"), "--dense"]) == 1
    assert "The network gives NaN or infinite logits on random images" in capsys.readouterr().err


def test_missing_packages_are_named(monkeypatch):
    """ONNX without its packages says what to type; .pt2 does not need them."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(runner, "find_spec", lambda name: None if name == "onnxscript" else find_spec(name))
    with pytest.raises(
        UserError, match=r"ONNX needs onnxscript, which is not installed. Type:\n  pip install onnxscript"
    ):
        export.format_of("x.onnx")
    assert export.format_of("x.pt2") == "pt2"
    assert export.format_of("x", "pt2") == "pt2"


def test_the_difference_counts_what_is_far():
    """Not a number is far off; one image in four may be (ties of scores), more may not."""
    model = nn.Module()
    logits = torch.linspace(-2, 2, 40).reshape(20, 2)
    model.forward_tokens = lambda images: (logits[images], [])
    exported = export.Exported(None, model, {}, {})
    for broken, right in (([], True), ([3, 7, 8, 12, 19], True), (range(6), False)):
        wrong = logits.clone()
        wrong[list(broken), 1] = torch.nan
        difference = export.compare(exported, lambda images, wrong=wrong: [wrong[images]], torch.arange(20))
        assert (difference.num_far, difference.is_right) == (len(broken), right)
