"""A table or figure of the paper: the numbers that this code measures next to the paper's.

    python tools/reproduce.py imagenet --weights <dir> --imagenet <dir>
    python tools/reproduce.py kinetics600 --weights <dir> --kinetics600 <dir> --row "X-ViT (16 frames)"
    python tools/reproduce.py scaling DEVICE cuda TEST.BATCH_SIZE 256

Every row whose data and weights are there is evaluated; the others are listed with the files they need. Writes
output/reproduce/TABLE/{table.md, results.json, figure.png}. Each row is kept as soon as it is measured: the same
command resumes. Config keys may follow as KEY VALUE; they apply to every row.

  imagenet, kinetics400, kinetics600   the tables of results
  scaling                              DeiT-Ti, width 258, width 318, S, dense and with ATS
  stages, finetuning, sampling         the ablations of DeiT-S at 2.0, 2.5 and 3.0 GFLOPs; K is searched for
  histogram                            tokens kept per block, and images by cost, of DeiT-S + ATS
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # runs from a clone that is not installed

from ats.cli.parser import command_parser, parse_overrides, to_path  # noqa: E402
from ats.engine.output import setup_logging  # noqa: E402
from ats.errors import UserError, exit_status  # noqa: E402

DATASETS = ("imagenet", "kinetics400", "kinetics600")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    return exit_status(lambda: run(*parse_args(argv)), debug="--debug" in argv)


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the overrides as [KEY, VALUE, ...]."""
    parser = command_parser(__doc__)
    parser.add_argument("table", metavar="TABLE", help="one of those above")
    parser.add_argument("--weights", type=to_path, metavar="DIR", help="the checkpoints, named as the rows ask")
    for name in DATASETS:
        parser.add_argument(f"--{name}", type=to_path, metavar="DIR", help=f"DATA.PATH_TO_DATA_DIR of {name}")
    parser.add_argument("--row", action="append", default=[], metavar="NAME", help="only this row; may be repeated")
    parser.add_argument("--output", type=to_path, default=ROOT / "output" / "reproduce", help="default: %(default)s")
    args, words = parser.parse_known_args(argv)
    return args, parse_overrides(words, parser)


def run(args: argparse.Namespace, overrides: list[str]) -> None:
    """Measure the table and write it."""
    setup_logging()
    from ats.study.reproduce import check_folders, run_table, select_rows
    from ats.study.reproduced_table import render, write_table

    rows = select_rows(args.table, args.row)
    folders = {name: getattr(args, name) for name in ("weights", *DATASETS) if getattr(args, name) is not None}
    check_folders(rows, folders)
    outcomes = run_table(rows, folders, overrides, results_folder=args.output / "rows")
    print(render(args.table, outcomes))
    for path in write_table(args.table, outcomes, args.output / args.table):
        print(path)
    failed = [outcome.row.name for outcome in outcomes if outcome.error]
    if failed:
        raise UserError(f"Not measured, though data and weights are there (see above): {', '.join(failed)}.")


if __name__ == "__main__":
    sys.exit(main())
