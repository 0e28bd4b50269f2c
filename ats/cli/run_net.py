"""Train and/or evaluate the network of a config.

    python tools/run_net.py --cfg configs/ImageNet/DeiT_S.yaml DATA.PATH_TO_DATA_DIR imagenet \\
        TEST.CHECKPOINT_FILE_PATH deit_small_patch16_224-cd65a155.pth

With TRAIN.ENABLE it trains and exports OUTPUT_DIR/model.safetensors. With TEST.ENABLE it then evaluates the trained
weights, or else TEST.CHECKPOINT_FILE_PATH, and writes OUTPUT_DIR/result.json. Any key can follow the file, as
KEY VALUE or KEY=VALUE.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from functools import partial

# Only what --help and config errors need. PyTorch is imported once the config is known to be valid.
from ats.cli import as_typed
from ats.cli.parser import Parser, command, command_parser, parse_overrides
from ats.config import CfgNode, load_config
from ats.config.keys import describe, list_sections
from ats.config.schema import changed, nest
from ats.engine.output import ROOT, setup_logging
from ats.errors import UserError, environment_number

EXAMPLE = "python tools/run_net.py --cfg configs/Digits/DeiT.yaml DATA.PATH_TO_DATA_DIR data/digits TRAIN.ENABLE True"
USAGE = """python tools/run_net.py --cfg FILE [KEY VALUE | KEY=VALUE ...] [--print-config [all]] [--force] [--debug]
       python tools/run_net.py --help [SECTION ... | all]"""
SLOWFAST_OPTIONS = ("--init_method", "--shard_id", "--num_shards")
PRINT_ALL = "--print-config-all"  # `--print-config all`, as one word


def make_parser() -> Parser:
    """The options; every other word on the command line is an override."""
    epilog = (
        "sections of the configuration, and keys without a section; --help SECTION (for example --help ATS SOLVER)\n"
        f"prints the keys of a section, --help all prints every key:\n\n{list_sections()}"
    )
    parser = command_parser(__doc__, prog="run_net.py", epilog=epilog, usage=as_typed(USAGE), add_help=False)
    parser.option("--cfg", "YAML file; its _BASE_ files are read first", metavar="FILE")
    parser.option("--opts", "may precede overrides, as in SlowFast; changes nothing", action="store_true")
    text = "check the configuration without data and weights, print what differs from the defaults (--print-config "
    text += "all: every key) and stop"
    parser.option("--print-config", text, action="store_const", const="changes")
    parser.option(PRINT_ALL, argparse.SUPPRESS, action="store_const", const="all", dest="print_config")
    parser.option("--force", "resume in an OUTPUT_DIR of another configuration", action="store_true")
    parser.add_argument("-h", "--help", nargs="*", metavar="SECTION", help="this text, or the keys of sections")
    for option in SLOWFAST_OPTIONS:
        parser.option(option, argparse.SUPPRESS)
    return parser


def join_all(argv: Sequence[str]) -> list[str]:
    """`--print-config all` as one word. As an optional value, argparse would take the next KEY too."""
    words = list(argv)
    for place in range(len(words) - 1, 0, -1):
        if words[place - 1 : place + 1] == ["--print-config", "all"]:
            words[place - 1 : place + 1] = [PRINT_ALL]
    return words


def load(args: argparse.Namespace, words: list[str]) -> CfgNode:
    """The command line's configuration. Raises a UserError without --cfg, for a wrong file or key, or nothing to do."""
    overrides = parse_overrides(words, make_parser())
    if args.cfg is None:
        raise UserError(f"--cfg FILE is missing: which network? For example:\n  {as_typed(EXAMPLE)}")
    cfg = load_config(args.cfg, overrides)
    if not cfg.TRAIN.ENABLE and not cfg.TEST.ENABLE:
        raise UserError("There is nothing to do: TRAIN.ENABLE and TEST.ENABLE are both False. Set one of them to True.")
    return cfg


def check(cfg: CfgNode) -> None:
    """Build the network and the training recipe, to find the errors that a run finds before it reads data or weights.

    Raises a UserError if keys contradict each other, or if a network, data set or optimizer does not exist.
    """
    import torch

    from ats.datasets.build import dataset_builder
    from ats.engine.step import Recipe, build_optimizer
    from ats.models import build_model

    if cfg.TRAIN.ENABLE:
        dataset_builder(cfg, "train")
    if cfg.TEST.ENABLE:
        dataset_builder(cfg, "test")
    cfg = cfg.clone()
    cfg.defrost()
    if cfg.MODEL.NAME.startswith("timm/"):
        cfg.TIMM.PRETRAINED = False  # nothing is downloaded
    try:
        with torch.device("meta"):
            model = build_model(cfg)
    except (NotImplementedError, RuntimeError):  # a custom network that reads values while it is built
        model = build_model(cfg)
    if cfg.TRAIN.ENABLE:
        Recipe(cfg)
        build_optimizer(model, cfg)


def explain_slowfast_options(args: argparse.Namespace) -> None:
    """Say what to type instead of SlowFast's options for several machines."""
    if args.init_method is None and args.shard_id is None and args.num_shards is None:
        return
    endpoint = (args.init_method or "HOST:29500").removeprefix("tcp://")
    nodes = f"--nnodes={args.num_shards or 'MACHINES'}" + (f" --node_rank={args.shard_id}" if args.shard_id else "")
    ROOT.warning(
        "%s have no effect: processes are started by torchrun. Type on every machine: torchrun %s "
        "--rdzv_backend=c10d --rdzv_endpoint=%s --nproc_per_node=GPUS tools/run_net.py --cfg %s ...",
        *(", ".join(SLOWFAST_OPTIONS), nodes, endpoint, args.cfg or "FILE"),
    )


def run(cfg: CfgNode, *, force: bool = False) -> None:
    """Train, then evaluate the weights just trained, else TEST.CHECKPOINT_FILE_PATH; `cfg` enables either."""
    from ats.datasets.build import mean_std
    from ats.engine.device import process_group
    from ats.engine.evaluate import evaluate_weights
    from ats.engine.train import train
    from ats.visualize import draw_fixed_images

    mean, std = mean_std(cfg)
    draw = partial(draw_fixed_images, num_images=cfg.TENSORBOARD.NUM_IMAGES, mean=mean, std=std)
    with process_group(cfg.DEVICE, timeout_minutes=cfg.DIST_TIMEOUT_MINUTES):
        weights = train(cfg, force=force, draw=draw) if cfg.TRAIN.ENABLE else ""
        if cfg.TEST.ENABLE:
            evaluate_weights(cfg, weights=weights)


def execute(argv: list[str]) -> None:
    """Do what the command line says, or print the configuration or help."""
    if environment_number("WORLD_SIZE", 1) > 1:
        # Silences DistributedDataParallel's warning about a deliberate setting (`device.data_parallel`), and the
        # warnings of every process's store that another one has ended.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    setup_logging()
    parser, train_and_evaluate = make_parser(), run
    args, words = parser.parse_known_args(join_all(argv))
    if args.help is not None:
        print(describe(args.help) if args.help else parser.format_help().rstrip())
        return
    explain_slowfast_options(args)
    cfg = load(args, words)
    if args.print_config:
        check(cfg)
        print((cfg if args.print_config == "all" else nest(changed(cfg).items())).dump(), end="")
        return
    if "TORCHELASTIC_ERROR_FILE" in os.environ:  # `record` writes errors there, for torchrun's report
        from torch.distributed.elastic.multiprocessing.errors import record

        train_and_evaluate = record(run)
    train_and_evaluate(cfg, force=args.force)


main = command(execute, interrupted="interrupted; run the same command to resume from the last checkpoint, if any")
