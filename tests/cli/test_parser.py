"""Wrong options are one line and status 1 in every command."""

from __future__ import annotations

import importlib

import pytest

COMMANDS = {
    "ats.cli.run_net": ["--cfg"],
    "ats.cli.visualize": ["--report"],
    "ats.cli.benchmark": ["--rounds", "many"],
    "ats.cli.export": [],
    "ats.cli.calibrate": ["--gflops", "few"],
    "reproduce": [],
    "study": ["--slow"],
    "make_digits": ["--size", "large"],
    "make_moving_digits": ["--size", "large"],
}


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_options_get_one_line(name, capsys):
    assert importlib.import_module(name).main(COMMANDS[name]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    with pytest.raises(ValueError, match=error[len("error: ") : -1].split(":")[0]):
        importlib.import_module(name).main([*COMMANDS[name], "--debug"])
