"""KEY VALUE and KEY=VALUE on a command line, among options and files."""

from __future__ import annotations

import pytest

from ats.cli.parser import Parser, looks_like_key, parse_overrides, split_overrides
from ats.errors import UserError


def test_keys_differ_from_files_and_values():
    for word in ("DEVICE", "ATS.ENABLE", "ATS.ENABLE=True", "ATS.enabel", "AST.ENABLE", "DATA_LOADR.NUM_WORKERS"):
        assert looks_like_key(word)
    for word in ("a.jpg", "IMG_0001.JPG", "data/ATS.ENABLE", "--cfg", "ATS", "8", "bfloat16"):
        assert not looks_like_key(word)


def test_overrides_among_other_words():
    words = ["--batch-size", "1", "8", "ATS.ENABLE", "True", "image.png", "OUTPUT_DIR=x=y"]
    assert split_overrides(words) == (
        ["ATS.ENABLE", "True", "OUTPUT_DIR", "x=y"],
        ["--batch-size", "1", "8", "image.png"],
    )
    with pytest.raises(UserError, match=r"ATS\.BLOCKS has no value: type ATS\.BLOCKS VALUE or ATS\.BLOCKS=VALUE\."):
        split_overrides(["a", "ATS.BLOCKS"])


def test_what_a_parser_does_not_know():
    """Values may begin with a dash or hold equals signs; the closest visible option is named for an unknown one."""
    parser = Parser()
    parser.add_argument("--accuracy")
    assert parse_overrides(["A", "-1", "B=x=y", "D", "-x"], parser) == ["A", "-1", "B", "x=y", "D", "-x"]
    with pytest.raises(UserError, match=r"Unknown option --acuracy\. Did you mean --accuracy\? Keys are given without"):
        parse_overrides(["--acuracy", "F", "A"], parser)
