"""The published YAMLs of the video releases (SlowFast's MViT, X-ViT, TimeSformer) load as they are.

fixtures/published has the keys and values of each file in its spelling (tuples, 1e-4, keys that stand twice). Of every
one: the network is the published one, no key vanishes without a word, and what the release leaves to its defaults or
to its code is set to what it means there.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ats.config import load_config, load_yaml
from ats.config.keys import keys
from ats.config.schema import flatten
from ats.errors import UserError
from ats.flops import dense_gflops
from ats.models import build_model

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parents[1] / "fixtures" / "published"
XVIT = 94.0985 - 400 * 769e-6  # without its second classifier, new_fc, which nothing reads

# Parameters in millions and GFLOPs per view (None: not published). Classes cost 769 parameters each.
PUBLISHED = {
    "Kinetics/xvit_B16_16x16_k400": (XVIT, 281.1),
    "Kinetics/xvit_B16_16x16_k600": (XVIT + 200 * 769e-6, 281.1),
    "SSv2/xvit_B16_16x16": (XVIT - 226 * 769e-6, 281.1),
    "Kinetics/TimeSformer_divST_8x32_224": (121.5664, 195.8),
    "Kinetics/TimeSformer_divST_16x16_448": (122.0241, 1702.7),
    "Kinetics/TimeSformer_divST_96x4_224": (121.6339, 2379.9),
    "Kinetics/TimeSformer_jointST_8x32_224": (86.1124, 179.6),
    "Kinetics/TimeSformer_spaceOnly_8x32_224": (86.1063, 140.5),
    "SSv2/TimeSformer_divST_8_224": (121.5664 - 226 * 769e-6, 195.8),
    "SSv2/TimeSformer_divST_64_224": (121.6339 - 226 * 769e-6 - 32 * 768e-6, None),
    "SSv2/TimeSformer_divST_16_448": (122.0241 - 226 * 769e-6, 1702.7),
    "Kinetics/MVIT_B_16x4_CONV": (36.610, 70.6),
    "Kinetics/MVIT_B_32x3_CONV": (53.12, 235.8),
    "Kinetics/MVITv2_S_16x4": (34.54, 64.2),
    "Kinetics/MVITv2_B_32x3": (51.23, 224.5),
    "Kinetics/MVITv2_L_40x3_test": (213.39, 2823),
    "ImageNet/MVIT_B_16_CONV": (36.98, 7.81),
    "ImageNet/MVITv2_T": (24.17, 4.68),
    "ImageNet/MVITv2_S": (34.87, 6.96),
    "ImageNet/MVITv2_B": (51.47, 10.1),  # with its indentation mended: as published it is no YAML
}
each = pytest.mark.parametrize("name", PUBLISHED)


def load(name: str):
    return load_config(FOLDER / f"{name}.yaml")


def test_all_files_are_listed():
    assert {path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.rglob("*.yaml")} == set(PUBLISHED)


@each
def test_the_network_is_the_published_one(name):
    cfg = load(name)
    with torch.device("meta"):
        model = build_model(cfg)
    size = cfg.DATA.TEST_CROP_SIZE
    frames = () if cfg.MVIT.PATCH_2D else (cfg.DATA.NUM_FRAMES,)
    params, cost = PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(params, abs=0.006)
    assert cost is None or dense_gflops(model, (1, 3, *frames, size, size)) == pytest.approx(cost, rel=0.004)


@each
def test_no_key_vanishes_without_a_word(name, caplog):
    """Every key is used under its own name, or a line of the log says what it becomes or why it has no effect."""
    caplog.set_level("INFO")
    load(name)
    said = [record.message for record in caplog.records]
    for key, _ in flatten(load_yaml(FOLDER / f"{name}.yaml")):
        assert key in keys() or any(line.startswith(f"{key} ") for line in said), key


# Our config of the same network, and the keys that differ though both mean the same (or, views of v1, the zoo's 5).
VIEWS, KV = {"TEST.NUM_ENSEMBLE_VIEWS"}, {"MVIT.POOL_KV_STRIDE", "MVIT.POOL_KV_STRIDE_ADAPTIVE"}
OURS = {
    "Kinetics/xvit_B16_16x16_k400": ("Kinetics/XViT_B16_16x16_K400", {"XVIT.LOCATIONS_LIST"}),  # 12 to 14: no blocks
    "Kinetics/xvit_B16_16x16_k600": ("Kinetics/XViT_B16_16x16_K600", {"XVIT.LOCATIONS_LIST"}),
    "Kinetics/TimeSformer_divST_8x32_224": ("Kinetics/TimeSformer_divST_8x32_224", set()),
    "Kinetics/TimeSformer_divST_16x16_448": ("Kinetics/TimeSformer_divST_16x16_448", set()),
    "Kinetics/TimeSformer_divST_96x4_224": ("Kinetics/TimeSformer_divST_96x4_224", set()),
    "Kinetics/MVIT_B_16x4_CONV": ("Kinetics/MViTv1_B_16x4", VIEWS),
    "Kinetics/MVIT_B_32x3_CONV": ("Kinetics/MViTv1_B_32x3", VIEWS),
    "Kinetics/MVITv2_S_16x4": ("Kinetics/MViTv2_S_16x4", set()),
    "ImageNet/MVIT_B_16_CONV": ("ImageNet/MViTv1_B", set()),
    "ImageNet/MVITv2_T": ("ImageNet/MViTv2_T", KV),
    "ImageNet/MVITv2_S": ("ImageNet/MViTv2_S", KV),
    "ImageNet/MVITv2_B": ("ImageNet/MViTv2_B", set()),
}
# Where and how long to run; batches, learning rates and epochs are counted differently (configs/Kinetics/_MViT.yaml).
RUN = ("TRAIN.", "SOLVER.", "DATA_LOADER.", "TEST.BATCH_SIZE", "TEST.ENABLE", "DATA.PATH_TO_DATA_DIR", "OUTPUT_DIR")
NOT_READ = {
    "ImageNet": ("TEST.NUM_", "TEST.ENSEMBLE_OF", "DATA.NUM_FRAMES"),
    "TimeSformer": ("AUG.RE_PROB", "AUG.COLOR_JITTER", "MODEL.DROPOUT_RATE", "ATS."),
    "xvit": ("ATS.",),
}
SAME = {"DATA.MEAN": [0.45] * 3, "DATA.STD": [0.225] * 3, "DATA.TRAIN_JITTER_SCALES_RELATIVE": [0.08, 1.0]}  # as empty


@pytest.mark.parametrize("name", OURS)
def test_network_data_and_testing_are_those_of_our_config(name):
    """Key by key, the release's defaults and its code's ways included: augmentation, views, what is averaged."""
    path, known = OURS[name]
    theirs, ours = load(name), load_config(ROOT / "configs" / f"{path}.yaml")
    skipped = RUN + next((keys for family, keys in NOT_READ.items() if family in name), ())
    pairs = zip(flatten(theirs), flatten(ours), strict=True)
    differing = {key for (key, a), (_, b) in pairs if a != b and not key.startswith(skipped)}
    node = {key: value for key, value in flatten(theirs) if key in differing}
    differing -= {key for key in SAME.keys() & differing if node[key] == [] and dict(flatten(ours))[key] == SAME[key]}
    assert differing == known
    with torch.device("meta"):
        networks = [build_model(cfg) for cfg in (theirs, ours)]
    assert str(networks[0]) == str(networks[1])  # every layer with its sizes, strides and rates


def test_the_file_that_does_not_parse_is_named(tmp_path):
    """SlowFast's ImageNet/MVITv2_B.yaml has one key at the wrong depth: the message has file and line."""
    text = (FOLDER / "ImageNet" / "MVITv2_B.yaml").read_text()
    (tmp_path / "MVITv2_B.yaml").write_text(text.replace("  DROPPATH_RATE", "DROPPATH_RATE"))
    with pytest.raises(UserError, match=r"MVITv2_B\.yaml is not a YAML file: (.|\n)*line \d+"):
        load_config(tmp_path / "MVITv2_B.yaml")
