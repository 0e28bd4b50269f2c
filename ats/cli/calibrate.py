"""Find K of every ATS block for a mean budget, on a few hundred unlabelled images.

    python tools/calibrate.py --cfg configs/ImageNet/DeiT_S.yaml --gflops 2.9 DATA.PATH_TO_DATA_DIR imagenet \\
        TEST.CHECKPOINT_FILE_PATH deit_small_patch16_224-cd65a155.pth
    python tools/calibrate.py --cfg X.yaml --speedup 1.6 --refine --output configs/mine.yaml
    python tools/calibrate.py --cfg X.yaml --latency-ms 20 --batch-size 8 --threads 1

The budget is a cost, or a time on this machine. For a time it also finds which of ATS.BLOCKS should sample, and says so
if none should because the dense network is fastest.

Prints what it reached, how GFLOPs vary between images, and the YAML lines with ATS.NUM_TOKENS. Any key can follow the
options, as KEY VALUE or KEY=VALUE. Which tokens survive depends on the weights and on ATS.BLOCKS, ATS.SAMPLER,
ATS.SCORE and ATS.RULE: calibrate again after changing any of them. K may exceed the number of tokens; more sample
points than tokens keep more of the tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from ats import files
from ats.cli import as_typed
from ats.cli.parser import check_file, command, command_parser, in_range, parse_overrides, say_weights, to_path
from ats.config import CfgNode, find_shipped, load_config
from ats.engine.output import setup_logging
from ats.errors import UserError, counted, printable, rounded
from ats.options import COUNT, FROM_0, POSITIVE, PROBABILITY, Range

if TYPE_CHECKING:
    from ats.budget.calibration import Calibration
    from ats.budget.timing import Timing

BUDGETS = ("gflops", "keep", "speedup", "latency_ms", "time_speedup")


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, CfgNode]:
    """The options, including `overrides` [KEY, VALUE, ...], and the configuration.

    Raises a UserError if an option, file or key is missing or wrong, or if ATS is off.
    """
    parser = command_parser(__doc__)
    parser.option("--cfg", "YAML file with ATS.ENABLE True", metavar="FILE")
    budget = parser.add_mutually_exclusive_group()
    for name, within, metavar, text in (
        ("--gflops", POSITIVE, "G", "mean GFLOPs (multiply-adds) of an image or clip"),
        ("--keep", PROBABILITY, "SHARE", "mean share of tokens kept after the ATS blocks, 0 to 1"),
        ("--speedup", POSITIVE, "X", "FLOP ratio: dense GFLOPs over mean GFLOPs; not a ratio of times"),
        ("--latency-ms", POSITIVE, "MS", "milliseconds per batch on this machine"),
        ("--time-speedup", POSITIVE, "X", "ratio of times on this machine: dense over ATS"),
    ):
        budget.add_argument(name, type=in_range(float, within), metavar=metavar, help=text)
    text = "with --latency-ms or --time-speedup: images per batch in deployment (default: 1)"
    parser.option("--batch-size", text, type=in_range(int, COUNT), metavar="N")
    text = "with --latency-ms or --time-speedup: CPU threads (default: PyTorch's)"
    parser.option("--threads", text, type=in_range(int, COUNT), metavar="N")
    text = "GFLOPs as run, or as the paper's tables count them (default: run)"
    parser.option("--accounting", text, choices=("run", "paper"), default="run")
    text = "split of the images, preprocessed as in evaluation; a network may keep fewer tokens on its training images "
    text += "than on others (default: val)"
    parser.option("--split", text, choices=("train", "val"), default="val")
    text = "number of images or clips, spread evenly over the split and held in memory (default: %(default)s)"
    parser.option("--images", text, type=in_range(int, COUNT), default=256, metavar="N")
    text = "then move tokens between blocks if that changes the logits less at the same cost; about 7 passes over "
    text += "the images per block and round (default: 2 rounds)"
    parser.option("--refine", text, type=in_range(int, FROM_0), nargs="?", const=2, default=0, metavar="ROUNDS")
    text = "stop when the mean is within this fraction of the budget (default: %(default)s)"
    parser.option("--tolerance", text, type=in_range(float, Range(0, 1, True, True)), default=0.002)
    parser.option("--output", "write the YAML lines here, with --cfg as their _BASE_", type=to_path, metavar="FILE")
    args, words = parser.parse_known_args(argv)
    args.overrides = parse_overrides(words, parser)
    if args.cfg is None:
        raise UserError("--cfg FILE is missing: which network? For example: --cfg configs/Digits/DeiT_ATS.yaml")
    if all(getattr(args, name) is None for name in BUDGETS):
        raise UserError(
            "Which budget? Give --gflops G, --keep SHARE or --speedup X; for time, --latency-ms MS or --time-speedup X."
        )
    by_time = args.latency_ms is not None or args.time_speedup is not None
    for name in ("batch_size", "threads"):
        if getattr(args, name) is not None and not by_time:
            raise UserError(f"{option_of(name)} affects only timing: use it with --latency-ms or --time-speedup.")
    if args.refine and by_time:
        raise UserError("--refine keeps the GFLOPs, not the time: leave it out with --latency-ms or --time-speedup.")
    cfg = load_config(args.cfg, args.overrides)
    if not cfg.ATS.ENABLE:
        raise UserError(f"{args.cfg} has ATS.ENABLE False. Add ATS.ENABLE True.")
    return args, cfg


def option_of(name: str) -> str:
    """The option that sets an argument: --latency-ms for latency_ms."""
    return "--" + name.replace("_", "-")


def search(args: argparse.Namespace, cfg: CfgNode) -> Calibration:
    """Calibrate the network of `cfg`, in TEST.DTYPE. UserError: weights, data or budget are missing or do not fit."""
    import torch

    from ats.budget.calibration import calibrate
    from ats.datasets.build import build_sample_loader
    from ats.engine.device import explain_lost_process, select_device
    from ats.engine.evaluate import build_trained, check_weights

    weights, device = cfg.TEST.CHECKPOINT_FILE_PATH, select_device(cfg.DEVICE)
    check_weights(cfg, weights, why="random weights say nothing about which tokens survive")
    say_weights(cfg)
    dtype = getattr(torch, cfg.TEST.DTYPE)
    model = build_trained(cfg, weights).to(device, dtype)
    with explain_lost_process():
        batches = [batch.x.to(dtype) for batch in build_sample_loader(cfg, args.split, num_samples=args.images)]
    budget = {name: getattr(args, name) for name in BUDGETS}
    options = {name: option_of(name) for name in BUDGETS}
    how = {"accounting": args.accounting, "refine_rounds": args.refine, "tolerance": args.tolerance}
    how |= {"timed_batch_size": args.batch_size or 1, "threads": args.threads}
    if (ratio := budget.pop("time_speedup")) is not None:
        budget["speedup"], how["measure"], options["speedup"] = ratio, "time", options["time_speedup"]
    try:
        return calibrate(model, batches, **budget, **how)
    except UserError as error:  # names arguments of `calibrate`: show gflops as --gflops
        named = re.sub(rf"\b({'|'.join(options)})\b", lambda match: options[match[1]], str(error))
        raise UserError(named) from None


def format_report(found: Calibration, *, noun: str, split: str) -> str:
    """The result as tables; `noun` names a sample."""
    from tabulate import tabulate

    spread = found.spread()
    unit = "GFLOPs as run" if found.accounting == "run" else "GFLOPs as the paper counts"
    figures = [
        ("mean", f"{rounded(spread['mean'])} (standard error {spread['standard error']:.2g})"),
        (f"over the {noun}s", f"std {spread['std']:.3g}, 5 % {rounded(spread['p5'])}, half {rounded(spread['p50'])}, "
         f"95 % {rounded(spread['p95'])}, most {rounded(spread['max'])}"),
        ("dense", f"{rounded(found.dense)}: {found.dense / spread['mean']:.3g} times as much"),
        ("tokens left", f"{100 * found.found.keep.mean().item():.1f} %, mean over the ATS blocks"),
    ]  # fmt: skip
    if found.least is not None and found.most is not None:
        figures.insert(-1, ("in reach", f"{rounded(found.least)} to {rounded(found.most)}"))
    if len(found.found.changes):
        change = 100 * found.found.changes.mean().item()
        figures.append(("change", f"{change:.3g} % of the probability moves to other classes than the dense network's"))
    points = found.setting and all(reduction.name == "inverse_transform" for reduction in found.setting)
    rows = zip(found.blocks, found.num_tokens, (f"{t:.1f}" for t in found.found.tokens), strict=True)
    return "\n\n".join([
        *([] if found.timing is None else [format_timing(found.timing)]),
        *([] if found.is_dense else [
            f"{unit}, {counted(len(found.found.gflops), noun)} of {split}, {found.passes} passes",
            tabulate(figures, tablefmt="plain"),
            tabulate(rows, headers=["block", "K", "tokens kept"]),
            *(["K counts sample points. Several may fall on one token, so K may exceed the tokens."] if points else []),
        ]),
    ])  # fmt: skip


def format_timing(timing: Timing) -> str:
    """The timings as tables."""
    from tabulate import tabulate

    goal = timing.goal
    asked = f"{goal.value:g} ms" if goal.name == "latency_ms" else f"{goal.value:g} times as fast as dense"
    missed = "" if timing.is_met else ": missed"
    figures = [("budget", asked + missed), ("dense", f"{rounded(timing.dense_ms)} ms")]
    if timing.rounds and not timing.why_dense:
        low, high = timing.quartiles
        spread = f"half of the rounds {low:.3g} to {high:.3g}"
        figures.append(("expected", f"{rounded(timing.expected_ms)} ms"))
        figures.append(("measured", f"{rounded(timing.ms)} ms, {timing.speedup:.3g} times as fast as dense ({spread})"))
    parts = [f"time of a batch of {timing.batch_size}, {timing.device}", tabulate(figures, tablefmt="plain")]
    if timing.tried:
        rows = [
            (
                ", ".join(str(reduction.block) for reduction in own.setting),
                f"{own.share:.3f}",
                f"{100 * own.change:.3g} %",
            )
            for own in timing.tried
        ]
        parts.append(tabulate(rows, headers=["blocks tried", "time / dense", "change"], disable_numparse=True))
    if timing.why_dense:
        parts.append(f"The network is left dense: {timing.why_dense}.")
    return "\n\n".join(parts)


def with_overrides(text: str, cfg: CfgNode, overrides: list[str]) -> str:
    """The YAML lines plus the command line's settings that they lack, with values from `cfg`, so that the file runs on
    its own: every key that changes a result, the weights for which K was found, and the data. Paths are absolute,
    except those of shipped files.
    """
    import yaml

    from ats.config.keys import keys

    lines, known = yaml.safe_load(text), keys()
    for name in dict.fromkeys([*overrides[::2], *["TEST.CHECKPOINT_FILE_PATH"] * bool(cfg.TEST.CHECKPOINT_FILE_PATH)]):
        key = known.get(name)
        if key is None or name in ("ATS.STAGES", "OUTPUT_DIR") or (key.machine and not key.path):
            continue  # a former name, what was calibrated, or how and where a run executes
        section, _, last = name.rpartition(".")
        value = cfg[section][last] if section else cfg[last]
        if key.path and os.path.exists(path := os.path.expanduser(value)):
            value = os.path.abspath(path)
        (lines.setdefault(section, {}) if section else lines).setdefault(last, value)
    return yaml.safe_dump(lines, sort_keys=False, default_flow_style=None, width=10**6)


def write(path: Path, yaml: str, *, cfg: str, argv: list[str], report: str) -> None:
    """Write a config on top of --cfg, with the command and its report as a comment."""
    base = os.path.relpath(find_shipped(cfg).resolve(), path.resolve().parent)
    base = base if re.fullmatch(r"[\w./-]+", base) else json.dumps(base)
    typed = printable(as_typed("python tools/calibrate.py") + " " + shlex.join(argv))
    comment = "".join(f"# {line}".rstrip() + "\n" for line in ["Found by", f"  {typed}", "", *report.splitlines()])
    files.write(path, f"{comment}_BASE_: {base}\n\n{yaml}")


def run(argv: list[str]) -> None:
    """Calibrate, print what was found and write it to --output."""
    from ats.datasets.build import noun_of

    setup_logging()
    args, cfg = parse_args(argv)
    if args.output:
        check_file(args.output, name="--output")
    found = search(args, cfg)
    report = format_report(found, noun=noun_of(cfg), split=args.split)
    yaml = with_overrides(found.yaml(as_stages=bool(cfg.ATS.STAGES)), cfg, args.overrides)
    print(f"\n{report}\n\n{yaml}")
    if args.output:
        write(args.output, yaml, cfg=args.cfg, argv=argv, report=report)
        print(f"Written: {args.output}")


main = command(run)
