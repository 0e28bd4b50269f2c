"""Which way to lose tokens is best at which cost? ATS and its variants, top-k, EViT, ToMe, PiToMe and PPT at the same
GFLOPs: accuracy off the shelf and after a short fine-tuning, and seconds.

    python tools/compare.py             # on Digits, and on CIFAR-10 and moving Digits if they are in data/
    python tools/compare.py --features vit_small_patch14_dinov2 WEIGHTS.pth PHOTOS
                                        # also: how near a timm model's features stay to the dense one's

Writes docs/COMPARISON.md, docs/comparison.json and docs/images/comparison.png (with --output: below DIR). A result is
kept in output/comparison as soon as it is measured: the same command resumes. --quick only shows that everything runs.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # runs from a clone that is not installed

from ats.cli.make_digits import make_digits  # noqa: E402
from ats.cli.parser import command_parser, to_path  # noqa: E402
from ats.errors import UserError, exit_status  # noqa: E402

FEW_METHODS = ("ats_drop", "ats_merge_score", "merge_sample", "evit", "tome", "pitome", "pitome_prop", "ppt")
# Data set -> what makes it.
MAKERS = {
    "digits": "tools/make_digits.py",
    "cifar10": "tools/prepare_cifar10.py",
    "moving_digits": "tools/make_moving_digits.py",
}
DATA, RESULTS = ROOT / "data", ROOT / "output" / "comparison"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    return exit_status(lambda: run(parse_args(argv), argv), debug="--debug" in argv)


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The options."""
    parser = command_parser(__doc__)
    parser.add_argument("--on", nargs="+", choices=list(MAKERS), help="data sets; default: those that exist")
    parser.add_argument(
        "--features", nargs=3, metavar=("MODEL", "WEIGHTS", "PHOTOS"), help="also compare a timm model's features"
    )
    for name, maker in MAKERS.items():
        option, what = f"--{name.replace('_', '-')}", "made if missing" if name == "digits" else f"{maker}'s folder"
        parser.add_argument(option, type=to_path, default=DATA / name, metavar="DIR", help=what)
    parser.add_argument("--results", type=to_path, default=RESULTS, metavar="DIR", help="where results are kept")
    parser.add_argument(
        "--output", type=to_path, default=None, metavar="DIR", help="where COMPARISON.md goes; default docs"
    )
    parser.add_argument("--off-the-shelf", action="store_true", help="skip fine-tuning, which takes longest")
    parser.add_argument("--quick", action="store_true", help="few images, one budget, one step of training")
    return parser.parse_args(argv)


def run(args: argparse.Namespace, argv: list[str]) -> None:
    """Measure what has not been measured and write the page."""
    if args.quick and args.output is None:
        raise UserError("--quick measures too little for docs/COMPARISON.md: write it elsewhere with --output DIR.")
    on = args.on or [name for name in MAKERS if name == "digits" or getattr(args, name).is_dir()]
    for name in on:
        if name != "digits" and not getattr(args, name).is_dir():
            raise UserError(f"There is no {getattr(args, name)}: python {MAKERS[name]} --help says how to make it.")
    from ats.benchmark.tables import machine
    from ats.engine.output import setup_logging
    from ats.study.comparison import Comparison
    from ats.study.comparison_page import Compared, write_comparison
    from ats.study.subjects import QUICK, ComparisonSize, Features, shipped

    setup_logging()
    size = QUICK if args.quick else ComparisonSize()
    if args.off_the_shelf:
        size = replace(size, tuned_budgets=())
    few_of = {} if args.quick else {"budgets": (0.6, 0.45, 0.35), "methods": FEW_METHODS}
    subjects = []
    for name in on:
        if name == "digits":
            make_digits(args.digits)
        own = size
        if name == "moving_digits" and not args.quick:  # clips take longer
            own = replace(size, images=500, calibration_images=48, tuned_budgets=(), **few_of)
        subjects.append((name, shipped(name, getattr(args, name), own)))
    if args.features:
        model, weights, photos = args.features
        few = replace(size, calibration_images=min(size.calibration_images, 40), images=120, rounds=3, **few_of)
        subjects.append((model, Features(model, to_path(weights), to_path(photos), few)))
    found = []
    for name, subject in subjects:
        cells, tuned = Comparison(subject, folder=args.results / name, size=subject.size).run()
        found.append(Compared(subject, subject.size, cells, tuned))
    folder = args.output or ROOT / "docs"
    command = " ".join(["python tools/compare.py", *argv])
    text = write_comparison(found, folder=folder, command=command, machine=machine())
    print(text[text.index("## The answer") : text.index("![")])
    print(f"Report: {folder / 'COMPARISON.md'}")


if __name__ == "__main__":
    sys.exit(main())
