"""Fixtures for trainings in the test's own process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from ats.config import CfgNode, load_config


@pytest.fixture
def make_cfg(tiny_config: Path, tmp_path: Path) -> Callable[..., CfgNode]:
    """`make_cfg("KEY", "VALUE", ..., out="name")`: the tiny config with changes, its OUTPUT_DIR of that name."""

    def make(*overrides: str, out: str = "out") -> CfgNode:
        return load_config(tiny_config, ["OUTPUT_DIR", str(tmp_path / out), *overrides])

    return make
