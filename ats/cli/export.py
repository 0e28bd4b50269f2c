"""Write the network of a config as ONNX or as PyTorch's .pt2, for any batch size, and check the file.

    python tools/export.py --cfg configs/Digits/DeiT_ATS.yaml ATS.NUM_TOKENS 30 -o output/deit_ats.onnx
    python tools/export.py --cfg X.yaml TEST.CHECKPOINT_FILE_PATH w.pth DATA.PATH_TO_DATA_DIR <data> -o x.pt2
    python tools/export.py --cfg X.yaml TEST.CHECKPOINT_FILE_PATH w.pth --dense -o dense.onnx

Weights are those that run_net.py would evaluate. With ATS, tokens lie in slots, min(ATS.NUM_TOKENS, slots before) for
every image, so choose ATS.NUM_TOKENS: it sets what the file costs, and no image keeps more. The file is run on random
images (and on some of the data set where DATA.PATH_TO_DATA_DIR is there) and compared with the network as it is
evaluated; a file that computes something else is an error. `ats/export/graph.py` says what goes in and comes out.

Works for MODEL.NAME ViT (also VIT.DISTILLED True) and timm/<name>, with ATS and without.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ats.cli import as_typed
from ats.cli.parser import Parser
from ats.cli.run_net import parse_overrides
from ats.config import CfgNode, load_config
from ats.errors import UserError, exit_status

if TYPE_CHECKING:
    from torch import Tensor

OPTIONS = ("--cfg", "--output", "--format", "--dense", "--images", "--debug", "--help")


def parse_args(argv: list[str] | None) -> tuple[argparse.Namespace, CfgNode]:
    """The command line, and the config it describes."""
    parser = Parser(
        description=as_typed(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--cfg", required=True, metavar="FILE", help="YAML file")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="what to write: .onnx or .pt2")
    parser.add_argument("--format", help="onnx or pt2, where the suffix does not say")
    parser.add_argument("--dense", action="store_true", help="without ATS: the same as ATS.ENABLE False")
    parser.add_argument("--images", type=int, default=16, metavar="N", help="to check with (default: %(default)s)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args, words = parser.parse_known_args(argv)
    overrides = parse_overrides(words, options=OPTIONS) + (["ATS.ENABLE", "False"] if args.dense else [])
    return args, load_config(args.cfg, overrides)


def read_images(cfg: CfgNode, count: int) -> dict[str, Tensor]:
    """Normalised images [N, 3, H, W] to check with: random ones, and some of the data set if there is one."""
    import torch

    from ats.datasets import build_dataset, input_shape

    generator = torch.Generator().manual_seed(cfg.RNG_SEED)
    images = {"random images": torch.randn(count, *input_shape(cfg), generator=generator)}
    if cfg.DATA.PATH_TO_DATA_DIR and Path(cfg.DATA.PATH_TO_DATA_DIR).is_dir():
        dataset = build_dataset(cfg, "test")
        step = max(len(dataset) // count, 1)
        chosen = [dataset[index].x for index in range(0, len(dataset), step)][:count]
        images[f"images of {cfg.DATA.PATH_TO_DATA_DIR}"] = torch.stack(chosen)
    elif cfg.DATA.PATH_TO_DATA_DIR:
        print(f"No data in {cfg.DATA.PATH_TO_DATA_DIR}: checked on random images alone.")
    return images


def run(args: argparse.Namespace, cfg: CfgNode) -> None:
    """Export, write, read back, compare.

    Raises:
        UserError: what was asked for cannot be done, or the file does not compute what the network does.
    """
    from ats.export.graph import compare, export, format_of, load, save

    kind = format_of(args.output, args.format)
    if args.images < 1:
        raise UserError(f"--images {args.images}: at least 1.")
    exported = export(cfg)
    save(exported, args.output, kind)
    if exported.slots:
        blocks = json.loads(exported.facts["ats_blocks"])
        pairs = ", ".join(f"{block}: {slots}" for block, slots in zip(blocks, exported.slots, strict=True))
        print(f"Token slots behind block {pairs} (ATS.NUM_TOKENS {cfg.ATS.NUM_TOKENS}).")
    else:
        print("Dense: no block samples tokens.")
    run_file = load(args.output, kind)
    for name, images in read_images(cfg, args.images).items():
        difference = compare(exported, run_file, images)
        print(f"On {len(images)} {name}: {difference}.")
        if not difference.is_right:
            raise UserError(
                f"{args.output} does not compute what the network does ({difference.num_far} of {len(images)} {name} "
                "are far off). Do not use it; please report the command and the versions of torch and onnxruntime."
            )
    print(f"Written: {args.output} ({Path(args.output).stat().st_size / 1e6:.1f} MB)")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    return exit_status(lambda: run(*parse_args(argv)), debug="--debug" in argv)


if __name__ == "__main__":
    sys.exit(main())
