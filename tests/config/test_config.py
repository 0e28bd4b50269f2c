"""Configuration: coercion, suggestions, the YAMLs of older releases, and that no key is dead."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import yaml

from ats.config import get_cfg, load_config
from ats.config.key import Key
from ats.config.keys import SECTIONS, describe, keys, list_sections, reduction_keys, sections
from ats.config.legacy import RENAMED
from ats.config.schema import changed, flatten, nest, unread_keys
from ats.errors import UserError
from ats.models import MODELS, build_model
from ats.options import COUNT
from ats.reduction import REDUCTIONS

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
        ("ATS.BLOCKS", [3.0], [3]),
        ("ATS.BLOCKS", "null", None),
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
        (["VIT.DEPTH", float("nan")], "VIT.DEPTH must be int, not nan"),
        (["TRAIN.ENABLE", "maybe"], "TRAIN.ENABLE must be True or False, not 'maybe'"),
        (["ATS.BLOCKS", "[a]"], "ATS.BLOCKS must be list of int or None, not '[a]'"),
        (["ATS.BLOCKS", [3.5]], "ATS.BLOCKS must be list of int or None"),
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
            "MVIT.POOL_Q_STRIDE [[0, 1, 2, 0]]: give numbers from 1 after each block",
        ),
        ("MVIT.DIM_MUL", "[[a, 2]]", "MVIT.DIM_MUL [[a, 2]]: give numbers above 0 after each block"),
        ("ATS.BLOCKS", [[3, 4]], "ATS.BLOCKS [[3, 4]]: give numbers from 0 or None."),
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
        (
            "DATA.MEAN",
            [123.675, 116.28, 103.53],
            "DATA.MEAN [123.675, 116.28, 103.53]: give no or 3 numbers from 0 to 1.",
        ),
        ("DATA.MEAN", [0.5], "DATA.MEAN [0.5]: give no or 3 numbers from 0 to 1."),
        ("ATS.NUM_TOKENS", ["many"], "ATS.NUM_TOKENS ['many']: give a number above 0 or numbers above 0."),
    ],
)
def test_numbers_out_of_range_are_refused(key, value, text):
    with pytest.raises(UserError) as error:
        get_cfg().merge_from_list([key, value])
    assert text in str(error.value)


@pytest.mark.parametrize(
    ("default", "facts", "text"),
    [
        (3, {}, "numbers, and only numbers, have a range"),
        ([], {}, "numbers, and only numbers, have a range"),
        (None, {"types": (float, type(None))}, "numbers, and only numbers, have a range"),
        ("a", {"range": COUNT}, "numbers, and only numbers, have a range"),
        ("a", {"choices": ("b", "c")}, "choose from b, c"),
        (0, {"range": COUNT}, "give a number from 1"),
        ([1, 2], {"range": COUNT, "lengths": (3,)}, "give 3 numbers from 1"),
    ],
)
def test_an_entry_that_contradicts_itself_cannot_be_written(default, facts, text):
    with pytest.raises((AssertionError, UserError), match=text):
        Key("ATS.MINE", default, "What it means.", **facts)


def test_a_list_may_hold_mappings():
    """Typed on a command line, read from YAML, dumped and read again."""
    key = Key("ATS.MINE", [], "A list of mappings.", items=(dict,))
    assert key.convert("[{A: tome, B: [0, 1]}]") == key.convert([{"A": "tome", "B": [0, 1]}])
    assert key.convert([]) == []
    assert yaml.safe_load(nest([("ATS.MINE", [{"A": 1}])]).dump()) == {"ATS": {"MINE": [{"A": 1}]}}
    with pytest.raises(UserError, match=r"ATS\.MINE must be list"):
        key.convert("[3]")


def test_names_are_those_of_their_section():
    names = [key.name for section in sections() for key in section.keys]
    assert len(names) == len(set(names)) == len(keys()) > 190
    assert all(key.section == section.name for section in sections() for key in section.keys)
    assert len({section.name for section in sections()}) == len(list(sections()))


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
        (["ATS.ENABLE", 1, "ATS.SAMPLER", "yours", "TOME.R", 3], {"ATS.SAMPLER yours": ["TOME.R"]}),
        (["ATS.ENABLE", 0, "ATS.SAMPLER", "topk", "ATS.RULE", "paper", "TOME.R", 3, "ATS.SHARE_FRAMES", 1], {}),
        (
            ["ATS.ENABLE", 1, "ATS.SAMPLER", "tome", "ATS.SCORE", "mean_attention", "EVIT.KEEP_RATE", 0.5, "TOME.R", 3],
            {"ATS.SAMPLER tome": ["ATS.SCORE", "EVIT.KEEP_RATE"]},
        ),
    ],
)
def test_keys_that_are_set_for_something_else(overrides, unread, monkeypatch):
    monkeypatch.setitem(REDUCTIONS, "yours", REDUCTIONS["inverse_transform"])  # registered later, with its options
    assert unread_keys(load_config(None, overrides)) == unread


def test_keys_name_networks_and_samplers_that_exist():
    networks = {name for section in SECTIONS for name in section.networks}
    assert networks == set(MODELS) & networks
    assert len(networks) == 7  # other tests register networks of their own
    assert {name for key in keys().values() for name in key.networks} <= networks
    with torch.device("meta"):
        build_model(load_config(None, ["VIT.DEPTH", 1, "ATS.BLOCKS", [0]]))  # registers every reduction
    samplers = {name for key in keys().values() for name in key.samplers}
    assert set(REDUCTIONS) >= samplers >= {"inverse_transform", "topk", "random"}


def test_keys_of_a_reduction_that_registers_later(monkeypatch):
    """They have defaults, checks, help, a section of their own; and other samplers do not read them."""
    mine = [
        Key("MINE.RADIUS", 2, "How far tokens look.", COUNT, samplers=("mine",)),
        Key("ATS.POWER", 1.0, "Exponent of the score.", COUNT, samplers=("mine",)),
    ]
    before = get_cfg()
    monkeypatch.setitem(REDUCTIONS, "mine", REDUCTIONS["topk"])
    monkeypatch.setattr("ats.config.keys.reduction_keys", lambda: [*reduction_keys(), *mine])
    cfg = load_config(None, ["ATS.ENABLE", True, "ATS.SAMPLER", "mine", "MINE.RADIUS", "3", "ATS.POWER", 2])
    assert (cfg.MINE.RADIUS, cfg.ATS.POWER) == (3, 2.0)
    assert unread_keys(cfg) == {}
    assert unread_keys(load_config(None, ["ATS.ENABLE", True, "MINE.RADIUS", 3])) == {
        "ATS.SAMPLER inverse_transform": ["MINE.RADIUS"]
    }
    with pytest.raises(UserError, match=r"MINE\.RADIUS 0: give a number from 1"):
        load_config(None, ["MINE.RADIUS", 0])
    assert "MINE                  Options of ATS.SAMPLER mine.\n" in list_sections()
    assert "MINE.RADIUS  (int from 1, default 2)" in describe(["MINE"])
    assert "ATS.POWER" in describe(["ATS"])
    before.merge_from_list(["MINE.RADIUS", 4])  # of a configuration that is older than the key
    assert before.MINE.RADIUS == 4


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
        ("VIT: {DEPTH: 1, DEPTH: 2}", "key DEPTH appears twice"),
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
    text = describe(["all"])
    assert all(f"{name}  (" in text for name in keys())
    assert not set(RENAMED) & set(keys())
    assert describe(["SOLVER", "ats", "Device"]).count("\n---- ") == 1  # sections in any case; a single key
    assert set(re.findall(r"^([A-Z0-9_.]+)  \(", describe(["solver"]), re.MULTILINE)) == {
        name for name in keys() if name.startswith("SOLVER.")
    }


def test_help_of_an_unknown_section_names_the_nearest_and_all():
    with pytest.raises(UserError) as error:
        describe(["SOLVR"])
    assert "--help SOLVR: there is no such section or key. Did you mean SOLVER" in str(error.value)
    for section in sections():
        assert section.name in str(error.value)


def test_what_differs_from_the_defaults():
    cfg = load_config(None, ["VIT.DEPTH", 3, "ATS.NUM_TOKENS", [1.0, 9], "RNG_SEED", 0, "OUTPUT_DIR", "there"])
    values = {"VIT.DEPTH": 3, "ATS.NUM_TOKENS": [1.0, 9], "OUTPUT_DIR": "there"}
    assert changed(cfg) == values
    assert dict(flatten(nest(values.items()))) == values


def test_every_key_is_read_somewhere():
    """A key that nothing reads would be a promise not kept. Reductions' options are read by a loop over them, a
    section of a network by its arguments, which have the keys' names in small letters.
    """
    files = [
        path for folder in ("ats", "tools") for path in (ROOT / folder).rglob("*.py") if path.parent.name != "config"
    ]
    source = "\n".join(path.read_text() for path in files)
    read = set(re.findall(r"\.([A-Z][A-Z0-9_]*)\b", source))
    models = "\n".join(path.read_text() for path in (ROOT / "ats" / "models").rglob("*.py"))
    read |= {name.upper() for name in re.findall(r"\b[a-z][a-z0-9_]*\b", models)}
    assert not [name for name, key in keys().items() if not key.samplers and not set(name.split(".")) <= read]


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_yaml_loads_and_dumps_to_itself(path, tmp_path):
    cfg = load_config(path)
    (tmp_path / "dump.yaml").write_text(cfg.dump())
    assert load_config(tmp_path / "dump.yaml") == cfg
    assert isinstance(yaml.safe_load(cfg.dump()), dict)
