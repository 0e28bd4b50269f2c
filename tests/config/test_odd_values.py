"""Odd values, keys and files: each gives a valid configuration or one line that says where and what; and soon."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ats.config import load_config
from ats.config.keys import keys
from ats.config.legacy import FIXED, IGNORED, RENAMED, translate_key
from ats.config.schema import flatten
from ats.config.yaml_text import MAX_BYTES
from ats.errors import UserError
from ats.options import is_64_bit

# Typed on a command line or, as numbers, lists and mappings, read from YAML.
VALUES = [
    *(None, True, False, 0, -1, 1, 3.5, 1e300, math.inf, -math.inf, math.nan, 10**19, 10**400, -(10**400)),
    *("", " ", "x", "1e400", "-inf", ".nan", ".inf", "1" * 400, "1" * 5000, "null", "~", "yes", "012", "1:30"),
    *("[", "[1", "[]", "[[1]]", "[1.5]", "{a: 1}", "{1, 2}", "b'x'", "1j", "...", "a\nb", "\x1b[31m", "\0", "١"),
    *("-" * 2000 + "1", "1+" * 600 + "1", "[" * 150 + "]" * 150, "[" * 2000, "[&a [1], *a]", "[!!int x]"),
    *([], [1], [None], [True], ["x"], [math.nan], [math.inf], [10**400], [1.5], [[1]], [[1, 2]], [[[1]]]),
    *([{}], [{"A": 1}], {}, {"A": 1}, {1: 2}, b"x", yaml.safe_load("[" * 100 + "]" * 100)),
]  # fmt: skip


def outcome(convert: Callable[..., object], *args: object) -> object:
    """What a conversion gives, or its UserError."""
    try:
        return convert(*args)
    except UserError as error:
        return error


def numbers_in(value: object) -> list[int | float]:
    if isinstance(value, (list, tuple)):
        return [number for item in value for number in numbers_in(item)]
    return [value] if isinstance(value, (int, float)) else []


@pytest.mark.parametrize("value", VALUES, ids=lambda value: ascii(value)[:20])
def test_every_key_takes_a_value_or_says_what_it_wants(value):
    """A value that is taken is of a type of the key; numbers are finite and fit in 64 bits."""
    for name, key in keys().items():
        taken = outcome(key.convert, value)
        if isinstance(taken, UserError):
            assert name in str(taken)
            assert str(taken).isprintable()
            assert len(str(taken)) < 1000
        else:
            assert type(taken) in key.types
            assert key.convert(taken) == taken
            if key.range:
                assert all(is_64_bit(n) if isinstance(n, int) else math.isfinite(n) for n in numbers_in(taken))


@pytest.mark.parametrize("value", VALUES, ids=lambda value: ascii(value)[:20])
def test_keys_of_older_releases_refuse_odd_values_too(value, caplog):
    for name in [*RENAMED, *FIXED, *(key.replace("*", "X") for key in IGNORED)]:
        pairs = outcome(translate_key, name, value)
        known = name in str(pairs) if isinstance(pairs, UserError) else {key for key, _ in pairs} <= {*keys()}
        assert known, name
    assert all(record.message.isprintable() for record in caplog.records)


def test_a_refused_value_of_an_old_key_is_named_as_it_was_typed():
    with pytest.raises(UserError, match=r"^VIT\.NUM_CLASSES: MODEL\.NUM_CLASSES 0: give a number from 1 or None\."):
        load_config(None, ["VIT.NUM_CLASSES", 0])


NESTED = "A0: &a0 [1, 1]\n" + "".join(f"A{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12))
BROKEN = {
    "a list": ("- 1", "holds list"),
    "a number": ("0", "holds int"),
    "nothing but false": ("false", "holds bool"),
    "binary": (b"\x80\x02}q\x01", "is not a YAML file: unacceptable character"),
    "zeros": (b"\0\0\0", "is not a YAML file: unacceptable character"),
    "not UTF-8": ("OUTPUT_DIR: caf\xe9".encode("latin1"), "is not a YAML file: unacceptable character"),
    "a tab": ("VIT:\n\tDEPTH: 3", "line 2: while scanning for the next token, found character '\\t' (a tab: indent"),
    "two documents": ("RNG_SEED: 1\n---\nRNG_SEED: 2", "but found another document"),
    "a section twice": ("VIT: {DEPTH: 3}\nVIT: {DEPTH: 4}", "key VIT appears twice"),
    "a key in two spellings": ("VIT: {DEPTH: 3}\nVIT.DEPTH: 4", "has two values for VIT.DEPTH"),
    "megabytes": ("#" * (MAX_BYTES + 1), "it has more than 128 kB. Are these weights or data?"),
    "many brackets": ("A: " + "[" * 2000, "nested too deeply"),
    "deep mappings": ("A: " + "{a: " * 2000, "nested too deeply"),
    "aliases for gigabytes": (NESTED, "its aliases repeat too much"),
    "a list that holds itself": ("ATS: {BLOCKS: &a [*a]}", "its aliases repeat too much"),
    "a mapping that holds itself": ("ATS: &a {B: *a}", "its aliases repeat too much"),
    "a merge": ("VIT: &a {DEPTH: 3}\nMVIT: {<<: *a}", "'<<' is special in YAML"),
    "a tag of Python": ("A: !!python/name:os.system", "configs have no tags like"),
    "a tag with a wrong value": ("VIT: {DEPTH: !!int x}", "configs have no tags like"),
    "a list as key": ("? [a]\n: 4", "a key must be a word"),
    "a date": ("VIT: {DEPTH: 2026-13-45}", "VIT.DEPTH must be int, not '2026-13-45': give a number from 1."),
    "octal": ("VIT: {DEPTH: 012}", "VIT.DEPTH must be int, not '012'"),
    "sexagesimal": ("VIT: {DEPTH: 1:30}", "VIT.DEPTH must be int, not '1:30'"),
    "400 digits": (f"VIT: {{DEPTH: {'1' * 400}}}", "give a number from 1, below 2^63."),
    "5000 digits": (f"VIT: {{DEPTH: {'1' * 5000}}}", "VIT.DEPTH must be int, not '1111"),
    "1e300 tokens": (
        "ATS: {NUM_TOKENS: 1.0e300}",
        "ATS.NUM_TOKENS 1e+300: give a number above 0 or numbers above 0, below",
    ),
    "infinity": ("VIT: {DEPTH: .inf}", "VIT.DEPTH must be int, not inf: give a number from 1."),
    "no number": ("SOLVER: {BASE_LR: .nan}", "SOLVER.BASE_LR nan: give a number from 0."),
    "a mapping for a value": ("VIT: {DEPTH: {A: 1}}", "VIT.DEPTH must be int, not {'A': 1}"),
    "floats for a grid": (
        "PSVIT: {NUM_POINTS: [3.5, 3]}",
        "PSVIT.NUM_POINTS must be list of int, not [3.5, 3]: give 2",
    ),
    "a value for a section": ("VIT: 3", "Unknown config key VIT. It is a section: give its keys, for example VIT.IMG"),
    "an empty section of nobody": ("VITT: {}", "Unknown config key VITT."),
    "yes for a text": ("OUTPUT_DIR: yes", "OUTPUT_DIR must be str, not True."),
    "a decimal for a text": ("OUTPUT_DIR: 1.10", "OUTPUT_DIR must be str, not 1.1."),
    "no text": ("OUTPUT_DIR:", "OUTPUT_DIR must be str, not None."),
    "base 3": ("_BASE_: 3", "_BASE_ 3: give a YAML file, or a list of them."),
    "base null": ("_BASE_:", "_BASE_ None: give"),
    "bases of numbers": ("_BASE_: [3]", "_BASE_ [3]: give"),
    "missing base": ("_BASE_: none.yaml", "_BASE_: No config file"),
    "base is a folder": ("_BASE_: ..", "_BASE_: No config file"),
    "base is a device": ("_BASE_: /dev/zero", "_BASE_: No config file /dev/zero."),
    "base is no path": ('_BASE_: "a\\0/b"', "_BASE_: No config file '"),
    "base of nobody's home": ("_BASE_: ~nobody-here/x.yaml", "_BASE_: No config file"),
    "long base": (f"_BASE_: {'a' * 5000}", "_BASE_: No config file '"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_is_no_config_gets_one_line_with_its_name(tmp_path, case):
    content, text = BROKEN[case]
    path = tmp_path / "mine.yaml"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    start = time.monotonic()
    with pytest.raises(UserError) as error:
        load_config(path)
    assert time.monotonic() - start < 20
    assert text in str(error.value)
    assert str(path) in str(error.value)
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    ("content", "key", "value"),
    [
        ("", "VIT.DEPTH", 12),
        ("# nothing", "VIT.DEPTH", 12),
        ("VIT:\n  # DEPTH: 3\n", "VIT.DEPTH", 12),
        ("VIT: {DEPTH: '3'}", "VIT.DEPTH", 3),
        ("VIT: {DEPTH: 0x10}", "VIT.DEPTH", 16),
        ("VIT: {DEPTH: &a 3}\nMVIT: {DEPTH: *a}", "MVIT.DEPTH", 3),
        ("VIT: {DEPTH: 3}\nVIT.DEPTH: 3", "VIT.DEPTH", 3),
        ("DATA: {STD: [1e-1, 0.2, 3]}", "DATA.STD", [0.1, 0.2, 3.0]),
        ("OUTPUT_DIR: 2026-11-01", "OUTPUT_DIR", "2026-11-01"),
        ("OUTPUT_DIR: 012", "OUTPUT_DIR", "012"),
        ("OUTPUT_DIR: 1e3", "OUTPUT_DIR", "1e3"),
        ("OUTPUT_DIR: 7", "OUTPUT_DIR", "7"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_what_a_file_means(tmp_path, content, key, value, encoding):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content.encode(encoding))
    assert dict(flatten(load_config(path)))[key] == value


def test_the_file_that_has_the_mistake_is_named(tmp_path):
    """Not the one that names it in _BASE_; and what a file sets comes after what its bases set, in any spelling."""
    base, top = tmp_path / "base.yaml", tmp_path / "top.yaml"
    base.write_text("VIT: {DEPHT: 3}")
    top.write_text("_BASE_: base.yaml\nVIT: {DEPTH: 3}")
    with pytest.raises(UserError) as error:
        load_config(top)
    assert str(error.value).startswith(f"{base}: Unknown config key VIT.DEPHT. Did you mean VIT.DEPTH")
    base.write_text("TRAIN: {LR: 0.1}\nVIT: {EMBED_DIM: 96}\nVIT.DEPTH: 3\nSOLVER: {BASE_LR: 0.2}")
    top.write_text("_BASE_: base.yaml\nVIT: {DEPTH: 4}\nTRAIN: {LR: 0.3}")
    cfg = load_config(top)
    assert (cfg.VIT.DEPTH, cfg.VIT.EMBED_DIM, cfg.SOLVER.BASE_LR) == (4, 96, 0.3)


def test_bases_that_multiply_are_read_once(tmp_path):
    for index in range(40):
        base = f"_BASE_: [{index + 1}.yaml, {index + 1}.yaml]\n" if index < 39 else ""
        (tmp_path / f"{index}.yaml").write_text(f"{base}VIT: {{DEPTH: {index + 1}}}")
    assert load_config(tmp_path / "0.yaml").VIT.DEPTH == 1


@pytest.mark.parametrize(
    "words", [["VIT.DEPTH"], ["VIT", "3"], ["", "3"], ["_BASE_", "x.yaml"], ["VIT.DEPTH.X", "3"], ["V" * 100_000, "3"]]
)
def test_odd_overrides_get_one_line(words):
    with pytest.raises(UserError) as error:
        load_config(None, words)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1000


def test_paths_begin_at_home(tmp_path, monkeypatch):
    """~ is expanded in every key that is a path, in the config file's own path, and in no other key."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine.yaml").write_text("_BASE_: ~/base.yaml\nOUTPUT_DIR: ~/out")
    (tmp_path / "base.yaml").write_text("VIT: {DEPTH: 3}")
    cfg = load_config("~/mine.yaml")
    assert cfg.VIT.DEPTH == 3
    assert Path(cfg.OUTPUT_DIR) == tmp_path / "out"
    paths = {name for name, key in keys().items() if key.default == "" or key.required}
    for key in keys().values():
        if str in key.types and not key.choices:
            assert key.convert("~/x") == (str(tmp_path / "x") if key.path else "~/x")
            assert key.convert("~nobody-here/x") == "~nobody-here/x"
    assert {name for name, key in keys().items() if key.path} == paths - {"AUG.AA_TYPE", "DATA.PATH_LABEL_SEPARATOR"}


def test_a_text_that_may_not_be_empty():
    """An empty OUTPUT_DIR would be the current folder. What the other empty texts mean is in their help."""
    for value in ("", " "):
        with pytest.raises(UserError, match=r"^OUTPUT_DIR is empty\. \(.*\. is the current folder"):
            load_config(None, ["OUTPUT_DIR", value])
    with pytest.raises(UserError, match=r"^DATA\.PATH_LABEL_SEPARATOR is empty"):
        load_config(None, ["DATA.PATH_LABEL_SEPARATOR", ""])
    cfg = load_config(None, ["OUTPUT_DIR", "."])
    assert cfg.OUTPUT_DIR == "."
