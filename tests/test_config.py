"""Configuration: coercion, suggestions, the YAMLs of older releases, and that no key is dead."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from ats.config import describe, get_cfg, load_config
from ats.config.defaults import KEYS
from ats.config.legacy import RENAMED
from ats.config.schema import KEY
from ats.errors import UserError

ROOT = Path(__file__).parents[1]


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
