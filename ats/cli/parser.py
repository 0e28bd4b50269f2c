"""What the commands share: options, overrides of config keys, exit status.

An override is `KEY VALUE` or `KEY=VALUE`; both forms may be mixed. A mistake is a `UserError`: one line and status 1.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from ats import __version__
from ats.cli import as_typed
from ats.config import CfgNode
from ats.config.keys import keys
from ats.engine.output import process_prefix
from ats.errors import UserError, exit_status, flush_stdout, shown, suggest
from ats.options import Range


class Parser(argparse.ArgumentParser):
    """Raises a UserError where argparse would print the usage and exit."""

    def error(self, message: str) -> NoReturn:
        _, unrecognized, words = message.partition("unrecognized arguments: ")
        raise self.unknown_option(words.split()[0]) if unrecognized else UserError(message)

    def unknown_option(self, word: str) -> UserError:
        """The error for `word`, with the closest options."""
        options = [name for a in self._actions if a.help is not argparse.SUPPRESS for name in a.option_strings]
        file = f" For the file of this name type ./{shown(word)}." if os.path.exists(word) else ""
        return UserError(f"Unknown option {shown(word)}.{file or suggest(word, options)}")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        flush_stdout()  # of --help
        super().exit(status, message)

    def option(self, name: str, text: str, **options: Any) -> None:
        """`add_argument` with the help text first."""
        self.add_argument(name, help=text, **options)


def in_range(kind: type[int] | type[float], within: Range) -> Callable[[str], int | float]:
    """The argparse `type` for a number in a range."""

    def convert(text: str) -> int | float:
        value = kind(text)
        if not within.holds(value):
            whole = "whole " * (kind is int)
            raise argparse.ArgumentTypeError(f"give a {whole}number {within}, not {shown(text)}")
        return value

    convert.__name__ = kind.__name__  # for argparse: "invalid int value: 'x'"
    return convert


def to_path(text: str) -> Path:
    """The argparse `type` for a file or folder: a leading ~ is the home folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("give a file or folder: . is the current one")
    return Path(os.path.expanduser(text))


def check_folder(folder: Path, *, name: str) -> Path:
    """Make the output folder that an option or key names, before any work is done, and return it.

    Raises a UserError if it cannot be made or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        reason = error.strerror or error
        raise UserError(
            f"{name}: {folder} cannot be made or written to: {reason}. Give a folder you may write to."
        ) from None
    return folder


def check_file(path: Path, *, name: str) -> Path:
    """The same for the folder of an output file; returns the file."""
    if path.is_dir():
        raise UserError(f"{name}: {path} is a folder: give a file.")
    check_folder(path.parent, name=name)
    return path


def command_parser(about: str, **options: Any) -> Parser:
    """A parser with --version and --debug; `about` is the module's docstring, `options` are argparse's."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=as_typed(about), formatter_class=raw, allow_abbrev=False, **options)
    version = f"adaptive-token-sampling {__version__}"
    parser.add_argument("--version", action="version", version=version, help="show the version and stop")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def command(run: Callable[[list[str]], None], **options: str) -> Callable[[list[str] | None], int]:
    """The `main` of a command: calls `run` with the command line; returns `exit_status(..., **options)`."""

    def main(argv: list[str] | None = None) -> int:
        argv = sys.argv[1:] if argv is None else argv
        return exit_status(lambda: run(argv), debug="--debug" in argv, prefix=process_prefix(), **options)

    return main


def say_weights(cfg: CfgNode) -> None:
    """Print to stderr which weights a command uses."""
    from ats.config import find_shipped
    from ats.engine.evaluate import describe_weights

    weights = cfg.TEST.CHECKPOINT_FILE_PATH
    if not weights or find_shipped(weights).is_file():  # else an error says so
        print(f"Weights: {describe_weights(cfg, weights)}", file=sys.stderr)


def looks_like_key(word: str) -> bool:
    """Whether a word looks like a config key, perhaps misspelt, and not like a file or the value of an option."""
    key, known = word.partition("=")[0], keys()
    section, dot, _ = key.partition(".")
    is_section = bool(dot) and any(name.startswith(f"{section}.") for name in known)
    return key in known or is_section or bool(re.fullmatch(r"[A-Z_]+(\.[A-Z0-9_]+)+", key))


def split_overrides(
    words: Iterable[str], *, is_key: Callable[[str], bool] = looks_like_key
) -> tuple[list[str], list[str]]:
    """Split a command line into overrides [KEY, VALUE, KEY, VALUE, ...] and other words.

    `is_key` says whether a word starts an override. A key without a value is a UserError.
    """
    overrides, others, rest = [], [], iter(words)
    for word in rest:
        if not is_key(word):
            others.append(word)
            continue
        key, equals, text = word.partition("=")
        value = text if equals else next(rest, None)
        if value is None:
            raise UserError(f"{key} has no value: type {key} VALUE or {key}=VALUE.")
        overrides += [key, value]
    return overrides, others


def parse_overrides(words: Iterable[str], parser: Parser) -> list[str]:
    """Turn the words that `parser` does not know, which must all be overrides, into [KEY, VALUE, KEY, VALUE, ...].

    Raises:
        UserError: an unknown option (the closest options of `parser` are suggested), or a key without a value.
    """

    def is_key(word: str) -> bool:
        if word.startswith("-"):
            raise UserError(f"{parser.unknown_option(word)} Keys are given without dashes: KEY VALUE.")
        if word.endswith((".yaml", ".yml")):
            raise UserError(f"{word} is a config: type --cfg {word}.")
        return True

    return split_overrides(words, is_key=is_key)[0]
