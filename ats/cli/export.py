"""Export the network of a config as ONNX or PyTorch's .pt2, and verify the file.

    python tools/export.py --cfg configs/Digits/DeiT_ATS.yaml ATS.NUM_TOKENS 30 -o output/deit_ats.onnx
    python tools/export.py --cfg X.yaml TEST.CHECKPOINT_FILE_PATH w.pth DATA.PATH_TO_DATA_DIR <data> -o x.pt2
    python tools/export.py --cfg X.yaml TEST.CHECKPOINT_FILE_PATH w.pth --dense -o dense.onnx
    python tools/export.py --cfg X.yaml TEST.CHECKPOINT_FILE_PATH w.pth --adaptive -o adaptive.onnx

The weights are those that run_net.py would evaluate. The file takes batches of any size. With ATS, every image has the
same number of token slots per block, min(ATS.NUM_TOKENS, slots of the block before). So ATS.NUM_TOKENS sets the cost of
the file and the most tokens an image can keep. With --adaptive the file takes one image, whose cost follows the tokens
it keeps (docs/DEPLOY.md). The file is verified on random images, and on images of the data set if DATA.PATH_TO_DATA_DIR
exists; any difference from the evaluated network's output is an error. `ats/export/graph.py` describes inputs and
outputs.

Works for MODEL.NAME ViT (also with VIT.DISTILLED True), PSViT and timm/<name>, with and without ATS.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ats.cli.parser import check_file, command, command_parser, in_range, parse_overrides, say_weights, to_path
from ats.config import CfgNode, load_config
from ats.errors import UserError
from ats.options import Range

IMAGES = Range(1, 2**12)

if TYPE_CHECKING:
    from torch import Tensor


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, CfgNode]:
    """The options, and the config with the overrides."""
    parser = command_parser(__doc__)
    parser.add_argument("--cfg", required=True, metavar="FILE", help="YAML file")
    parser.add_argument(
        "-o", "--output", type=to_path, required=True, metavar="FILE", help="what to write: .onnx or .pt2"
    )
    parser.add_argument("--format", help="onnx or pt2, if the suffix does not say")
    parser.add_argument("--adaptive", action="store_true", help="one image at a time; the cost follows its kept tokens")
    parser.add_argument("--dense", action="store_true", help="without ATS, like ATS.ENABLE False")
    parser.option("--images", "images for the check (default: 16)", type=in_range(int, IMAGES), default=16, metavar="N")
    parser.add_argument(
        "--engine", default="onnxruntime", help="engine that checks an ONNX file: onnxruntime (default) or openvino"
    )
    args, words = parser.parse_known_args(argv)
    overrides = parse_overrides(words, parser)
    return args, load_config(args.cfg, overrides + (["ATS.ENABLE", "False"] if args.dense else []))


def read_images(cfg: CfgNode, count: int) -> dict[str, Tensor]:
    """Normalised images [N, 3, H, W] for the check: random ones, and some from the data set if there is one."""
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
        print(f"No data in {cfg.DATA.PATH_TO_DATA_DIR}: checked on random images only.")
    return images


def run(argv: list[str]) -> None:
    """Export the network, write the file, load it and compare the two.

    Raises a UserError if the network or format is not supported, or the file does not compute what the network does.
    """
    from ats.export.graph import check_engine, compare, export, format_of, load, save

    args, cfg = parse_args(argv)
    kind = format_of(args.output, args.format)
    if kind == "onnx":
        check_engine(args.engine, naming="--engine")
    check_file(args.output, name="--output")
    exported = export(cfg, adaptive=args.adaptive)
    say_weights(cfg)
    save(exported, args.output, kind)
    if exported.slots:
        pairs = ", ".join(f"{block}: {slots}" for block, slots in exported.slots.items())
        setting = "" if cfg.ATS.STAGES else f" (ATS.NUM_TOKENS {cfg.ATS.NUM_TOKENS})"
        print(f"{'Most tokens' if args.adaptive else 'Token slots'} after block {pairs}{setting}.")
    else:
        print("Dense: no block samples tokens.")
    run_file = load(args.output, kind, engine=args.engine)
    for name, images in read_images(cfg, args.images).items():
        difference = compare(exported, run_file, images)
        print(f"On {len(images)} {name}: {difference}.")
        if not difference.scale.isfinite():
            raise UserError(
                f"The network gives NaN or infinite logits on {name}, so {args.output} is useless. Check "
                "TEST.CHECKPOINT_FILE_PATH."
            )
        if not difference.is_right:
            raise UserError(
                f"{args.output} does not compute what the network does ({difference.num_far} of {len(images)} {name} "
                "are far off). Do not use it; please report the command and the versions of torch and onnxruntime."
            )
    print(f"Written: {args.output} ({Path(args.output).stat().st_size / 1e6:.1f} MB)")


main = command(run)
