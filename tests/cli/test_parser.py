"""Wrong options and arguments are one line and status 1 in every command; a closed pipe and Ctrl-C end one quietly."""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import ats
from ats.cli.benchmark import make_parser as make_benchmark_parser
from ats.cli.parser import Parser, command, in_range, to_path
from ats.cli.visualize import split_words
from ats.errors import UserError
from ats.options import COUNT, PROBABILITY

COMMANDS = {
    "ats.cli.run_net": ["--cfg"],
    "ats.cli.visualize": ["--report"],
    "ats.cli.benchmark": ["--rounds", "many"],
    "ats.cli.export": [],
    "ats.cli.calibrate": ["--gflops", "few"],
    "reproduce": [],
    "study": ["--slow"],
    "ats.cli.make_digits": ["--size", "large"],
    "ats.cli.make_moving_digits": ["--size", "large"],
    "ats.cli.prepare_imagenet": ["--outputs", "x"],
    "ats.cli.prepare_kinetics": ["--videos", "x", "--workers", "-1"],
    "loading": ["--needed", "nan"],
}
# The arguments that are numbers, what goes before them, and a number beyond the largest that makes sense.
NUMBERS = {
    ("ats.cli.benchmark", "--batch-size"): 65537,
    ("ats.cli.benchmark", "--image-size"): 16385,
    ("ats.cli.benchmark", "--threads"): 1025,
    ("ats.cli.benchmark", "--rounds"): 2**63,
    ("ats.cli.benchmark", "--accuracy"): 2**63,
    ("ats.cli.export", "--images"): 4097,
    ("ats.cli.calibrate", "--images"): 2**63,
    ("ats.cli.calibrate", "--refine"): 2**63,
    ("ats.cli.calibrate", "--tolerance"): 1,
    ("ats.cli.calibrate", "--keep"): 1.1,
    ("ats.cli.calibrate", "--gflops"): "1e400",
    ("ats.cli.calibrate", "--speedup"): "1e400",
    ("ats.cli.prepare_kinetics", "--workers"): 1025,
    ("ats.cli.prepare_kinetics", "--short-side"): 4097,
    ("ats.cli.make_digits", "--seed"): 2**32,
    ("ats.cli.make_digits", "--train-per-digit"): 10001,
    ("ats.cli.make_digits", "--size"): 4097,
    ("ats.cli.make_moving_digits", "--num-frames"): 10001,
    ("loading", "--needed"): "1e400",
    ("decoding", "--rounds"): 2**63,
}


def main_of(name: str, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], int]:
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "tools" / "perf")
    return importlib.import_module(name).main


@pytest.mark.parametrize("name", COMMANDS)
def test_wrong_options_get_one_line(name, capsys, monkeypatch):
    main = main_of(name, monkeypatch)
    assert main(COMMANDS[name]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    with pytest.raises(ValueError, match=error[len("error: ") : -1].split(":")[0]):
        main([*COMMANDS[name], "--debug"])


@pytest.mark.parametrize("name", [*COMMANDS, "ats.cli.prepare_cifar10", "compare", "demo"])
def test_every_command_says_its_version(name, capsys, monkeypatch):
    with pytest.raises(SystemExit) as end:
        main_of(name, monkeypatch)(["--version"])
    assert not end.value.code
    assert capsys.readouterr().out == f"adaptive-token-sampling {ats.__version__}\n"


@pytest.mark.parametrize(("name", "option"), NUMBERS)
def test_numbers_that_make_no_sense_get_one_line_with_their_option(name, option, capsys, monkeypatch):
    for value in ("inf", "nan", "-1", "x", "", "1" * 5000, NUMBERS[name, option]):
        assert main_of(name, monkeypatch)([f"{option}={value}"]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: argument {option}: ")
        assert error.count("\n") == 1


def test_a_number_says_its_range():
    parser = Parser()
    parser.option("--rounds", "", type=in_range(int, COUNT))
    parser.option("--share", "", type=in_range(float, PROBABILITY))
    assert vars(parser.parse_args(["--rounds", "3", "--share", "1e-1"])) == {"rounds": 3, "share": 0.1}
    for words, text in {
        ("--rounds", "0"): "argument --rounds: give a whole number from 1, not 0",
        ("--share", "nan"): "argument --share: give a number from 0 to 1, not nan",
        ("--share", "half"): "argument --share: invalid float value: 'half'",
        ("--shares", "1"): r"Unknown option --shares\. Did you mean --share\?",
    }.items():
        with pytest.raises(UserError, match=text):
            parser.parse_args([*words])


def test_a_path_begins_at_home_and_is_not_empty(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert to_path("~/x") == tmp_path / "x"
    assert split_words(["~/x.png", "A.B", "~", "y.png"]) == ([tmp_path / "x.png", Path("y.png")], ["A.B", "~"])
    with pytest.raises(UserError, match=r"An empty argument is not a file"):
        split_words([""])
    parser = Parser()
    parser.option("--output", "", type=to_path)
    with pytest.raises(UserError, match=r"argument --output: give a file or folder: \. is the current one"):
        parser.parse_args(["--output", ""])


def test_where_a_result_goes_is_checked_before_the_work(tmp_path, capsys, monkeypatch):
    """A file, a folder below a file, a link to nowhere and a folder in which nothing can be written."""
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    Path("link").symlink_to("nowhere")
    config = ["--cfg", "Digits/DeiT_ATS.yaml"]
    for folder in ("file", "file/below", "link", "/proc/x"):
        for name, words, setting in (
            ("ats.cli.benchmark", [f"OUTPUT_DIR={folder}"], "OUTPUT_DIR"),
            ("ats.cli.calibrate", ["--keep", "0.5", "--output", f"{folder}/x.yaml"], "--output"),
            ("ats.cli.export", ["--output", f"{folder}/x.onnx"], "--output"),
            ("ats.cli.visualize", ["--report", f"{folder}/x.html"], "--report"),
        ):
            assert main_of(name, monkeypatch)([*config, *words]) == 1
            error = capsys.readouterr().err.splitlines()[-1]
            assert error.startswith(f"error: {setting}: {folder} cannot be made or written to: ")
    (tmp_path / "x.pt2").mkdir()
    assert main_of("ats.cli.export", monkeypatch)([*config, "--output", "x.pt2"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == "error: --output: x.pt2 is a folder: give a file."


def with_stdout(target: int, run: Callable[[], object]) -> int:
    """The exit status of a process that runs a command and writes to `target`, and then exits."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            os.dup2(target, 1)
            sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - stdout of the process
            status = command(lambda argv: run())([])
            sys.stdout.flush()  # as the interpreter does while it exits
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("size", [10, 10**6])
def test_a_reader_that_has_gone_ends_a_command_quietly(size, capfd):
    """`ats-run --help all | head`: also if only the last lines were not read. A full disk is an error."""
    reader, writer = os.pipe()
    os.close(reader)
    assert with_stdout(writer, lambda: print("x" * size)) == 141
    assert capfd.readouterr().err == ""
    with open("/dev/full", "w") as full:
        assert with_stdout(full.fileno(), lambda: print("x" * size)) == 1
    assert capfd.readouterr().err == f"error: [Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}\n"


def test_help_into_a_closed_pipe(capfd):
    reader, writer = os.pipe()
    os.close(reader)
    assert with_stdout(writer, lambda: make_benchmark_parser().parse_args(["--help"])) == 141
    assert capfd.readouterr().err == ""
