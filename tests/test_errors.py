"""ats.errors: how names from outside are shown."""

from __future__ import annotations

import io
import logging
import sys

import pytest

from ats.engine.output import ROOT, log_to_file, setup_logging
from ats.errors import UserError, environment_number, exit_status, printable, rounded

ODD = {
    "a\udcff.png": r"a\udcff.png",  # a byte that is not UTF-8
    "clear\x1b[2J\x9b1m.png": r"clear\x1b[2J\x9b1m.png",
    "two\n[11-27 12:00:00] lines\r.png": r"two\n[11-27 12:00:00] lines\r.png",
    "\u202egnp.exe": r"\u202egnp.exe",  # shown from right to left
    "line\u2028.png": r"line\u2028.png",
    "\x00\x07\x7f\t": r"\x00\x07\x7f\t",
}


def test_odd_names_are_escaped():
    for name, shown in ODD.items():
        assert printable(name) == shown
    for name in ("a b.png", "é ü 日本 \u3000.png", "a\\b", "👩\u200d🔬", "نیم\u200cفاصله"):
        assert printable(name) == name


def test_large_numbers_have_no_exponent():
    shown = [rounded(value) for value in (0.045431, 4.6084, 999.96, 1315.4, 13150.3, 99999.6, 0.0)]
    assert shown == ["0.04543", "4.608", "1000", "1315", "13150", "100000", "0"]
    assert [rounded(value, 3) for value in (1234.4, 4.608)] == ["1234", "4.61"]


@pytest.fixture
def fresh_log():
    """The package's logging as it was, after the test."""
    handlers, level = ROOT.handlers[:], ROOT.level
    yield
    for handler in ROOT.handlers:
        handler.close()
    ROOT.handlers[:] = handlers
    ROOT.setLevel(level)


def test_the_log_keeps_every_line(fresh_log, tmp_path, monkeypatch):
    """Whatever the names in it are and whatever the locale; a message of several lines stays one."""
    console = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors="backslashreplace")
    monkeypatch.setattr(sys, "stderr", console)
    monkeypatch.setattr(logging, "raiseExceptions", True)
    monkeypatch.setattr("locale.getpreferredencoding", lambda *_: "ascii")
    setup_logging()
    for name in ODD:
        ROOT.warning("before the file: %s", name)
    log_to_file(tmp_path / "log.txt")
    for name in ODD:
        ROOT.warning("%s cannot be read: é", name)
    ROOT.info("one\ntwo")
    console.flush()
    for text in ((tmp_path / "log.txt").read_text(encoding="utf-8"), console.buffer.getvalue().decode("ascii")):
        assert "Logging error" not in text
        assert r"a\udcff.png cannot be read" in text
        assert r"before the file: clear\x1b[2J\x9b1m.png" in text
        assert "one\ntwo\n" in text
        assert text.isascii() or "é" in text
        assert not any(character in text for character in "\x1b\x9b\r\x07\x00\u202e\udcff")


def test_errors_on_the_terminal(monkeypatch, capsys):
    """An error shows its name escaped and keeps its lines; output that the terminal cannot show is escaped."""

    def fail():
        print("日本\udcff")
        raise UserError("Cannot read \x1b[2J\udcff.png.\n  second line")

    output = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", output)
    assert exit_status(fail) == 1
    output.flush()
    assert output.buffer.getvalue() == rb"\u65e5\u672c\udcff" + b"\n"
    assert capsys.readouterr().err == "error: Cannot read \\x1b[2J\\udcff.png.\n  second line\n"


def test_numbers_in_the_environment(monkeypatch):
    for text, number in (("", 1), (" 4\n", 4), ("0", 0)):
        monkeypatch.setenv("WORLD_SIZE", text)
        assert environment_number("WORLD_SIZE", 1) == number
    monkeypatch.delenv("WORLD_SIZE")
    assert environment_number("WORLD_SIZE", 1) == 1
    for text in ("two", "-1", "1.5"):
        monkeypatch.setenv("WORLD_SIZE", text)
        with pytest.raises(UserError, match=f"variable WORLD_SIZE is {text}, not a number. Type unset WORLD_SIZE"):
            environment_number("WORLD_SIZE", 1)


def test_closed_streams(monkeypatch):
    """`2>&-` or `>&-`: Python has None in place of the stream."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert exit_status(lambda: [print("text", file=stream) for stream in (sys.stdout, sys.stderr)]) == 0
    assert exit_status(lambda: sys.stderr.isatty()) == 0
