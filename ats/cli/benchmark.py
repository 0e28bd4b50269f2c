"""Compare GFLOPs and speed of ATS with its dense network: same weights and inputs, interleaved in one process.

    python tools/benchmark.py --cfg configs/ImageNet/DeiT_S.yaml                  # random images
    python tools/benchmark.py --cfg X.yaml TEST.CHECKPOINT_FILE_PATH w.pth DATA.PATH_TO_DATA_DIR <data>
    python tools/benchmark.py --cfg X.yaml --compare ats,topk,padded --batch-size 1 8 32 --threads 1 --train
    python tools/benchmark.py --cfg X.yaml --image-size 224 384 --dtype float32 bfloat16
    python tools/benchmark.py --cfg configs/Digits/DeiT_ATS.yaml --compare dense,ats,tome,evit,topk --accuracy
    python tools/benchmark.py --cfg configs/ImageNet/DeiT_S.yaml --peers --threads 1   # every engine
    python tools/benchmark.py --suite cpu                                         # what docs/BENCHMARKS.md shows

The weights decide how many tokens survive. Without TEST.CHECKPOINT_FILE_PATH, token counts per image are drawn from the
paper's histograms (DeiT-S on ImageNet). Scoring and sampling still run and take their time. Only inverse transform
sampling gets imposed counts.

topk, random, tome (ToMe) and evit (EViT) keep a number of tokens set by the configuration. The benchmark searches for
the number that matches the mean cost of ats, over the images of --accuracy or else the largest batch.
--as-configured uses ATS.NUM_TOKENS, TOME.R and EVIT.KEEP_RATE in ATS.BLOCKS unchanged.

Prints, and writes to OUTPUT_DIR, medians over rounds, relative to the dense run of the same round:

    dense time / time       measured speedup
    dense FLOPs / FLOPs     ideal speedup
    efficiency              the first over the second; 1 means that time follows FLOPs

--peers runs both networks on the CPU in PyTorch, compiled PyTorch, ONNX Runtime and OpenVINO; in the last two, ATS runs
from files of tools/export.py. "Absolute efficiency" is then the speedup over the fastest dense engine, divided by
dense FLOPs / FLOPs.
"""

from __future__ import annotations

import argparse
import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ats.cli import as_typed
from ats.cli.parser import (
    Parser,
    check_folder,
    command,
    command_parser,
    in_range,
    parse_overrides,
    say_weights,
    split_overrides,
)
from ats.config import load_config
from ats.errors import UserError
from ats.options import COUNT, FROM_0, Range

if TYPE_CHECKING:
    from ats.config import CfgNode

logger = logging.getLogger(__name__)

BATCH, SIDE, THREADS = Range(1, 2**16), Range(1, 2**14), Range(1, 1024)
DTYPES = ("float32", "bfloat16", "float16")
NOT_WITH_PEERS = ("--compare", "--compile", "--train", "--accuracy", "--as-configured")
# Former options -> the script in tools/perf of a clone that replaces them.
MOVED = {"--decode": "decoding.py", "--loader": "loading.py", "--train-loop": "train_loop.py"}


def make_parser() -> Parser:
    """The options; some are fields of `BenchmarkSettings`. Config keys are removed first, see `split_overrides`."""
    usage = "python tools/benchmark.py --cfg FILE [options] [KEY VALUE | KEY=VALUE ...], or --suite NAME"
    parser = command_parser(__doc__, usage=as_typed(usage))
    parser.option("--cfg", "config with ATS.ENABLE True", metavar="FILE")
    parser.option("--suite", "a fixed list of measurements: cpu, peers, gpu, quick", metavar="NAME")
    text = "variants beside dense, separated by commas (default: ats)"
    parser.option("--compare", text, default="ats", metavar="A,B")
    parser.option(
        "--batch-size", "one or more (default: 1 8)", type=in_range(int, BATCH), nargs="+", default=[1, 8], metavar="N"
    )
    parser.option("--image-size", "random images of these sizes", type=in_range(int, SIDE), nargs="+", metavar="PIXELS")
    text = "one or more dtypes of weights and inputs, or with --train of autocast (default: float32)"
    parser.option("--dtype", text, nargs="+", choices=DTYPES, default=["float32"])
    parser.option("--threads", "CPU threads (default: PyTorch's)", type=in_range(int, THREADS), metavar="N")
    parser.option("--rounds", "timed rounds (default: 15)", type=in_range(int, COUNT), default=15, metavar="N")
    parser.option("--compile", "torch.compile every variant", action="store_true")
    parser.option("--peers", "run in every CPU engine; compare with the fastest dense one", action="store_true")
    parser.option("--train", "forward and backward instead of inference", action="store_true")
    text, count = "top-1 over N images (all)", in_range(int, FROM_0)
    parser.option("--accuracy", text, nargs="?", type=count, const=0, metavar="N")
    parser.option("--as-configured", "do not match the cost of ats", action="store_false", dest="equal_gflops")
    parser.option("--synthetic", "random inputs even if DATA.PATH_TO_DATA_DIR is set", action="store_true")
    return parser


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, with `overrides` [KEY, VALUE, ...].

    Refuses an option that has moved, options that --suite does not take, and a line with nothing to measure.
    """
    options = [word.partition("=")[0] for word in argv]
    for option in filter(MOVED.get, options):
        words = [word.removeprefix(f"{option}=") for word in argv if word != option]
        raise UserError(f"{option} has moved. Type in a clone: python tools/perf/{shlex.join([MOVED[option], *words])}")
    overrides, others = split_overrides(argv)
    parser = make_parser()
    args, words = parser.parse_known_args(others)
    args.overrides = overrides + parse_overrides(words, parser)
    if args.suite is not None:
        extra = [option for option in options if option.startswith("--") and option not in ("--suite", "--debug")]
        extra += ["KEY VALUE"] if args.overrides else []
        if extra:
            raise UserError(f"--suite {args.suite} takes no {', '.join(extra)}.")
    elif args.cfg is None:
        raise UserError("Give --cfg FILE or --suite NAME.")
    if args.peers:
        extra = [option for option in options if option in NOT_WITH_PEERS]
        if extra:
            raise UserError(f"--peers takes no {', '.join(extra)}.")
    return args


def run_config(args: argparse.Namespace) -> None:
    """Measure one config; print the tables and write them to OUTPUT_DIR at once, in case a later one fails."""
    import torch

    from ats.benchmark import tables
    from ats.benchmark.synthetic_counts import describe_counts
    from ats.benchmark.timing import BenchmarkSettings, measure
    from ats.benchmark.variants import read_batch

    cfg = load_config(args.cfg, args.overrides)
    if not cfg.ATS.ENABLE:
        raise UserError(f"{args.cfg} has ATS.ENABLE False: there is nothing to compare. Add ATS.ENABLE True.")
    use_data = bool(cfg.DATA.PATH_TO_DATA_DIR) and not args.synthetic
    sides = args.image_size or [None if use_data else cfg.DATA.TEST_CROP_SIZE]
    kinds = [(side, dtype) for side in dict.fromkeys(sides) for dtype in dict.fromkeys(args.dtype)]
    how = {field.name: getattr(args, field.name) for field in fields(BenchmarkSettings) if hasattr(args, field.name)}
    how["variants"] = args.compare.split(",")
    output = check_folder(Path(cfg.OUTPUT_DIR), name="OUTPUT_DIR")
    say_weights(cfg)
    if args.peers:
        run_peers(cfg, args, kinds, how, output)
        return
    counts = describe_counts(cfg.TEST.CHECKPOINT_FILE_PATH)
    about: dict[str, Any] = {"command": sys.argv[1:], "title": Path(args.cfg).stem, "counts": counts}
    entries: list[dict] = []
    text: list[str] = []
    print(f"{counts}\nThreads: {args.threads or torch.get_num_threads()}")
    for side, dtype in kinds:
        batches = {size: read_batch(cfg, size, side) for size in args.batch_size}
        found: list[dict] = []
        try:
            for row in measure(cfg, batches, BenchmarkSettings(**how | {"dtype": dtype})):
                found.append(row.as_dict())
        finally:  # keep what was measured if the next batch does not fit
            if found:
                size = found[0]["image_size"]
                entries.append({"title": f"{size} pixels, {dtype}", "at": size, "rows": found})
                heading = [f"### {size} pixels, {dtype}"] if len(kinds) > 1 else []
                text += [*heading, tables.all_tables(found)]
                print("", *text[-len(heading) - 1 :], sep="\n\n", flush=True)
                tables.write(output, entries, "\n\n".join(text), **about)
    print(f"\n{tables.LEGEND}")
    low, high = widest_range(entries)
    if high > 1.5 * low:
        logger.warning(
            "dense time / time lies between %.2f and %.2f: other programs use this machine. Type --threads 1, or more "
            "--rounds, for a figure to rely on.",
            *(low, high),
        )
    print(f"\nWritten: {output}/results.json, table.md, speed.png{', size.png' if len(set(sides)) > 1 else ''}")


def widest_range(entries: Sequence[dict]) -> tuple[float, float]:
    """5th and 95th percentile of dense time / time where they are furthest apart."""
    ranges = [(row["speedup"]["p5"], row["speedup"]["p95"]) for entry in entries for row in entry["rows"]]
    return max(ranges, key=lambda pair: pair[1] / pair[0])


def run_peers(cfg: CfgNode, args: argparse.Namespace, kinds: Sequence[tuple], how: dict, output: Path) -> None:
    """Measure one config in every engine; print the tables and write them to OUTPUT_DIR as they come."""
    import json

    from ats.benchmark.engines import versions
    from ats.benchmark.peers import measure_peers
    from ats.benchmark.tables import machine
    from ats.benchmark.timing import BenchmarkSettings
    from ats.benchmark.variants import read_batch
    from ats.files import write

    found, text = [], []
    for side, dtype in kinds:
        batches = {size: read_batch(cfg, size, side) for size in args.batch_size}
        for peers in measure_peers(cfg, batches, BenchmarkSettings(**how | {"dtype": dtype})):
            found.append(peers.as_dict() | {"image_size": side or cfg.DATA.TEST_CROP_SIZE})
            text.append(peers.text())
            print(f"\n{text[-1]}", flush=True)
            about = {"machine": machine() | versions(), "command": " ".join(sys.argv[1:]), "peers": found}
            write(output / "results.json", json.dumps(about, indent=1) + "\n")
            write(output / "table.md", "\n\n".join(text) + "\n")
    print(f"\nWritten: {output}/results.json, table.md")


def run(argv: list[str]) -> None:
    """Measure a config or a suite."""
    args = parse_args(argv)
    if args.suite is None:
        run_config(args)
        return
    from ats.benchmark.suite import DOCUMENT, run_suite

    if not DOCUMENT.is_file():
        raise UserError(f"--suite writes {DOCUMENT}, which only a clone has, not an installed package.")
    run_suite(args.suite)


main = command(run)
