"""docs/LEGACY_KEYS.md is what the translation of older releases' keys does."""

from __future__ import annotations

import re

import pytest
import yaml
from legacy_keys import EXAMPLES, OFFICIAL, TARGET, becomes, render
from test_config import OFFICIAL as OFFICIAL_YAML

from ats.config.keys import keys
from ats.config.legacy import FIXED, IGNORED, RENAMED, translate_key
from ats.config.schema import flatten
from ats.errors import UserError


def test_the_table_is_up_to_date():
    assert TARGET.read_text() == render(), "docs/LEGACY_KEYS.md is out of date, type: python tools/legacy_keys.py"


def test_every_key_is_in_it_once():
    """Each in its own table; and what it becomes is a key of this project."""
    sections = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TARGET.read_text(), re.DOTALL | re.MULTILINE))
    tables = {"Renamed, in any release": RENAMED, "One value only": FIXED, "Without effect": IGNORED}
    for heading, old_keys in tables.items():
        assert re.findall(r"^\| `(.*?)` \|", sections[heading], re.MULTILINE) == list(old_keys)
    targets = {key for old in RENAMED for key in re.findall(r"`(.*?)`", becomes(old))}
    assert len(targets) > 40
    assert targets <= set(keys())


def test_the_official_keys_are_those_of_the_official_yaml():
    assert sorted(OFFICIAL) == sorted(key for key, _ in flatten(yaml.safe_load(OFFICIAL_YAML)))


@pytest.mark.parametrize("key", EXAMPLES)
def test_example_values_are_needed(key):
    """A key that takes any value needs no example."""
    assert translate_key(key, EXAMPLES[key])


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("MODEL.LOSS_FUNC", "hinge", "MODEL.LOSS_FUNC hinge: choose from cross_entropy, smooth_cross_entropy, "),
        ("TEST.INTERPOLATION", [3], r"TEST.INTERPOLATION \[3\]: choose from 0, 2, 3"),
        ("TRAIN.IMAGE_SIZE", [224, 192], r"TRAIN.IMAGE_SIZE \[224, 192\]: only square images are supported"),
        ("model", "ps_vit_b_15", "model ps_vit_b_15: choose from ps_vit_ti_14, ps_vit_b_14"),
        ("MVIT.NORM", "batchnorm", "MVIT.NORM batchnorm: only layernorm is supported"),
    ],
)
def test_values_that_are_not_built_are_refused(key, value, text):
    with pytest.raises(UserError, match=text):
        translate_key(key, value)
