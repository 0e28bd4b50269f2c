"""GFLOPs and speed of ATS beside its dense network: the same weights and inputs, in one process, in turn.

    python tools/benchmark.py --cfg configs/ImageNet/DeiT_S.yaml                  # random images
    python tools/benchmark.py --cfg X.yaml TEST.CHECKPOINT_FILE_PATH w.pth DATA.PATH_TO_DATA_DIR <data>
    python tools/benchmark.py --cfg X.yaml --compare ats,topk,padded --batch-size 1 8 32 --threads 1 --train
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
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ats.cli import as_typed
from ats.config import CfgNode, load_config
from ats.errors import UserError, exit_status, suggest

if TYPE_CHECKING:
    from torch import Tensor

DTYPES = ("float32", "bfloat16", "float16")


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


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=as_typed(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cfg", help="config with ATS.ENABLE True")
    parser.add_argument("--suite", help="a fixed list of measurements instead of --cfg: cpu, gpu, quick")
    parser.add_argument("--decode", nargs="?", const="", metavar="FOLDER_OR_CSV", help="time the decoding of clips")
    parser.add_argument("--loader", nargs="?", const="", metavar="FOLDER", help="time the reading of images")
    parser.add_argument("--train-loop", action="store_true", help="time the training engine beside a bare loop")
    parser.add_argument("--compare", default="ats", help="variants beside dense, by commas (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8], metavar="N", help="default: 1 8")
    parser.add_argument("--image-size", type=int, metavar="PIXELS", help="random images of this size")
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="autocast (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="torch.compile every variant")
    parser.add_argument("--train", action="store_true", help="forward and backward instead of inference")
    parser.add_argument("--accuracy", nargs="?", type=int, const=0, metavar="N", help="top-1 over N images (all)")
    parser.add_argument("--as-configured", action="store_true", help="no search for what costs the same as ats")
    parser.add_argument("--synthetic", action="store_true", help="random inputs though DATA.PATH_TO_DATA_DIR is set")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help="config keys")
    args = parser.parse_intermixed_args(argv)
    if args.decode is None and args.loader is None and (args.cfg is None) == (args.suite is None):
        parser.error("give --cfg FILE, --suite NAME, --decode or --loader")
    if args.train_loop and args.cfg is None:
        parser.error("--train-loop needs --cfg FILE")
    return args


def run_config(args: argparse.Namespace) -> None:
    """Measure one config; print the tables and write results.json, table.md and speed.png to OUTPUT_DIR."""
    import torch

    from ats.benchmark import report
    from ats.benchmark.timing import Settings, measure

    cfg = load_config(args.cfg, args.overrides)
    if not cfg.ATS.ENABLE:
        raise UserError(f"{args.cfg} has ATS.ENABLE False: there is nothing to compare. Add ATS.ENABLE True.")
    if min(args.batch_size) < 1 or args.rounds < 1 or (args.accuracy or 0) < 0:
        raise UserError("--batch-size and --rounds must be at least 1, the N of --accuracy too.")
    settings = Settings(
        variants=tuple(args.compare.split(",")),
        rounds=args.rounds,
        dtype=None if args.dtype == "float32" else getattr(torch, args.dtype),
        compile=args.compile,
        train=args.train,
        threads=args.threads,
        equal_gflops=not args.as_configured,
        accuracy=args.accuracy,
    )
    side = cfg.DATA.TEST_CROP_SIZE if args.synthetic and args.image_size is None else args.image_size
    rows = measure(cfg, {size: read_batch(cfg, size, side) for size in args.batch_size}, settings)
    if not cfg.TEST.CHECKPOINT_FILE_PATH:
        print("No checkpoint: token counts drawn from the paper's histograms (DeiT-S on ImageNet).")
    tables = "\n\n".join(
        text
        for text in (
            report.variants_table(rows),
            report.table(rows),
            report.tokens_table(rows),
            report.parts_table(rows),
        )
        if text
    )
    if cfg.DATA.PATH_TO_DATA_DIR and cfg.TEST.DATASET.lower() == "imagenet" and not args.train:
        from ats.benchmark.loading import network_or_data

        tables += "\n\n" + network_or_data(cfg, rows)
    print(tables)
    output = Path(cfg.OUTPUT_DIR)
    report.write(output, rows, tables, command=sys.argv[1:], title=Path(args.cfg).stem)
    print(f"\nWritten: {output}/results.json, table.md, speed.png")


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
    args = parse_args(argv)
    return exit_status(partial(run, args), debug=args.debug)


if __name__ == "__main__":
    sys.exit(main())
