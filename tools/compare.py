"""Which way to lose tokens is best at which cost? ATS and its variants, top-k, EViT, ToMe, PiToMe and PPT at the same
GFLOPs: accuracy off the shelf and after a short fine-tuning, and seconds.

    python tools/compare.py             # on Digits, and on CIFAR-10 if data/cifar10 is there
    python tools/compare.py --features vit_small_patch14_dinov2 WEIGHTS.pth PHOTOS
                                        # also: how near a timm model's CLS feature stays to the dense one's

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

from make_digits import make_digits  # noqa: E402 - beside this file

from ats.cli.parser import Parser, to_path  # noqa: E402
from ats.errors import UserError, exit_status  # noqa: E402

CIFAR10_WEIGHTS = ROOT / "configs" / "CIFAR10" / "weights" / "vit_dense.safetensors"
FOR_FEATURES = ("ats_drop", "ats_merge_score", "merge_sample", "evit", "tome", "pitome", "pitome_prop", "ppt")
DIGITS, CIFAR10, RESULTS = ROOT / "data" / "digits", ROOT / "data" / "cifar10", ROOT / "output" / "comparison"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    return exit_status(lambda: run(parse_args(argv), argv), debug="--debug" in argv)


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The options."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--on", nargs="+", choices=["digits", "cifar10"], help="what to compare on; default: what is there"
    )
    parser.add_argument(
        "--features", nargs=3, metavar=("MODEL", "WEIGHTS", "PHOTOS"), help="also a timm model's features"
    )
    parser.add_argument("--digits", type=to_path, default=DIGITS, metavar="DIR", help="the canvases; made if missing")
    parser.add_argument(
        "--cifar10", type=to_path, default=CIFAR10, metavar="DIR", help="tools/prepare_cifar10.py's folder"
    )
    parser.add_argument("--results", type=to_path, default=RESULTS, metavar="DIR", help="where results are kept")
    parser.add_argument(
        "--output", type=to_path, default=None, metavar="DIR", help="where COMPARISON.md goes; default docs"
    )
    parser.add_argument("--off-the-shelf", action="store_true", help="leave out the fine-tuning, most of the time")
    parser.add_argument("--quick", action="store_true", help="few images, one budget, one step of training")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser.parse_args(argv)


def run(args: argparse.Namespace, argv: list[str]) -> None:
    """Measure what has not been measured and write the page."""
    if args.quick and args.output is None:
        raise UserError("--quick measures too little for docs/COMPARISON.md: write it elsewhere with --output DIR.")
    has_cifar10 = args.cifar10.is_dir() and CIFAR10_WEIGHTS.is_file()
    on = args.on or ["digits", *(["cifar10"] if has_cifar10 else [])]
    if "cifar10" in on and not args.cifar10.is_dir():
        raise UserError(f"There is no {args.cifar10}: python tools/prepare_cifar10.py --help says how to make it.")
    if "cifar10" in on and not has_cifar10:
        raise UserError(f"There is no {CIFAR10_WEIGHTS}. The head of configs/CIFAR10/ViT.yaml has the command.")
    from ats.benchmark.tables import machine
    from ats.engine.output import setup_logging
    from ats.study.comparison import QUICK, Comparison, ComparisonSize, Features, shipped
    from ats.study.comparison_page import Compared, write_comparison

    setup_logging()
    size = QUICK if args.quick else ComparisonSize()
    if args.off_the_shelf:
        size = replace(size, tuned_budgets=())
    subjects = []
    for name in on:
        if name == "digits":
            make_digits(args.digits)
        subjects.append((name, shipped(name, getattr(args, name), size)))
    if args.features:
        model, weights, photos = args.features
        few = replace(size, calibration_images=min(size.calibration_images, 40), images=40, rounds=3)  # a large network
        if not args.quick:
            few = replace(few, budgets=(0.6, 0.45, 0.35), methods=FOR_FEATURES)
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
