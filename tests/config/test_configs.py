"""Every config of the repository makes a network that runs."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch

from ats.config import CfgNode, load_config
from ats.config.schema import flatten
from ats.datasets import input_shape
from ats.flops import dense_gflops
from ats.models import build_model

ROOT = Path(__file__).parents[2]
REAL = 5.0  # dense GFLOPs up to which a network is built for real; beyond, its dense form runs on meta tensors
SMALL_CLIP = (1, 3, 2, 32, 32)
# Keys that say how a network is trained or tested: configs that differ in nothing else run the same network.
PROCESS = ("TRAIN.", "SOLVER.", "TEST.", "MIXUP.", "AUG.", "EMA.", "DATA.", "DATA_LOADER.", "OUTPUT_DIR", "LOG_PERIOD")


def load(path: Path, *overrides: object) -> CfgNode:
    """The configuration, with a number of classes where that follows from data that are not there."""
    cfg = load_config(path, [*overrides])
    return load_config(path, [*overrides, "MODEL.NUM_CLASSES", 7]) if cfg.MODEL.NUM_CLASSES is None else cfg


def network(cfg: CfgNode) -> str:
    """What the network and its input are, as a string."""
    keys = {key: value for key, value in flatten(cfg) if not key.startswith(PROCESS)}
    return json.dumps([keys, input_shape(cfg)], sort_keys=True, default=str)


def group_by_network() -> dict[str, list[Path]]:
    groups: dict[str, list[Path]] = {}
    for path in sorted(ROOT.glob("configs/*/[!_]*.yaml")):
        groups.setdefault(network(load(path)), []).append(path)
    return groups


@cache
def size(path: Path) -> float:
    """Dense GFLOPs of one sample."""
    cfg = load(path)
    with torch.device("meta"):
        model = build_model(cfg)
    return dense_gflops(model, (1, *input_shape(cfg)))


GROUPS = list(group_by_network().values())


@pytest.mark.parametrize("paths", GROUPS, ids=[paths[0].stem for paths in GROUPS])
def test_forward(paths):
    """One sample through each network: logits of the right shape, and with ATS a trace of the blocks that sample.

    Large networks run without memory or arithmetic, on meta tensors; there ATS is off, as how many tokens stay depends
    on numbers; smaller networks of the family have the same ATS blocks. TimeSformer, which takes images of any size and
    looks at numbers also without ATS, gets a small clip instead.
    """
    cfg = load(paths[0])
    shape = SMALL_CLIP if cfg.MODEL.NAME == "TimeSformer" else (1, *input_shape(cfg))
    is_large = shape != SMALL_CLIP and size(paths[0]) > REAL
    with torch.device("meta" if is_large else "cpu"):
        model = build_model(load(paths[0], "ATS.ENABLE", False) if is_large else cfg)
    with torch.no_grad():
        logits, trace = model.eval().forward_tokens(torch.randn(shape, device="meta" if is_large else "cpu"))
    assert logits.shape == (1, cfg.MODEL.NUM_CLASSES)
    if is_large:
        assert trace == []
        return
    assert torch.isfinite(logits).all()
    assert [entry.block for entry in trace] == (sorted(cfg.ATS.BLOCKS or range(3, 12)) if cfg.ATS.ENABLE else [])
    counts = [entry.num_tokens.max().item() for entry in trace]
    assert counts == sorted(counts, reverse=True)


def test_every_family_with_ats_runs_for_real():
    """No family with ATS is on meta tensors alone: its smallest config is below the limit, or it runs on a small clip,
    or (XViT: the Digits one) it is small.
    """
    families = {}
    for paths in GROUPS:
        cfg = load(paths[0])
        if cfg.ATS.ENABLE:
            families[cfg.MODEL.NAME] = min(size(paths[0]), families.get(cfg.MODEL.NAME, float("inf")))
    assert {name for name, cost in families.items() if cost > REAL} <= {"TimeSformer"}
    assert {"ViT", "CvT", "PSViT", "MViT", "XViT"} <= set(families)


def test_off_the_shelf_configs_differ_from_the_dense_ones_in_ats_alone():
    """`X_ATS.yaml` is `X.yaml`, and `X_dense.yaml` the `X.yaml` that has ATS, but for keys of ATS: the same clips,
    crops and recipe.
    """
    folders = [ROOT / "configs" / name for name in ("ImageNet", "Kinetics")]
    pairs = [(p, p.with_name(p.name.replace("_ATS", ""))) for folder in folders for p in folder.glob("*_ATS.yaml")]
    pairs += [(p, p.with_name(p.name.replace("_dense", ""))) for folder in folders for p in folder.glob("*_dense.yaml")]
    assert len(pairs) >= 20
    for one, other in pairs:
        both = zip(flatten(load_config(one)), flatten(load_config(other)), strict=True)
        assert [key for (key, a), (_, b) in both if a != b and not key.startswith("ATS.")] == [], one.name


def test_fine_tuning_configs_train_the_network_that_is_evaluated():
    """`X_ATS_finetune.yaml` describes the network of its evaluation config, trains it, and is short."""
    tuned = list(ROOT.glob("configs/*/*_ATS_finetune.yaml"))
    assert len(tuned) >= 10
    for path in tuned:
        cfg = load_config(path)
        stem = path.stem.removesuffix("_ATS_finetune")
        shelf = next(p for p in (path.with_name(f"{stem}_ATS.yaml"), path.with_name(f"{stem}.yaml")) if p.exists())
        assert network(cfg) == network(load_config(shelf)), path
        assert cfg.TRAIN.ENABLE
        assert cfg.ATS.ENABLE
        assert cfg.SOLVER.MAX_EPOCH == 30
        dense = load_config(shelf, ["ATS.ENABLE", False])
        assert cfg.SOLVER.BASE_LR < dense.SOLVER.BASE_LR
