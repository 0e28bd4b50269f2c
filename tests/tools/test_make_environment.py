"""Which virtual environment `make` uses, with programs in it that only write down what they are asked to do."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECKS = ["ruff check .", "ruff format --check .", "mypy "]


def make_lint(folder: Path, *words: str, fails: str = "nothing at all") -> tuple[str, list[str]]:
    """What `make lint` says, and the calls of programs in the environment `folder`, which is active; one fails whose
    words contain `fails`.
    """
    (folder / "bin").mkdir(parents=True)
    for name in ("python", "ruff", "mypy"):
        program = folder / "bin" / name
        program.write_text(f'#!/bin/sh\necho "{name} $@" >> {folder}/calls\ncase "$*" in *"{fails}"*) exit 3;; esac\n')
        program.chmod(0o755)
    env = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}  # of `make test`
    env["VIRTUAL_ENV"] = str(folder)
    done = subprocess.run(["make", "-s", "lint", *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    calls = (folder / "calls").read_text().splitlines() if (folder / "calls").exists() else []
    return done.stderr, calls


@pytest.mark.parametrize("is_complete", [True, False])
def test_an_active_environment_is_used_and_completed(tmp_path, is_complete):
    said, calls = make_lint(tmp_path / "env", fails="nothing at all" if is_complete else "importlib.metadata")
    assert f"Using {tmp_path}/env, the environment that is active\n" in said
    assert "warning" not in said  # of make, about its own file
    assert calls[0].startswith("python -c from importlib.metadata import version")
    assert calls[-3:] == CHECKS
    installs = [call for call in calls if call.startswith("python -m pip install")]
    assert len(installs) == (not is_complete)
    assert ("it lacks some of these packages" in said) == (not is_complete)
    assert not list((tmp_path / "env").glob(".installed"))


def test_the_one_given_comes_before_the_active_one(tmp_path):
    given = tmp_path / "given"
    make_lint(given)  # makes its programs
    (given / "calls").unlink()
    (given / ".installed").touch()
    said, calls = make_lint(tmp_path / "env", f"VENV={given}")
    assert said == f"Using {given}\n"
    assert not calls
    assert (given / "calls").read_text().splitlines() == CHECKS
