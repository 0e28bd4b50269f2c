"""GFLOPs and speed of ATS beside its dense network: the same weights and inputs, in one process, in turn.

    python tools/benchmark.py --cfg configs/ImageNet/DeiT_S.yaml                  # random images
    python tools/benchmark.py --cfg X.yaml TEST.CHECKPOINT_FILE_PATH w.pth DATA.PATH_TO_DATA_DIR <data>
    python tools/benchmark.py --cfg X.yaml --compare ats,topk,padded --batch-size 1 8 32 --threads 1 --train
    python tools/benchmark.py --cfg X.yaml --image-size 224 384 --dtype float32 bfloat16
    python tools/benchmark.py --cfg configs/Digits/DeiT_ATS.yaml --compare dense,ats,tome,evit,topk --accuracy
    python tools/benchmark.py --suite cpu                                         # what docs/BENCHMARKS.md shows

Weights decide how many tokens survive. Without TEST.CHECKPOINT_FILE_PATH every image keeps as many as a draw from the
paper's histograms says (DeiT-S on ImageNet); scoring and sampling are still computed and paid for. Only
inverse transform sampling is imposed upon.

topk, random, tome (ToMe) and evit (EViT) keep a number of tokens that the configuration says. It is searched so that
they cost what ats costs on average, over the images of --accuracy or else of the largest batch; --as-configured takes
ATS.NUM_TOKENS, TOME.R and EVIT.KEEP_RATE in ATS.BLOCKS as they are.

Printed, written to OUTPUT_DIR and compared by medians over rounds of the ratio to the dense run of the same round:

    dense time / time       what the clock says
    dense FLOPs / FLOPs     what it should say
    efficiency              the first over the second; 1 means that seconds follow FLOPs

Reading videos is timed by itself, the loader against a bare PyAV loop over the same frames:

    python tools/benchmark.py --decode [FOLDER_OR_CSV] [--cfg FILE] [KEY VALUE ...]

Clips are as long as DATA.NUM_FRAMES and DATA.SAMPLING_RATE say. Without videos it makes some of Kinetics' size (h264,
340 x 256 pixels, 10 seconds). Reading images too, against a bare loop of Pillow and timm's transform, per core:

    python tools/benchmark.py --loader [FOLDER] [--cfg FILE] [KEY VALUE ...]

What training has around its steps (log, checkpoints, signals, checks), against a bare loop that takes the same steps in
turn with it. LOG_PERIOD steps are a round:

    python tools/benchmark.py --train-loop --cfg FILE [KEY VALUE ...]
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ats.cli import as_typed
from ats.cli.parser import Parser
from ats.cli.run_net import parse_overrides
from ats.config import CfgNode, load_config
from ats.config.schema import KEY
from ats.errors import UserError, exit_status, suggest

if TYPE_CHECKING:
    from torch import Tensor

    from ats.benchmark.timing import Settings

DTYPES = ("float32", "bfloat16", "float16")
DEFAULTS = {
    "cfg": None,
    "suite": None,
    "decode": None,
    "loader": None,
    "train_loop": False,
    "compare": "ats",
    "batch_size": [1, 8],
    "image_size": None,
    "dtype": ["float32"],
    "threads": None,
    "rounds": 15,
    "compile": False,
    "train": False,
    "accuracy": None,
    "as_configured": False,
    "synthetic": False,
    "debug": False,
}
# Instead of measuring --cfg -> what else it takes.
TASKS = {
    "suite": (),
    "decode": ("cfg", "rounds", "overrides"),
    "loader": ("cfg", "rounds", "overrides"),
    "train_loop": ("cfg", "rounds", "overrides"),
}


def read_batch(cfg: CfgNode, batch_size: int, image_size: int | None) -> Tensor:
    """Images [B, 3, H, W] or clips [B, 3, T, H, W]: of the evaluation data where DATA.PATH_TO_DATA_DIR names some,
    repeated if there are fewer; otherwise random.
    """
    import torch

    from ats.datasets import build_loader

    if cfg.DATA.PATH_TO_DATA_DIR and image_size is None:
        dataset = build_loader(cfg, "test").dataset
        step = max(len(dataset) // batch_size, 1)
        return torch.stack([dataset[(i * step) % len(dataset)].x for i in range(batch_size)])
    side = image_size or cfg.DATA.TEST_CROP_SIZE
    frames = (cfg.DATA.NUM_FRAMES,) if cfg.TEST.DATASET == "kinetics" else ()
    return torch.randn(batch_size, 3, *frames, side, side, generator=torch.Generator().manual_seed(cfg.RNG_SEED))


def make_parser() -> Parser:
    """The options; what is not typed is not in the result, see `DEFAULTS`."""
    parser = Parser(
        description=as_typed(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=as_typed(
            "python tools/benchmark.py --cfg FILE [options] [KEY VALUE | KEY=VALUE ...], or --suite, --decode, --loader"
        ),
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--cfg", metavar="FILE", help="config with ATS.ENABLE True")
    parser.add_argument("--suite", metavar="NAME", help="a fixed list of measurements: cpu, gpu, quick")
    parser.add_argument("--decode", nargs="?", const="", metavar="FOLDER_OR_CSV", help="time the decoding of clips")
    parser.add_argument("--loader", nargs="?", const="", metavar="FOLDER", help="time the reading of images")
    parser.add_argument("--train-loop", action="store_true", help="time the training engine beside a bare loop")
    parser.add_argument("--compare", metavar="A,B", help="variants beside dense, by commas (default: ats)")
    parser.add_argument("--batch-size", type=int, nargs="+", metavar="N", help="one or more (default: 1 8)")
    parser.add_argument("--image-size", type=int, nargs="+", metavar="PIXELS", help="random images of these sizes")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=DTYPES,
        help="one or more: of weights and inputs, with --train of autocast (default: float32)",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: PyTorch's)")
    parser.add_argument("--rounds", type=int, metavar="N", help=f"timed rounds (default: {DEFAULTS['rounds']})")
    parser.add_argument("--compile", action="store_true", help="torch.compile every variant")
    parser.add_argument("--train", action="store_true", help="forward and backward instead of inference")
    parser.add_argument("--accuracy", nargs="?", type=int, const=0, metavar="N", help="top-1 over N images (all)")
    parser.add_argument("--as-configured", action="store_true", help="no search for what costs the same as ats")
    parser.add_argument("--synthetic", action="store_true", help="random inputs though DATA.PATH_TO_DATA_DIR is set")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def split_words(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Config keys with their values, and the other words: an option with several values shall not take a key for one.

    Raises:
        UserError: a key without a value.
    """
    overrides, others, rest = [], [], iter(argv)
    for word in rest:
        key, equals, value = word.partition("=")
        if key not in KEY and not re.fullmatch(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)+", key):
            others.append(word)
            continue
        value = value if equals else next(rest, None)
        if value is None:
            raise UserError(f"{key} has no value: type {key} VALUE or {key}=VALUE.")
        overrides += [key, value]
    return overrides, others


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The command line, with `overrides` [KEY, VALUE, ...].

    Raises:
        UserError: no task or several, options that the task has no use for.
    """
    overrides, others = split_words(argv)
    parser = make_parser()
    known, words = parser.parse_known_args(others)
    overrides += parse_overrides(words, options=tuple(parser._option_string_actions))
    given = vars(known)
    tasks = [task for task in TASKS if task in given]
    if len(tasks) > 1:
        raise UserError(f"{' and '.join(map(_option, tasks))}: one at a time.")
    if not tasks and "cfg" not in given:
        raise UserError("Give --cfg FILE, --suite NAME, --decode, --loader, or --train-loop --cfg FILE.")
    if tasks:
        [task] = tasks
        typed = [_option(name) for name in given if name not in (task, "debug", *TASKS[task])]
        typed += ["KEY VALUE"] if overrides and "overrides" not in TASKS[task] else []
        if typed:
            name = f" {given[task]}" if task == "suite" else ""
            raise UserError(f"{_option(task)}{name} takes no {', '.join(typed)}.")
        if task == "train_loop" and "cfg" not in given:
            raise UserError("--train-loop needs --cfg FILE: which training?")
    args = argparse.Namespace(**(DEFAULTS | given), overrides=overrides)
    if args.rounds < 1:
        raise UserError(f"--rounds {args.rounds} must be at least 1.")
    return args


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def run_config(args: argparse.Namespace) -> None:
    """Measure one config; print the tables and write them to OUTPUT_DIR, whatever fails behind them."""
    from ats.benchmark import report
    from ats.benchmark.counts import describe_counts
    from ats.benchmark.timing import Measured, measure_each

    cfg = load_config(args.cfg, args.overrides)
    if not cfg.ATS.ENABLE:
        raise UserError(f"{args.cfg} has ATS.ENABLE False: there is nothing to compare. Add ATS.ENABLE True.")
    if min(*args.batch_size, *(args.image_size or [1])) < 1 or (args.accuracy or 0) < 0:
        raise UserError("--batch-size and --image-size must be at least 1, the N of --accuracy too.")
    use_data = bool(cfg.DATA.PATH_TO_DATA_DIR) and not args.synthetic and args.image_size is None
    sides = args.image_size or [None if use_data else cfg.DATA.TEST_CROP_SIZE]
    kinds = [(side, dtype) for side in dict.fromkeys(sides) for dtype in dict.fromkeys(args.dtype)]
    output, counts = Path(cfg.OUTPUT_DIR), describe_counts(cfg.TEST.CHECKPOINT_FILE_PATH)
    rows: list[Measured] = []
    tables: list[str] = []

    def write() -> None:
        text = "\n\n".join(tables)
        report.write(output, rows, text, command=sys.argv[1:], title=Path(args.cfg).stem, counts=counts)

    print(counts)
    for side, dtype in kinds:
        found: list[Measured] = []
        batches = {size: read_batch(cfg, size, side) for size in args.batch_size}
        try:
            for row in measure_each(cfg, batches, settings_of(args, dtype)):
                found.append(row)
        finally:  # what is measured is not lost when the next batch does not fit
            if found:
                heading = [f"### {found[0].image_size} pixels, {dtype}"] if len(kinds) > 1 else []
                new = [*heading, report.all_tables(found)]
                print("\n" + "\n\n".join(new), flush=True)
                rows += found
                tables += new
                write()
    if use_data and cfg.TEST.DATASET.lower() == "imagenet" and not args.train:
        from ats.benchmark.loading import network_or_data

        tables.append(network_or_data(cfg, rows))
        print(f"\n{tables[-1]}")
        write()
    print(f"\nWritten: {output}/results.json, table.md, speed.png{', size.png' if len(set(sides)) > 1 else ''}")


def settings_of(args: argparse.Namespace, dtype: str) -> Settings:
    """What the command line says of measuring, in one of its dtypes."""
    import torch

    from ats.benchmark.timing import Settings

    return Settings(
        variants=tuple(args.compare.split(",")),
        rounds=args.rounds,
        dtype=None if dtype == "float32" else getattr(torch, dtype),
        compile=args.compile,
        train=args.train,
        threads=args.threads,
        equal_gflops=not args.as_configured,
        accuracy=args.accuracy,
    )


def run(args: argparse.Namespace) -> None:
    """What the command line asks for."""
    if args.decode is not None:
        from tabulate import tabulate

        from ats.benchmark.decoding import benchmark_decoding

        row = benchmark_decoding(args.decode, load_config(args.cfg, args.overrides), rounds=args.rounds)
        print(tabulate([row], headers="keys", floatfmt=".4g"))
    elif args.loader is not None:
        from tabulate import tabulate

        from ats.benchmark.loading import benchmark_loading

        rows = benchmark_loading(args.loader, load_config(args.cfg, args.overrides), rounds=args.rounds)
        print(tabulate(rows, headers="keys", floatfmt=".4g"))
    elif args.train_loop:
        from tabulate import tabulate

        from ats.benchmark.training import compare_training

        row = compare_training(load_config(args.cfg, args.overrides), rounds=args.rounds)
        print(tabulate([row], headers="keys", floatfmt=".4g"))
    elif args.suite is None:
        run_config(args)
    else:
        from ats.benchmark.suites import DOCUMENT, SUITES, run_suite

        if not DOCUMENT.is_file():
            raise UserError(f"--suite writes {DOCUMENT}, which a clone has and an installed package has not.")
        if args.suite not in SUITES:
            raise UserError(f"--suite {args.suite}: choose from {', '.join(SUITES)}.{suggest(args.suite, SUITES)}")
        run_suite(args.suite, read_batch)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    return exit_status(lambda: run(parse_args(argv)), debug="--debug" in argv)


if __name__ == "__main__":
    sys.exit(main())
