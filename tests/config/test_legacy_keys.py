"""docs/LEGACY_KEYS.md is what the translation of older releases' keys does."""

from __future__ import annotations

import re

import pytest
import yaml
from legacy_keys import EXAMPLES, OFFICIAL, TARGET, becomes, render
from test_config import OFFICIAL as OFFICIAL_YAML

from ats.config.legacy import FIXED, IGNORED, RENAMED, translate
from ats.config.schema import KEY, flatten


def test_the_table_is_up_to_date():
    assert TARGET.read_text() == render(), "docs/LEGACY_KEYS.md is out of date, type: python tools/legacy_keys.py"


def test_every_key_stands_in_it_once():
    """In its own table; and what it becomes is a key of this project."""
    sections = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", TARGET.read_text(), re.DOTALL | re.MULTILINE))
    for heading, keys in (("Renamed, in any release", RENAMED), ("One value only", FIXED), ("Without effect", IGNORED)):
        assert re.findall(r"^\| `(.*?)` \|", sections[heading], re.MULTILINE) == list(keys)
    targets = {key for old in RENAMED for key in re.findall(r"`(.*?)`", becomes(old))}
    assert len(targets) > 40
    assert targets <= set(KEY)


def test_the_official_keys_are_those_of_the_official_yaml():
    assert sorted(OFFICIAL) == sorted(key for key, _ in flatten(yaml.safe_load(OFFICIAL_YAML)))


@pytest.mark.parametrize("key", EXAMPLES)
def test_example_values_are_needed(key):
    """A translation that takes any value is shown with any value; the keys it gives do not hang on the example."""
    assert translate(key, EXAMPLES[key])
