"""Configuration: coercion, suggestions, the YAMLs of older releases, and that no key is dead."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

from ats.config import describe, get_cfg, load_config, ranges
from ats.config.defaults import KEYS
from ats.config.legacy import RENAMED
from ats.config.ranges import LENGTHS, RANGES, is_in_range
from ats.config.schema import KEY
from ats.config.unread import NETWORK_SECTIONS, NETWORKS, SAMPLER_KEYS, SAMPLERS, unread_keys
from ats.errors import UserError
from ats.models import MODELS, build_model
from ats.reduction import sampling

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("SOLVER.BASE_LR", "1", 1.0),
        ("SOLVER.BASE_LR", "1e-3", 1e-3),
        ("SOLVER.BASE_LR", 2, 2.0),
        ("TRAIN.ENABLE", "true", True),
        ("TRAIN.ENABLE", "False", False),
        ("TRAIN.ENABLE", 1, True),
        ("ATS.BLOCKS", "[3, 4]", [3, 4]),
        ("ATS.BLOCKS", "5", [5]),
        ("ATS.BLOCKS", (1, 2), [1, 2]),
        ("ATS.NUM_TOKENS", "0.5", 0.5),
        ("ATS.NUM_TOKENS", "197", 197),
        ("ATS.NUM_TOKENS", "[1.0, 20]", [1.0, 20]),
        ("DATA.MEAN", "[0, 0, 1]", [0.0, 0.0, 1.0]),
        ("VIT.IMG_SIZE", "[224, 160]", [224, 160]),
        ("VIT.IMG_SIZE", 384, 384),
        ("SOLVER.CLIP_GRAD_L2NORM", "None", None),
        ("SOLVER.CLIP_GRAD_L2NORM", "null", None),
        ("SOLVER.CLIP_GRAD_L2NORM", "1", 1.0),
        ("OUTPUT_DIR", "5", "5"),
        ("OUTPUT_DIR", "/a b/[c]", "/a b/[c]"),
    ],
)
def test_values_take_the_type_of_their_key(key, text, value):
    cfg = get_cfg()
    cfg.merge_from_list([key, text])
    node = cfg
    for part in key.split("."):
        node = node[part]
    assert node == value
    assert type(node) is type(value)


@pytest.mark.parametrize(
    ("pair", "text"),
    [
        (["VIT.DEPHT", 3], "Unknown config key VIT.DEPHT. Did you mean VIT.DEPTH"),
        (["NUM_TOKENS", 3], "ATS.NUM_TOKENS"),
        (["vit.depth", 3], "VIT.DEPTH"),
        (["VIT.DEPTH", "twelve"], "VIT.DEPTH must be int, not 'twelve'"),
        (["VIT.DEPTH", 3.5], "VIT.DEPTH must be int"),
        (["VIT.DEPTH", "[3]"], "VIT.DEPTH must be int"),
        (["TRAIN.ENABLE", "maybe"], "TRAIN.ENABLE must be True or False, not 'maybe'"),
        (["ATS.BLOCKS", "[a]"], "ATS.BLOCKS must be list"),
        (["SOLVER.BASE_LR", None], "SOLVER.BASE_LR must be float"),
        (["ATS.RULE", "offical"], "choose from official, paper. Did you mean official?"),
        (["VIT.DEPTH"], "'VIT.DEPTH' has no value"),
        (["VIT", 3], "Unknown config key VIT."),
    ],
)
def test_mistakes_are_explained(pair, text):
    with pytest.raises(UserError) as error:
        get_cfg().merge_from_list(pair)
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("VIT.NUM_HEADS", 0, "VIT.NUM_HEADS 0: give a number from 1."),
        ("VIT.PATCH_SIZE", "0", "VIT.PATCH_SIZE 0: give a number from 1."),
        ("PSVIT.NUM_HEADS", 0, "PSVIT.NUM_HEADS 0"),
        ("CVT.NUM_HEADS", [0, 1, 1], "CVT.NUM_HEADS [0, 1, 1]: give numbers from 1."),
        ("MVIT.NUM_HEADS", 0, "MVIT.NUM_HEADS 0"),
        (
            "MVIT.POOL_Q_STRIDE",
            [[0, 1, 2, 0]],
            "MVIT.POOL_Q_STRIDE [[0, 1, 2, 0]]: give numbers from 1 behind each block",
        ),
        ("MVIT.DIM_MUL", "[[a, 2]]", "MVIT.DIM_MUL [[a, 2]]: give numbers above 0 behind each block"),
        ("ATS.BLOCKS", [[3, 4]], "ATS.BLOCKS [[3, 4]]: give numbers from 0."),
        ("MVIT.POOL_KVQ_KERNEL", "3", "MVIT.POOL_KVQ_KERNEL 3: give 3 numbers from 1 or None."),
        ("VIT.IMG_SIZE", [56], "VIT.IMG_SIZE [56]: give a number from 1 or 2 numbers from 1."),
        ("VIT.IMG_SIZE", [56, 56, 56], "VIT.IMG_SIZE [56, 56, 56]"),
        ("VIT.ATTN_DROP_RATE", 1.5, "VIT.ATTN_DROP_RATE 1.5: give a number from 0 to below 1."),
        ("VIT.DROP_PATH_RATE", 2, "VIT.DROP_PATH_RATE 2: give a number from 0 to below 1."),
        ("MODEL.DROPOUT_RATE", -3, "MODEL.DROPOUT_RATE -3"),
        ("MODEL.NUM_CLASSES", -1, "MODEL.NUM_CLASSES -1"),
        ("MODEL.NUM_CLASSES", 0, "MODEL.NUM_CLASSES 0"),
        ("MIXUP.PROB", 3, "MIXUP.PROB 3: give a number from 0 to 1."),
        ("EMA.DECAY", 2, "EMA.DECAY 2"),
        ("EVIT.KEEP_RATE", [0.5, 0], "EVIT.KEEP_RATE [0.5, 0]: give a number above 0 to 1 or numbers above 0 to 1."),
        ("ATS.MIN_TOKENS", -5, "ATS.MIN_TOKENS -5: give a number from 0."),
        ("SOLVER.MAX_EPOCH", 0, "SOLVER.MAX_EPOCH 0"),
        ("SOLVER.BASE_LR", -1, "SOLVER.BASE_LR -1"),
        ("SOLVER.BASE_LR", float("nan"), "SOLVER.BASE_LR nan"),
        ("SOLVER.CLIP_GRAD_L2NORM", 0, "SOLVER.CLIP_GRAD_L2NORM 0: give a number above 0 or None."),
        ("DATA.TEST_CROP_SIZE", 0, "DATA.TEST_CROP_SIZE 0"),
        ("DATA.MEAN", [0.5], "DATA.MEAN [0.5]: give no or 3 numbers."),
        ("ATS.NUM_TOKENS", ["many"], "ATS.NUM_TOKENS ['many']: give a number above 0 or numbers above 0."),
    ],
)
def test_numbers_out_of_range_are_refused(key, value, text):
    with pytest.raises(UserError) as error:
        get_cfg().merge_from_list([key, value])
    assert text in str(error.value)


def test_every_number_has_a_range():
    """That holds its default; the rest are booleans, names, and the free-form TIMM.KWARGS."""
    for key in KEYS:
        assert is_in_range(key.name, key.default), key.name
        values = key.default if isinstance(key.default, list) else [key.default]
        is_free = key.choices or key.name == "TIMM.KWARGS" or any(isinstance(value, (bool, str)) for value in values)
        assert (key.name in RANGES) == (not is_free), key.name
    names = [name for names in ranges._KEYS.values() for name in names.split()]
    assert len(names) == len(RANGES)
    assert set(LENGTHS) <= set(RANGES)


@pytest.mark.parametrize(
    ("overrides", "unread"),
    [
        (["MODEL.NAME", "ViT", "VIT.DEPTH", 3, "XVIT.SHIFT_DIV", 8], {}),
        (["MODEL.NAME", "timm/x", "VIT.DEPTH", 3], {"MODEL.NAME timm/x": ["VIT.DEPTH"]}),
        (
            ["MODEL.NAME", "ViT", "XVIT.SHIFT_DIV", 4, "CVT.INIT", "xavier"],
            {"MODEL.NAME ViT": ["XVIT.SHIFT_DIV", "CVT.INIT"]},
        ),
        (["MODEL.NAME", "XViT", "VIT.DEPTH", 3, "XVIT.SHIFT_DIV", 4, "ATS.ENABLE", 1, "ATS.SHARE_FRAMES", 1], {}),
        (["MODEL.NAME", "yours", "VIT.DEPTH", 3, "CVT.INIT", "xavier"], {}),
        (["ATS.ENABLE", 1, "ATS.SHARE_FRAMES", 1], {"MODEL.NAME ViT": ["ATS.SHARE_FRAMES"]}),
        (["ATS.ENABLE", 1, "ATS.SAMPLER", "topk", "ATS.RULE", "paper"], {"ATS.SAMPLER topk": ["ATS.RULE"]}),
        (["ATS.ENABLE", 1, "ATS.SAMPLER", "yours", "ATS.RULE", "paper"], {}),
        (["ATS.ENABLE", 0, "ATS.SAMPLER", "topk", "ATS.RULE", "paper"], {}),
        (
            ["ATS.ENABLE", 1, "ATS.SAMPLER", "tome", "ATS.SCORE", "mean_attention", "EVIT.KEEP_RATE", 0.5, "TOME.R", 3],
            {"ATS.SAMPLER tome": ["ATS.SCORE", "EVIT.KEEP_RATE"]},
        ),
    ],
)
def test_keys_that_are_set_for_something_else(overrides, unread):
    assert unread_keys(load_config(None, overrides)) == unread


def test_what_is_said_of_unread_keys_knows_every_network_and_sampler():
    assert set(MODELS) >= set(NETWORKS) - {"timm/<name>"}  # other tests register networks of their own
    assert {*sampling.SAMPLERS, *sampling.REDUCERS} >= set(SAMPLERS)
    assert {name for names in NETWORKS.values() for name in names} == set(NETWORK_SECTIONS)
    for prefix in (*NETWORK_SECTIONS, *SAMPLER_KEYS):
        assert any(key.startswith(prefix) for key in KEY), prefix


def test_unread_keys_are_one_line_a_run(caplog):
    cfg = load_config(None, ["VIT.DEPTH", 1, "MVIT.DEPTH", 3, "PSVIT.DEPTH", 3, "ATS.BLOCKS", [0]])
    with torch.device("meta"):
        [build_model(cfg) for _ in range(2)]
    said = [record.message for record in caplog.records]
    assert said == ["Keys without effect: MODEL.NAME ViT does not read MVIT.DEPTH, PSVIT.DEPTH."]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("[!_]*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_set_nothing_that_is_not_read(path):
    assert unread_keys(load_config(path)) == {}


def test_base_files_and_overrides(tmp_path):
    """_BASE_ is read first and relative to the file, then the file, then the command line."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text("VIT: {DEPTH: 3, EMBED_DIM: 48}\nRNG_SEED: 1")
    (tmp_path / "sub" / "a.yaml").write_text("_BASE_: ../base.yaml\nVIT: {DEPTH: 5}")
    cfg = load_config(tmp_path / "sub" / "a.yaml", ["RNG_SEED", "7"])
    assert (cfg.VIT.DEPTH, cfg.VIT.EMBED_DIM, cfg.RNG_SEED) == (5, 48, 7)
    with pytest.raises(AttributeError):
        cfg.RNG_SEED = 3


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("A: [1", "is not a YAML file"),
        ("- 1\n- 2", "holds list"),
        ("VIT: {DEPTH: 1, DEPTH: 2}", "key DEPTH stands twice"),
        ("_BASE_: a.yaml", "circle"),
        ("_BASE_: none.yaml", "No config file"),
        ("VIT: {DEPHT: 1}", "Did you mean VIT.DEPTH"),
        ("A: !!python/object/apply:os.getcwd []", "is not a YAML file"),
    ],
)
def test_broken_yaml_files(tmp_path, content, text):
    (tmp_path / "a.yaml").write_text(content)
    with pytest.raises(UserError) as error:
        load_config(tmp_path / "a.yaml")
    assert text in str(error.value)


OFFICIAL = """
TRAIN: {ENABLE: False}
TEST: {ENABLE: True, DATASET: ImageNet, BATCH_SIZE: 1024, CHECKPOINT_FILE_PATH: deit.pth, NUM_ENSEMBLE_VIEWS: 1,
    NUM_SPATIAL_CROPS: 1}
DATA: {PATH_TO_DATA_DIR: /data, TEST_CROP_SIZE: 224, TRAIN_CROP_SIZE: 224}
VIT:
  IMG_SIZE: 224
  PATCH_SIZE: 16
  IN_CHANNELS: 3
  NUM_CLASSES: 1000
  EMBED_DIM: 384
  DEPTH: 12
  NUM_HEADS: 6
  QK_SCALE: None
  REPRESENTATION_SIZE: None
  HYBRID_BACKBONE: None
  NORM_LAYER: None
  ATS_BLOCKS: [3, 4, 5, 6, 7, 8, 9, 10, 11]
  NUM_TOKENS: [197, 197, 197, 197, 197, 197, 197, 197, 197, 197, 197, 197]
  DROP_TOKENS: True
NUM_GPUS: 1
"""


def test_the_official_releases_keys(tmp_path, caplog):
    """Every key of the official YAML is used, mapped with a line of log, or named in a warning."""
    (tmp_path / "official.yaml").write_text(OFFICIAL)
    caplog.set_level("INFO")
    cfg = load_config(tmp_path / "official.yaml")
    ours = load_config(ROOT / "configs" / "ImageNet" / "DeiT_S.yaml")
    assert cfg.ATS.ENABLE
    assert cfg.ATS.BLOCKS == list(range(3, 12)) == ours.ATS.BLOCKS
    assert cfg.ATS.NUM_TOKENS == [197] * 12
    assert cfg.VIT.EMBED_DIM == ours.VIT.EMBED_DIM
    assert cfg.MODEL.NUM_CLASSES == 1000
    log = caplog.text
    assert "VIT.ATS_BLOCKS -> ATS.ENABLE True, ATS.BLOCKS [3, 4, 5, 6, 7, 8, 9, 10, 11]" in log
    assert "VIT.DROP_TOKENS has no effect" in log
    assert "NUM_GPUS has no effect: processes are started by torchrun" in log
    with pytest.raises(UserError, match="only None is supported"):
        load_config(None, ["VIT.QK_SCALE", "0.1"])


def test_help_describes_every_key():
    text = describe()
    for key in KEYS:
        assert len(key.help) > 10
        assert f"{key.name}  (" in text
    assert len(KEY) == len(KEYS)
    assert not set(RENAMED) & set(KEY)


def test_every_key_is_read_somewhere():
    """A key that nothing reads would be a promise not kept."""
    files = [
        path for folder in ("ats", "tools") for path in (ROOT / folder).rglob("*.py") if path.parent.name != "config"
    ]
    source = "\n".join(path.read_text() for path in files)
    read = set(re.findall(r"\.([A-Z][A-Z0-9_]*)\b", source))
    assert not [key.name for key in KEYS if not set(key.name.split(".")) <= read]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_yaml_loads_and_dumps_to_itself(path, tmp_path):
    cfg = load_config(path)
    (tmp_path / "dump.yaml").write_text(cfg.dump())
    assert load_config(tmp_path / "dump.yaml") == cfg
    assert isinstance(yaml.safe_load(cfg.dump()), dict)
