"""docs/MODEL_ZOO.md is what the configs say and what their networks are."""

from __future__ import annotations

import re

import model_zoo as tool
import pytest

ROWS = {
    "DeiT_S": ("22.05 M", "4.599"),
    "MViTv1_B_16x4": ("36.61 M", "70.6 x 5"),
    "XViT_B16_16x16_K600": ("93.94 M", "281.1 x 3"),
}


def test_the_table_is_up_to_date():
    """Every dense network is built; parameters and GFLOPs, and every config's header, are those in the table."""
    old, new = tool.TARGET.read_text().splitlines(), tool.render().splitlines()
    stale = [line for line in new if line not in old] + [f"no longer: {line}" for line in old if line not in new]
    if stale or old != new:
        pytest.fail("docs/MODEL_ZOO.md is out of date, type: python tools/model_zoo.py\n" + "\n".join(stale))


def test_the_table_says_what_is_known():
    """Sizes known from elsewhere; and where a header speaks of parameters, they are the network's."""
    lines = [line.strip("| ").split(" | ") for line in tool.TARGET.read_text().splitlines() if line.startswith("| [")]
    table = {re.match(r"\[(.*?)\]", line[0])[1]: line[1:] for line in lines}
    for name, size in ROWS.items():
        assert tuple(table[name][1:3]) == size
    lists = re.findall(r"^\* (`.*?`): (.*)", tool.TARGET.read_text(), re.MULTILINE)
    said, listed = 0, []
    for names, expected in lists:
        listed += (own := re.findall(r"`(\w+)`", names))
        for number in re.findall(r"([\d.]+) M parameters", expected):
            for name in own:
                assert float(number) == pytest.approx(float(table[name][1].split()[0]), rel=0.015)
                said += 1
    assert sorted(listed) == sorted(table)
    assert said >= 10


def test_headers(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "# Net: a\n# network.\n#\n#   python x\n#\n# Expected: 1 %\n# (paper). Not measured here. More.\nA: 1\n# no\n"
    )
    assert tool.read_header(path) == ("Net: a network", "1 % (paper)", "no")
    path.write_text("# Net.\n#\n# Expected on B (C 1): 2 %.\n# Measured here: 1.9 % at\n# 3.\n")
    assert tool.read_header(path) == ("Net", "on B (C 1): 2 %", "1.9 % at 3")
    for path in tool.ROOT.glob("configs/*/[!_]*.yaml"):
        header = tool.read_header(path)
        assert header.title
        assert "|" not in header.title + header.expected
        assert header.expected or path.parent.name in ("Digits", "CIFAR10"), path
        assert (header.measured != "no") == (path.parent / "weights").is_dir(), path
