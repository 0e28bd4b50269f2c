"""Train and/or evaluate the network of a config.

    python tools/run_net.py --cfg configs/ImageNet/DeiT_S.yaml DATA.PATH_TO_DATA_DIR imagenet \\
        TEST.CHECKPOINT_FILE_PATH deit_small_patch16_224-cd65a155.pth

Trains if TRAIN.ENABLE (and exports OUTPUT_DIR/model.safetensors), then evaluates if TEST.ENABLE (and writes
OUTPUT_DIR/result.json): what it trained, or else TEST.CHECKPOINT_FILE_PATH. Any key can be given behind the file, as
KEY VALUE or KEY=VALUE.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

# Only what --help and config errors need; PyTorch is imported once the config is known to be right.
from ats.cli import as_typed
from ats.cli.parser import Parser
from ats.config import CfgNode, describe, load_config
from ats.engine.logging import ROOT, process_prefix, setup_logging
from ats.errors import Stopped, UserError, suggest

EXAMPLE = "python tools/run_net.py --cfg configs/Digits/DeiT.yaml DATA.PATH_TO_DATA_DIR data/digits TRAIN.ENABLE True"
OPTIONS = ("--cfg", "--opts", "--print-config", "--force", "--debug", "--help")
SLOWFAST_OPTIONS = ("--init_method", "--shard_id", "--num_shards")


def make_parser() -> argparse.ArgumentParser:
    """The options; whatever else stands on the command line is an override."""
    parser = Parser(
        prog="run_net.py",
        description=as_typed(__doc__),
        epilog=f"configuration keys:\n\n{describe()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage=as_typed(
            "python tools/run_net.py --cfg FILE [KEY VALUE | KEY=VALUE ...] [--print-config] [--force] [--debug]"
        ),
        allow_abbrev=False,
    )
    parser.add_argument("--cfg", metavar="FILE", help="YAML file; its _BASE_ files are read first")
    parser.add_argument(
        "--opts", action="store_true", help="may stand before overrides, as in SlowFast; changes nothing"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resulting configuration and stop")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--force", action="store_true", help="train on in an OUTPUT_DIR of another configuration")
    for option in SLOWFAST_OPTIONS:
        parser.add_argument(option, help=argparse.SUPPRESS)
    return parser


def parse_overrides(words: list[str], *, options: Sequence[str] = OPTIONS) -> list[str]:
    """`KEY VALUE` and `KEY=VALUE`, mixed, as [KEY, VALUE, KEY, VALUE, ...]; `options` are suggested for an unknown one.

    Raises:
        UserError: an unknown option, or a key without a value.
    """
    pairs: list[str] = []
    rest = iter(words)
    for word in rest:
        if word.startswith("-"):
            raise UserError(f"Unknown option {word}.{suggest(word, options)} Keys are given without dashes: KEY VALUE.")
        key, equals, value = word.partition("=")
        if not equals:
            value = next(rest, None)
        if value is None:
            raise UserError(f"{key} has no value: type {key} VALUE or {key}=VALUE.")
        pairs += [key, value]
    return pairs


def load(args: argparse.Namespace, words: list[str]) -> CfgNode:
    """The configuration that the command line asks for.

    Raises:
        UserError: no --cfg, a file or key that is wrong, or nothing to do.
    """
    overrides = parse_overrides(words)
    if args.cfg is None:
        raise UserError(f"--cfg FILE is missing: which network? For example:\n  {as_typed(EXAMPLE)}")
    cfg = load_config(args.cfg, overrides)
    if not args.print_config and not cfg.TRAIN.ENABLE and not cfg.TEST.ENABLE:
        raise UserError("There is nothing to do: TRAIN.ENABLE and TEST.ENABLE are both False. Set one of them to True.")
    return cfg


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
    """Train, then evaluate, as `cfg` enables: the weights just trained, else those of TEST.CHECKPOINT_FILE_PATH."""
    from ats.engine.distributed import process_group
    from ats.engine.evaluate import evaluate_weights
    from ats.engine.train import train

    with process_group(cfg.DEVICE, timeout_minutes=cfg.DIST_TIMEOUT_MINUTES):
        weights = train(cfg, force=force) if cfg.TRAIN.ENABLE else ""
        if cfg.TEST.ENABLE:
            evaluate_weights(cfg, weights=weights)


def recorded(function: Callable) -> Callable:
    """Under torchrun: an error of `function` is also written to where torchrun looks for it, for its report."""
    if "TORCHELASTIC_ERROR_FILE" not in os.environ:
        return function
    from torch.distributed.elastic.multiprocessing.errors import record

    return record(function)


def main(argv: list[str] | None = None) -> int:
    """Run the command line `argv`, by default that of the process.

    Returns:
        The exit status: 0, 1 after an error, 143 or 130 after SIGTERM or SIGINT.
    """
    argv = sys.argv[1:] if argv is None else argv
    debug = "--debug" in argv
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # DistributedDataParallel warns of a setting that is meant (`distributed.data_parallel`), and the store of every
        # process that another one has ended.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        setup_logging()
        args, words = make_parser().parse_known_args(argv)
        explain_slowfast_options(args)
        cfg = load(args, words)
        if args.print_config:
            print(cfg.dump(), end="")
        else:
            recorded(run)(cfg, force=args.force)
    except (UserError, OSError) as error:
        if debug:
            raise
        ROOT.debug("error: %s", error)  # for log.txt
        print(f"{process_prefix()}error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted; the same command goes on from the last checkpoint, if there is one", file=sys.stderr)
        return 130
    except Stopped as stop:
        ROOT.info("%s", stop)
        return stop.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
