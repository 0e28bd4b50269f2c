"""`make gpu` with an interpreter that only writes down what it is asked to do."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def make_gpu(tmp_path: Path, *, fails: str) -> subprocess.CompletedProcess:
    """Its outcome where a call of Python fails whose words contain `fails`; calls are in <tmp_path>/calls."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncase "$*" in *"{fails}"*) exit 3;; esac\n')
    python.chmod(0o755)
    line = ["make", "-s", "gpu", f"PYTHON={python}", f"VENV={tmp_path}/none"]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("fails", "message"),
    [
        ("pytest", "the tests failed"),
        ("--suite gpu", "the suite failed"),
        ("p", None),
        ("nothing at all", ""),
    ],
)
def test_what_fails_is_named_and_the_rest_goes_on(tmp_path, fails, message):
    """Tests, then the suite, whatever became of the tests; the status says whether all went well; no installation."""
    done = make_gpu(tmp_path, fails=fails)
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "-c import torch"
    if message is None:  # not even torch
        assert (done.returncode, len(calls)) == (2, 1)
        assert "say which has: make gpu PYTHON=python3.12" in done.stderr
        return
    assert calls[1].startswith("-m pytest -m gpu")
    assert "tests/models/test_gpu.py" in calls[1]
    assert "tests/export/test_cuda_graph.py" in calls[1]
    assert calls[2:] == ["tools/benchmark.py --suite gpu"]
    assert done.returncode == (2 if message else 0)
    assert message in done.stderr
