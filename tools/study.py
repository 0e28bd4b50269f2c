"""The paper's studies on the Digits data: sampling, stages, fine-tuning, scores, rule, K; three seeds.

    make study          # or: python tools/study.py [--quick] [--output DIR]

Makes the canvases if they are not there, measures every row, and writes docs/STUDY.md, docs/study.json and
docs/images/study.png (with --output: below DIR). Each row is kept in output/study as soon as it is measured: the same
command resumes. --quick only shows that everything runs. Its numbers mean nothing, so it needs --output.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # runs from a clone that is not installed

from ats.cli.make_digits import make_digits  # noqa: E402
from ats.cli.parser import command_parser, to_path  # noqa: E402
from ats.errors import UserError, exit_status  # noqa: E402
from ats.files import write  # noqa: E402

DATA = ROOT / "data" / "digits_study"
RESULTS = ROOT / "output" / "study"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv

    def measure() -> None:
        args = parse_args(argv)
        run(data=args.data, results=args.results, output=args.output, quick=args.quick)

    return exit_status(measure, debug="--debug" in argv)


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The options."""
    parser = command_parser(__doc__)
    parser.add_argument("--data", type=to_path, default=DATA, help="the canvases; made if missing")
    parser.add_argument("--results", type=to_path, default=RESULTS, help="where measured rows are kept")
    parser.add_argument("--output", type=to_path, default=None, help="where STUDY.md goes; default docs")
    parser.add_argument("--quick", action="store_true", help="few canvases, seeds and budgets, one step of training")
    return parser.parse_args(argv)


def run(*, data: Path, results: Path, output: Path | None, quick: bool) -> None:
    """Measure what has not been measured and write the report."""
    if quick and output is None:
        raise UserError("--quick measures too little for docs/STUDY.md: write its report elsewhere with --output DIR.")
    from ats.engine.output import setup_logging
    from ats.study.digits import QUICK, DigitsStudy, StudySize
    from ats.study.study_page import write_study

    setup_logging()
    size = QUICK if quick else StudySize()
    num_train = 1 if quick else -(-size.tune_steps * 64 // 1400)
    make_digits(data, train_per_digit=num_train, val_per_digit=size.num_seeds * size.canvases)
    study = DigitsStudy(data=data, folder=results, size=size)
    start = time.process_time()
    rows = study.run()
    seconds = time.process_time() - start
    folder = output or ROOT / "docs"
    text = write_study(rows, study, folder=folder, minutes=total_minutes(results, seconds))
    print(text[text.index("## What holds") : text.index("## How")])
    print(f"Report: {folder / 'STUDY.md'}")


def total_minutes(results: Path, seconds: float) -> float:
    """Minutes of CPU time: of this run, and of the runs it resumed."""
    path = results / "seconds.txt"
    before = float(path.read_text()) if path.is_file() else 0.0
    if seconds > 20:  # else all results were there already
        before += seconds
        write(path, f"{before:.0f}\n")
    return before / 60


if __name__ == "__main__":
    sys.exit(main())
