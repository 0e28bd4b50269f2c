"""K of every ATS block for a mean budget, found on a few hundred images. Labels are not looked at.

    python tools/calibrate.py --cfg configs/ImageNet/DeiT_S.yaml --gflops 2.9 DATA.PATH_TO_DATA_DIR imagenet \\
        TEST.CHECKPOINT_FILE_PATH deit_small_patch16_224-cd65a155.pth
    python tools/calibrate.py --cfg X.yaml --speedup 1.6 --refine --output configs/mine.yaml

prints what it reached, how GFLOPs spread over the images, and the YAML lines with ATS.NUM_TOKENS. Any key can be given
after the file, as KEY VALUE or KEY=VALUE. Which tokens survive depends on the weights and on ATS.BLOCKS, ATS.SAMPLER,
ATS.SCORE and ATS.RULE: change one, and calibrate again. A K above the number of tokens is meant: more sample points
than tokens pick more of them.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from ats.cli import as_typed
from ats.cli.parser import Parser
from ats.cli.run_net import parse_overrides
from ats.config import CfgNode, find_shipped, load_config
from ats.engine.logging import setup_logging
from ats.errors import UserError, exit_status

if TYPE_CHECKING:
    from ats.budget.calibration import Calibration

OPTIONS = ("--cfg", "--gflops", "--keep", "--speedup", "--accounting", "--split", "--images", "--refine", "--output")


def make_parser() -> argparse.ArgumentParser:
    """The options; whatever else stands on the command line is an override."""
    parser = Parser(
        description=as_typed(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--cfg", metavar="FILE", help="YAML file with ATS.ENABLE True")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--gflops", type=float, metavar="G", help="mean GFLOPs (multiply-adds) of an image or clip")
    budget.add_argument(
        "--keep", type=float, metavar="SHARE", help="mean share of tokens left behind the ATS blocks, 0 to 1"
    )
    budget.add_argument(
        "--speedup", type=float, metavar="X", help="FLOP ratio: dense GFLOPs over the mean, not seconds"
    )
    parser.add_argument(
        "--accounting",
        choices=("run", "paper"),
        default="run",
        help="GFLOPs as run, or as the paper's tables count them (default: run)",
    )
    parser.add_argument(
        "--split",
        choices=("train", "val"),
        default="val",
        help="whose images, seen as in evaluation; on images that it was trained on a network may keep fewer tokens "
        "than on others (default: val)",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=256,
        metavar="N",
        help="images or clips, evenly spread over the split and held in memory (default: %(default)s)",
    )
    parser.add_argument(
        "--refine",
        type=int,
        nargs="?",
        const=2,
        default=0,
        metavar="ROUNDS",
        help="then move tokens between blocks where that changes the logits less at the same cost; some 7 passes over "
        "the images per block and round (default: 2 rounds)",
    )
    parser.add_argument(
        "--tolerance", type=float, default=0.002, help="stop this near, relative (default: %(default)s)"
    )
    parser.add_argument("--output", metavar="FILE", help="write the YAML lines here, with --cfg as their _BASE_")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def load(args: argparse.Namespace, words: list[str]) -> CfgNode:
    """The configuration that the command line asks for.

    Raises:
        UserError: something is missing, or wrong.
    """
    overrides = parse_overrides(words, options=OPTIONS)
    if args.cfg is None:
        raise UserError("--cfg FILE is missing: which network? For example: --cfg configs/Digits/DeiT_ATS.yaml")
    if args.gflops is None and args.keep is None and args.speedup is None:
        raise UserError("Which budget? Give --gflops G, --keep SHARE or --speedup X.")
    if args.refine < 0 or not 0 < args.tolerance < 1:
        raise UserError("--refine takes a number of rounds from 0, --tolerance a number between 0 and 1.")
    cfg = load_config(args.cfg, overrides)
    if not cfg.ATS.ENABLE:
        raise UserError(f'{args.cfg} has ATS.ENABLE False. Add ATS.ENABLE True ATS.BLOCKS "[3, 4, ...]".')
    if not cfg.TEST.CHECKPOINT_FILE_PATH and not (cfg.MODEL.NAME.startswith("timm/") and cfg.TIMM.PRETRAINED):
        raise UserError(
            "TEST.CHECKPOINT_FILE_PATH is empty, and random weights say nothing about which tokens survive. "
            "Type TEST.CHECKPOINT_FILE_PATH FILE."
        )
    return cfg


def run(args: argparse.Namespace, cfg: CfgNode) -> Calibration:
    """Calibrate the network of `cfg`.

    Raises:
        UserError: weights, data or budget do not fit.
    """
    from ats.budget.calibration import calibrate
    from ats.checkpoint import load_weights
    from ats.datasets.build import build_sample_loader
    from ats.engine.device import explain_lost_worker, select_device
    from ats.models import build_model

    device = select_device(cfg.DEVICE)
    model = build_model(cfg)
    if cfg.TEST.CHECKPOINT_FILE_PATH:
        load_weights(model, cfg.TEST.CHECKPOINT_FILE_PATH)
    with explain_lost_worker():
        batches = [batch.x for batch in build_sample_loader(cfg, args.split, num_samples=args.images)]
    try:
        return calibrate(
            model.to(device),
            batches,
            gflops=args.gflops,
            keep=args.keep,
            speedup=args.speedup,
            accounting=args.accounting,
            refine_rounds=args.refine,
            tolerance=args.tolerance,
        )
    except UserError as error:  # speaks of arguments: gflops is --gflops here
        raise UserError(re.sub(r"\b(gflops|keep|speedup)\b", r"--\1", str(error))) from None


def report(found: Calibration, *, images: str) -> str:
    """What was reached, for people."""
    from tabulate import tabulate

    spread = found.spread()
    unit = "GFLOPs as run" if found.accounting == "run" else "GFLOPs as the paper counts"
    figures = [
        ("mean", f"{spread['mean']:.4g} (standard error {spread['standard error']:.2g})"),
        ("over the images", f"std {spread['std']:.3g}, 5 % {spread['p5']:.4g}, half {spread['p50']:.4g}, "
         f"95 % {spread['p95']:.4g}, most {spread['max']:.4g}"),
        ("dense", f"{found.dense:.4g}: {found.dense / spread['mean']:.3g} times as much"),
        ("in reach", f"{found.least:.4g} to {found.most:.4g}"),
        ("tokens left", f"{100 * found.found.keep.mean().item():.1f} %, mean over the ATS blocks"),
    ]  # fmt: skip
    if len(found.found.changes):
        change = 100 * found.found.changes.mean().item()
        figures.append(("change", f"{change:.3g} % of the probability lies on other classes than the dense network's"))
    rows = zip(found.blocks, found.num_tokens, (f"{t:.1f}" for t in found.found.tokens), strict=True)
    return "\n\n".join([
        f"{unit}, {images}, {found.passes} passes",
        tabulate(figures, tablefmt="plain"),
        tabulate(rows, headers=["block", "K", "tokens kept"]),
    ])  # fmt: skip


def with_overrides(lines: str, overrides: list[str]) -> str:
    """The YAML lines, and those ATS keys of the command line that they do not have."""
    for key, value in zip(overrides[::2], overrides[1::2], strict=True):
        name = key.removeprefix("ATS.")
        if name != key and name not in ("ENABLE", "BLOCKS", "NUM_TOKENS"):
            lines += f"  {name}: {value}\n"
    return lines


def write(path: Path, text: str, *, cfg: str, argv: list[str], figures: str) -> None:
    """A config of its own: what was found, over --cfg."""
    base = os.path.relpath(find_shipped(cfg).resolve(), path.resolve().parent)
    command = as_typed("python tools/calibrate.py") + " " + shlex.join(argv)
    comment = "".join(f"# {line}".rstrip() + "\n" for line in ["Found by", f"  {command}", "", *figures.splitlines()])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{comment}_BASE_: {base}\n\n{text}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`, by default that of the process; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    return exit_status(partial(calibrate, argv), debug="--debug" in argv)


def calibrate(argv: list[str]) -> None:
    """What the command line asks for."""
    setup_logging()
    args, words = make_parser().parse_known_args(argv)
    found = run(args, load(args, words))
    images = f"{len(found.found.gflops)} images of {args.split}"
    figures, lines = report(found, images=images), with_overrides(found.yaml(), parse_overrides(words))
    print(f"\n{figures}\n\n{lines}")
    if args.output:
        write(Path(args.output), lines, cfg=args.cfg, argv=argv, figures=figures)
        print(f"Written: {args.output}")


if __name__ == "__main__":
    sys.exit(main())
