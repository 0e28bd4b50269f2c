"""Train and/or evaluate the network of a config.

    python tools/run_net.py --cfg configs/ImageNet/DeiT_S.yaml DATA.PATH_TO_DATA_DIR imagenet \\
        TEST.CHECKPOINT_FILE_PATH deit_small_patch16_224-cd65a155.pth

Trains if TRAIN.ENABLE (and exports OUTPUT_DIR/model.safetensors), then evaluates if TEST.ENABLE (and writes
OUTPUT_DIR/result.json). Any key can be given behind the file, as KEY VALUE or KEY=VALUE.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a clone that is not installed

# Only what --help and config errors need; PyTorch is imported once the config is known to be right.
from ats.config import CfgNode, describe, load_config
from ats.engine.logging import ROOT, setup_logging
from ats.errors import UserError, suggest

EXAMPLE = "python tools/run_net.py --cfg configs/Digits/DeiT.yaml DATA.PATH_TO_DATA_DIR data/digits TRAIN.ENABLE True"
SLOWFAST_OPTIONS = ("--init_method", "--shard_id", "--num_shards")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def make_parser() -> argparse.ArgumentParser:
    """The options; whatever else stands on the command line is an override."""
    parser = _Parser(
        prog="run_net.py",
        description=__doc__,
        epilog=f"configuration keys:\n\n{describe()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        usage="python tools/run_net.py --cfg FILE [KEY VALUE | KEY=VALUE ...] [--print-config] [--debug]",
        allow_abbrev=False,
    )
    parser.add_argument("--cfg", metavar="FILE", help="YAML file; its _BASE_ files are read first")
    parser.add_argument(
        "--opts", action="store_true", help="may stand before overrides, as in SlowFast; changes nothing"
    )
    parser.add_argument("--print-config", action="store_true", help="print the resulting configuration and stop")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for option in SLOWFAST_OPTIONS:
        parser.add_argument(option, help=argparse.SUPPRESS)
    return parser


def parse_overrides(words: list[str]) -> list[str]:
    """`KEY VALUE` and `KEY=VALUE`, mixed, as [KEY, VALUE, KEY, VALUE, ...].

    Raises:
        UserError: an unknown option, or a key without a value.
    """
    pairs: list[str] = []
    rest = iter(words)
    for word in rest:
        if word.startswith("-"):
            options = ["--cfg", "--opts", "--print-config", "--debug", "--help"]
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
        raise UserError(f"--cfg FILE is missing: which network? For example:\n  {EXAMPLE}")
    cfg = load_config(args.cfg, overrides)
    if not args.print_config and not cfg.TRAIN.ENABLE and not cfg.TEST.ENABLE:
        raise UserError("There is nothing to do: TRAIN.ENABLE and TEST.ENABLE are both False. Set one of them to True.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "Several processes are not supported yet: start tools/run_net.py with python, not with torchrun."
        )
    return cfg


def run(cfg: CfgNode) -> None:
    """Train, then evaluate the trained weights or those of TEST.CHECKPOINT_FILE_PATH, as `cfg` enables."""
    from ats.engine.evaluate import evaluate_weights
    from ats.engine.train import train

    weights = train(cfg) if cfg.TRAIN.ENABLE else ""
    if cfg.TEST.ENABLE:
        evaluate_weights(cfg, weights=weights)


def main(argv: list[str]) -> int:
    """Run the command line `argv`; returns the exit status: 0, 1 after an error, 130 after Ctrl-C."""
    debug = "--debug" in argv
    try:
        setup_logging()
        args, words = make_parser().parse_known_args(argv)
        if any(getattr(args, option.lstrip("-")) is not None for option in SLOWFAST_OPTIONS):
            ROOT.info("%s have no effect: processes are started by torchrun.", ", ".join(SLOWFAST_OPTIONS))
        cfg = load(args, words)
        if args.print_config:
            print(cfg.dump(), end="")
        else:
            run(cfg)
    except (UserError, OSError) as error:
        if debug:
            raise
        ROOT.debug("error: %s", error)  # for log.txt
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted; the same command goes on from the last checkpoint, if there is one", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
