"""Calibration: every network meets its budget, also on images held out; the command, and what mistakes get."""

from __future__ import annotations

import re
import shutil

import pytest
import test_cvt
import test_mvit
import test_psvit
import timm
import torch
import transformers_models
import yaml
from helpers import VIDEO_MODELS, clips, randomise, video_model
from torch.utils.data import DataLoader, TensorDataset

import ats
from ats.budget import nearest
from ats.budget.calibration import Network
from ats.checkpoint import load_weights
from ats.cli import calibrate as tool
from ats.cli import run_net
from ats.cli.make_digits import make_digits
from ats.config import find_shipped, get_cfg, load_config
from ats.datasets.build import build_sample_loader
from ats.errors import UserError
from ats.flops import gflops
from ats.models import build_model
from ats.models.block import ats_blocks

VIT = [
    "VIT.IMG_SIZE",
    32,
    "VIT.PATCH_SIZE",
    4,
    "VIT.EMBED_DIM",
    32,
    "VIT.DEPTH",
    4,
    "VIT.NUM_HEADS",
    4,
    "VIT.MLP_RATIO",
    2,
]


def small_vit(*overrides: object) -> torch.nn.Module:
    cfg = get_cfg()
    cfg.merge_from_list([*VIT, "ATS.ENABLE", True, "ATS.BLOCKS", [1, 3], *overrides])
    return randomise(build_model(cfg)).double().eval()


def images(count: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def small_timm() -> torch.nn.Module:
    torch.manual_seed(0)
    settings = {"img_size": 32, "patch_size": 4, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 5}
    return randomise(timm.create_model("deit3_small_patch16_224", **settings)).double().eval()


def k_of(model: torch.nn.Module) -> list[int | float]:
    """K of the ATS blocks, in the order of the blocks."""
    return [block.reduction.num_tokens for block in ats_blocks(model)]


# name -> (network, inputs, depth)
NETWORKS = {
    "ViT": lambda: (small_vit(), images(), 4),
    "timm": lambda: (ats.patch(small_timm(), blocks=[1, 3]), images(), 4),
    "CvT": lambda: (test_cvt.net("released", blocks=(1, 2, 4)), test_cvt.inputs("released", 16), 5),
    "PSViT": lambda: (test_psvit.net(blocks=(3, 4, 5)), test_psvit.inputs(16), 6),
    "MViT": lambda: (test_mvit.net("v1", blocks=(2, 3, 4)), test_mvit.inputs("v1", 8), 6),
    "MViT without CLS": lambda: (test_mvit.net("v2 no CLS", blocks=(2, 3)), test_mvit.inputs("v2 no CLS", 8), 6),
} | {kind: lambda kind=kind: (video_model(kind, "ATS.ENABLE", True), clips(6), 4) for kind in VIDEO_MODELS}


@pytest.mark.parametrize(("name", "accounting"), [*((name, "run") for name in NETWORKS), ("ViT", "paper")])
def test_every_network_meets_its_budget(name, accounting):
    """The mean that a forward pass and the formula give afterwards is the budget, to a step of one K; and the reach is
    that of the lowest and a very high K.
    """
    model, x, depth = NETWORKS[name]()
    reach = []
    for _ in range(2):  # first in the middle of what is in reach, of which the first call knows nothing yet
        target = sum(reach) / 2 if reach else None
        budget = {"gflops": target} if target else {"keep": 0.6}
        found = ats.calibrate(model, x, accounting=accounting, batch_size=5, progress=False, **budget)
        reach = [found.least, found.most]
    with torch.inference_mode():
        cost = gflops(model, model.forward_tokens(x)[1], x.shape)
    mean = (cost.as_run if accounting == "run" else cost.paper).mean().item()
    assert mean == pytest.approx(found.spread()["mean"], rel=1e-9)
    assert mean == pytest.approx(target, rel=0.02)
    assert found.least < mean < found.most
    assert found.depth == len(model.block_list()) == depth
    assert tuple(k_of(model)) == found.num_tokens
    assert len(found.per_block) == depth


def test_a_hugging_face_model_meets_its_budget():
    """After `ats.patch` it is calibrated as any other, and its handle says the K that were found."""
    model, x = transformers_models.small_model("dinov2 giant"), transformers_models.images(24, side=64)
    ats.patch(model, blocks=[1, 2])
    found = ats.calibrate(model, x, keep=0.6, progress=False)
    with torch.inference_mode():
        trace = model.forward_tokens(x)[1]
    kept = torch.stack([entry.num_tokens.double() for entry in trace]).mean().item() / 65
    assert kept == pytest.approx(0.6, abs=0.02)
    assert list(model.ats.num_tokens) == found.per_block
    assert len(found.per_block) == len(model.dinov2.encoder.layer if hasattr(model, "dinov2") else model.encoder.layer)


@pytest.mark.parametrize(
    ("keys", "lines"),
    [
        (["ATS.SAMPLER", "tome"], {"ATS": {"SAMPLER": "tome"}, "TOME": {"R": list}}),
        (["ATS.SAMPLER", "evit"], {"ATS": {"SAMPLER": "evit"}, "EVIT": {"KEEP_RATE": list}}),
        (["ATS.SAMPLER", "topk"], {"ATS": {"SAMPLER": "topk", "NUM_TOKENS": list}}),
        (["ATS.STAGES", [{"SAMPLER": "tome", "BLOCKS": [0, 1]}, {"BLOCKS": [2, 3]}]], {"ATS": {"STAGES": list}}),
    ],
    ids=["tome", "evit", "topk", "tome, then sampling"],
)
def test_every_reduction_meets_its_budget(keys, lines, tmp_path):
    """r, the keep rate, K, or those of two stages; and a config with the lines costs the same."""
    model, x = small_vit(*keys), images()
    found = ats.calibrate(model, x, speedup=1.35, progress=False)
    assert found.dense / found.spread()["mean"] == pytest.approx(1.35, rel=0.01)
    (tmp_path / "found.yaml").write_text(found.yaml())
    again = build_model(load_config(tmp_path / "found.yaml", VIT)).double().eval()
    again.load_state_dict(model.state_dict())
    with torch.inference_mode():
        pairs = zip(model.forward_tokens(x)[1], again.forward_tokens(x)[1], strict=True)
        assert all(torch.equal(a.position, b.position) for a, b in pairs)
    for section, own in lines.items():
        for key, want in own.items():
            value = yaml.safe_load(found.yaml())[section][key]
            assert value == want if isinstance(want, str) else isinstance(value, want)


def test_the_yaml_lines_hold_on_top_of_a_config_with_stages(tmp_path):
    """Stages differ in other options than the amount, and one restates a default that the config changes."""
    stages = [{"BLOCKS": [1], "RULE": "official", "NUM_TOKENS": 20}, {"BLOCKS": [3], "MIN_TOKENS": 3, "NUM_TOKENS": 9}]
    own = ["ATS.STAGES", stages, "ATS.RULE", "paper"]
    model, x = small_vit(*own), images()
    found = ats.calibrate(model, x, keep=0.6, progress=False)
    (tmp_path / "found.yaml").write_text(found.yaml(as_stages=True))
    cfg = load_config(tmp_path / "found.yaml", [*VIT, "ATS.RULE", "paper"])
    assert [stage["RULE"] for stage in cfg.ATS.STAGES] == ["official", "paper"]
    assert [stage["MIN_TOKENS"] for stage in cfg.ATS.STAGES] == [8, 3]
    again = build_model(cfg)
    assert [block.reduction for block in ats_blocks(again)] == [block.reduction for block in ats_blocks(model)]


def test_nearest_takes_one_amount_for_all_blocks_in_or_out_of_reach():
    model, x = small_vit("ATS.SAMPLER", "topk"), images()
    reached = nearest(model, x, 0.0015)
    assert len(set(k_of(model))) == 1
    cost = gflops(model, model.forward_tokens(x)[1], x.shape).as_run.mean().item()
    assert cost == pytest.approx(reached)
    assert nearest(model, x, 1e9) > reached > nearest(model, x, 0)


def test_keep_and_speedup_are_what_they_say():
    model, x = small_vit(), images()
    found = ats.calibrate(model, x, speedup=1.3, progress=False)
    assert found.dense / found.spread()["mean"] == pytest.approx(1.3, rel=0.01)
    found = ats.calibrate(model, x, keep=0.5, progress=False)
    with torch.inference_mode():
        trace = model.forward_tokens(x)[1]
    kept = torch.stack([entry.num_tokens / 65 for entry in trace]).mean().item()
    assert kept == pytest.approx(0.5, abs=0.01)
    assert kept == pytest.approx(found.found.keep.mean().item())


def test_the_yaml_lines_are_the_calibrated_network(tmp_path):
    """A config with these lines keeps the same tokens; so does a timm model re-tuned to `model.ats.num_tokens`."""
    model, x = small_vit(), images()
    found = ats.calibrate(model, x, speedup=1.3, progress=False)
    path = tmp_path / "found.yaml"
    path.write_text(found.yaml())
    again = build_model(load_config(path, VIT)).double().eval()
    again.load_state_dict(model.state_dict())
    with torch.inference_mode():
        pairs = zip(model.forward_tokens(x)[1], again.forward_tokens(x)[1], strict=True)
        assert all(torch.equal(a.position, b.position) for a, b in pairs)

    model = ats.patch(small_timm(), blocks=[1, 3])
    found = ats.calibrate(model, x, keep=0.5, progress=False)
    assert model.ats.num_tokens == found.per_block == [1.0, found.num_tokens[0], 1.0, found.num_tokens[1]]
    want = model(x)
    model.ats.num_tokens = found.per_block
    assert torch.equal(model(x), want)


def test_refining_never_changes_the_logits_more_at_the_same_cost():
    """By the network's own logits beside those of the dense network, which are also what is reported. That it moves
    tokens where that helps: tests/budget/test_budget.py.
    """
    x, changes, costs = images(24), [], []
    dense = small_vit("ATS.ENABLE", False)
    want = dense(x).softmax(-1)
    for rounds in (0, 1):
        model = small_vit("ATS.BLOCKS", [1, 2, 3])
        found = ats.calibrate(model, x, speedup=1.4, refine_rounds=rounds, progress=False)
        changes.append((model(x).softmax(-1) - want).abs().sum(-1).mean().item() / 2)
        costs.append(found.spread()["mean"])
    assert changes[1] <= changes[0]
    assert changes[1] == pytest.approx(found.found.changes.mean().item())
    assert costs[1] == pytest.approx(costs[0], rel=0.01)


def test_a_budget_out_of_reach_names_the_range_and_leaves_the_network_alone():
    """The range that is named is in reach, and what lies outside it is not."""
    model, x = small_vit("ATS.NUM_TOKENS", 0.7), images()
    for budget in ({"gflops": 1.0}, {"speedup": 9}, {"keep": 0.01}):
        name = next(iter(budget))
        with pytest.raises(UserError, match=f"{name} .* cannot be met with ATS in blocks 1, 3") as error:
            ats.calibrate(model, x, progress=False, **budget)
        assert k_of(model) == [0.7, 0.7]
        assert ("GFLOPs" in str(error.value)) == (name != "keep")
        low, high = map(float, re.search(r"reach ([\d.e-]+) to ([\d.e-]+)", str(error.value)).groups())
        inside = low + 0.02 * (high - low), high - 0.02 * (high - low)
        for value in inside:
            ats.calibrate(small_vit(), x, progress=False, **{name: value})
        with pytest.raises(UserError):
            ats.calibrate(small_vit(), x, progress=False, **{name: high * 1.05})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Give one budget, not 0: gflops, keep, speedup"),
        ({"gflops": 1.0, "keep": 0.5}, "Give one budget, not 2"),
        ({"keep": 0.0}, "keep 0: a budget is above 0"),
        ({"keep": float("nan")}, "a budget is above 0"),
        ({"keep": 50}, "keep 50: a share of the tokens is from 0 to 1"),
        ({"keep": 0.5, "accounting": "papers"}, "accounting papers: choose from run, paper"),
    ],
)
def test_mistakes_of_a_call(arguments, message):
    with pytest.raises(UserError, match=message):
        ats.calibrate(small_vit(), images(2), **arguments)


def test_a_network_without_ats_or_images():
    """Each says what to do about this network, and about this input."""
    with pytest.raises(UserError, match=r"no ATS block: build it with ATS\.ENABLE True"):
        ats.calibrate(small_vit("ATS.ENABLE", False), images(2), keep=0.5)
    with pytest.raises(UserError, match=r"no ATS block: call ats\.patch"):
        ats.calibrate(small_timm(), images(2), keep=0.5)
    for nothing in ([], images(0), [images(0)]):
        with pytest.raises(UserError, match=r"There are no images to calibrate with\. Give \[N, 3, H, W\]"):
            ats.calibrate(small_vit(), nothing, keep=0.5)
    with pytest.raises(UserError, match=r"shape \[3, 32, 32\] is not a batch.*torch\.stack"):
        ats.calibrate(small_vit(), list(images(2)), keep=0.5)
    with pytest.raises(UserError, match="a dict is not a batch"):
        ats.calibrate(small_vit(), [{"inputs": images(2)}], keep=0.5)


def test_dictionaries_of_a_processor():
    """As transformers' image processors and their loaders give them: one batch, or several."""
    x = images(12)
    ways = (x, {"pixel_values": x}, [{"pixel_values": own, "labels": 0} for own in x.split(5)])
    found = [ats.calibrate(small_vit(), way, keep=0.6, progress=False).num_tokens for way in ways]
    assert found[0] == found[1] == found[2]


def test_a_loader_of_images_and_labels():
    """As an ordinary DataLoader gives them; lists, tuples and named tuples."""
    x = images(8)
    loader = DataLoader(TensorDataset(x, torch.arange(8)), batch_size=3)
    expected = ats.calibrate(small_vit(), x, keep=0.6, progress=False)
    for batches in (loader, [tuple(batch) for batch in loader]):
        found = ats.calibrate(small_vit(), batches, keep=0.6, progress=False)
        assert found.num_tokens == expected.num_tokens


# ---- the Digits DeiT with the shipped weights


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Folder of the demo data with one canvas of each training digit; the val images are the demo's."""
    folder = tmp_path_factory.mktemp("calibration") / "digits"
    make_digits(folder, train_per_digit=1, num_workers=2)
    return folder


def digits_config(folder, *overrides: object):
    words = ["DATA.PATH_TO_DATA_DIR", str(folder), "DATA_LOADER.NUM_WORKERS", "0", *map(str, overrides)]
    return load_config("configs/Digits/DeiT_ATS.yaml", words)


@pytest.mark.parametrize(("split", "accounting"), [("train", "run"), ("val", "paper")])
def test_digits_meets_its_budget_on_images_held_out(digits, split, accounting):
    """Calibrated on training images, or on half of some validation images, the mean over the other validation images
    is within 2 % of the budget.
    """
    cfg = digits_config(digits)
    model = build_model(cfg)
    load_weights(model, cfg.TEST.CHECKPOINT_FILE_PATH)
    val = torch.cat([batch.x for batch in build_sample_loader(cfg, "val", num_samples=512)])
    seen, held_out = val[::2], val[1::2]
    if split == "train":
        seen = torch.cat([batch.x for batch in build_sample_loader(cfg, "train", num_samples=256)])
    found = ats.calibrate(model, seen, gflops=0.025, accounting=accounting, progress=False)
    held_out = Network(model, [held_out], accounting, progress=False, compare=False).run(found.setting)
    assert found.spread()["mean"] == pytest.approx(0.025, rel=0.002)
    assert held_out.gflops.mean().item() == pytest.approx(0.025, rel=0.02)


def test_samples_are_spread_over_the_split_and_seen_as_in_evaluation(digits):
    """All classes, the same images in every run, training images without their random crops."""
    cfg = digits_config(digits)
    first, again = ([*build_sample_loader(cfg, "train", num_samples=40)] for _ in range(2))
    assert all(torch.equal(a.x, b.x) for a, b in zip(first, again, strict=True))
    assert {int(label) for batch in first for label in batch.label} == set(range(10))
    index = torch.cat([batch.index for batch in first])
    assert (index.diff() > 0).all()
    assert len(index) == 40
    whole = [*build_sample_loader(digits_config(digits, "TEST.BATCH_SIZE", 500), "val", num_samples=10**6)]
    assert torch.equal(torch.cat([batch.index for batch in whole]), torch.arange(1795))
    with pytest.raises(UserError, match="at least 1"):
        build_sample_loader(cfg, "val", num_samples=0)


def test_command_writes_a_config_that_does_what_it_says(digits, tmp_path, capsys):
    """The whole command; the config it writes has the keys of the command line that it was found with."""
    output = tmp_path / "configs" / "mine.yaml"
    command = ["--cfg", "configs/Digits/DeiT_ATS.yaml", "--speedup", "1.6", "--images", "32", "--split", "val"]
    keys = [
        "DATA.PATH_TO_DATA_DIR",
        str(digits),
        "DATA_LOADER.NUM_WORKERS=0",
        "ATS.BLOCKS",
        "[6, 8, 10]",
        "ATS.RULE=paper",
    ]
    assert tool.main([*command, "--output", str(output), *keys]) == 0
    printed = capsys.readouterr().out
    assert "32 images of val" in printed
    assert re.search(r"dense +0.04543: 1\.[56]\d* times", printed)
    cfg, lines = load_config(output), yaml.safe_load(output.read_text())["ATS"]
    assert cfg.ATS.BLOCKS == [6, 8, 10]
    assert cfg.ATS.RULE == "paper"
    assert cfg.VIT.EMBED_DIM == 64  # of the _BASE_
    assert str(digits) == cfg.DATA.PATH_TO_DATA_DIR
    assert [type(k) for k in cfg.ATS.NUM_TOKENS] == [float] * 6 + [int, float] * 3
    assert f"NUM_TOKENS: {lines['NUM_TOKENS']}" in printed
    assert "tools/calibrate.py --cfg configs/Digits/DeiT_ATS.yaml --speedup 1.6" in output.read_text()


def test_a_config_that_was_found_runs_by_itself(digits, tmp_path, monkeypatch):
    """From any folder: with the weights, the data and the keys of the network that the command line sets."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").symlink_to(digits)
    shutil.copy(find_shipped("Digits/weights/deit_ats.safetensors"), "w.safetensors")
    keys = ["TEST.CHECKPOINT_FILE_PATH", "w.safetensors", "DATA.PATH_TO_DATA_DIR", "data", "VIT.QKV_BIAS=True"]
    keys += ["DATA.TEST_CROP_RATIO", "0.9", "DATA_LOADER.NUM_WORKERS", "0", "DEVICE", "cpu"]
    command = ["--cfg", "Digits/DeiT_ATS.yaml", "--keep", "0.4", "--images", "16", "--output", "found/mine.yaml"]
    assert tool.main([*command, *keys]) == 0
    lines = yaml.safe_load((tmp_path / "found" / "mine.yaml").read_text())
    assert lines["TEST"] == {"CHECKPOINT_FILE_PATH": str(tmp_path / "w.safetensors")}
    assert lines["DATA"] == {"PATH_TO_DATA_DIR": str(tmp_path / "data"), "TEST_CROP_RATIO": 0.9}
    assert lines["VIT"] == {"QKV_BIAS": True}
    assert not {"DATA_LOADER", "DEVICE"} & set(lines)  # how a run is carried out, not what it computes
    monkeypatch.chdir("/")
    assert run_net.main(["--cfg", str(tmp_path / "found" / "mine.yaml"), "OUTPUT_DIR", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "result.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--cfg FILE is missing"),
        (["--cfg", "F"], "Give --gflops G, --keep SHARE or --speedup X"),
        (["--cfg", "F", "--keep", "0.5", "--gflops", "1"], "not allowed with argument"),
        (["--cfg", "F", "--kep", "0.5"], "Unknown option --kep. Did you mean --keep"),
        (["--cfg", "F", "--keep", "half"], "invalid float value"),
        (["--cfg", "F", "--keep", "0.5", "--refine", "-1"], "--refine: give a whole number from 0, not -1"),
        (["--cfg", "F", "--keep", "0.5", "--images", "0"], "--images: give a whole number from 1, not 0"),
        (["--cfg", "F", "--keep", "0.5", "ATS.ENABLE", "False"], "ATS.ENABLE False. Add ATS.ENABLE True"),
        (["--cfg", "F", "--keep", "0.5", "TEST.CHECKPOINT_FILE_PATH", ""], "TEST.CHECKPOINT_FILE_PATH is empty"),
        (["--cfg", "F", "--gflops", "7", "--images", "4", "--split", "val"], "error: --gflops 7 cannot be met"),
    ],
)
def test_mistakes_on_the_command_line(digits, tmp_path, capsys, words, message):
    """Exit status 1 and one message."""
    words = [word.replace("F", "configs/Digits/DeiT_ATS.yaml") if word == "F" else word for word in words]
    if words:
        words += ["DATA.PATH_TO_DATA_DIR", str(digits), "DATA_LOADER.NUM_WORKERS", "0"]
    assert tool.main(words) == 1
    error = capsys.readouterr().err
    assert message in error[error.index("error: ") :]
    assert "Traceback" not in error


def test_command_writes_odd_names_into_the_config(tiny_config, tmp_path):
    """A name on the command line that is not UTF-8, or has a new line or a colon, does not break the file."""
    base, output = tmp_path / "a: b \udcff\n#.yaml", tmp_path / "out" / "mine.yaml"
    tiny_config.rename(base)
    argv = ["--cfg", str(base), "OUTPUT_DIR", "x\nMODEL: 3\n"]
    tool.write(output, "ATS: {NUM_TOKENS: 9}\n", cfg=str(base), argv=argv, report="a report")
    cfg = load_config(output)
    assert (cfg.VIT.EMBED_DIM, cfg.ATS.NUM_TOKENS) == (32, 9)
