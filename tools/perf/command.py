"""The command line that the tools in this folder share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from tabulate import tabulate

from ats.cli.parser import Parser, command_parser, in_range, split_overrides
from ats.config import load_config
from ats.errors import exit_status
from ats.options import COUNT


def make_parser(about: str, *, source: str = "") -> Parser:
    """--cfg, --rounds and --debug; `source` names an optional first argument, "" there is none."""
    parser = command_parser(about)
    if source:
        parser.add_argument(
            "source", nargs="?", type=os.path.expanduser, default="", metavar=source, help="default: generated files"
        )
    parser.add_argument("--cfg", metavar="FILE", help="config; KEY VALUE pairs override its keys")
    parser.option("--rounds", "timed rounds (default: 15)", type=in_range(int, COUNT), default=15, metavar="N")
    return parser


def run_tool(parser: Parser, measure: Callable[..., list[dict]], argv: Sequence[str] | None) -> int:
    """Print the rows of `measure(args, cfg)` as a table; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv

    def run() -> None:
        overrides, others = split_overrides(argv)
        args = parser.parse_args(others)
        rows = measure(args, load_config(args.cfg, overrides))
        print(tabulate(rows, headers="keys", floatfmt=".4g"))

    return exit_status(run, debug="--debug" in argv)
