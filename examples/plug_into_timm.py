"""ATS in a timm model, step by step: patch it, see which tokens it keeps and what it saves, draw them, remove it.

    python examples/plug_into_timm.py       # random weights, scikit-learn's two photographs
    python examples/plug_into_timm.py --checkpoint deit_tiny_patch16_224-a1311bcb.pth --image cat.jpg

Nothing is downloaded. Random weights show how it works, not what a trained network looks at.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a clone that is not installed

import timm
import torch
from PIL import Image
from timm.data import resolve_model_data_config
from torch import nn

import ats
from ats.checkpoint import load_weights
from ats.datasets import eval_transform
from ats.errors import UserError, suggest
from ats.flops import gflops
from ats.visualize import as_pictures, draw_kept_tokens, look


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="a timm model of docs/PLUGIN.md")
    parser.add_argument("--checkpoint", type=Path, help="weights, timm's or the release's; default: random")
    parser.add_argument("--image", type=Path, nargs="+", help="pictures; default: scikit-learn's two photographs")
    parser.add_argument("--blocks", type=int, nargs="+", default=list(range(3, 12)), help="the blocks that sample")
    parser.add_argument("--num-tokens", type=float, default=0.7, help="K: a ratio up to 1, or a number of tokens")
    parser.add_argument("--output", type=Path, default=Path("output/plug_into_timm.png"), help="picture to write")
    return parser.parse_args(argv)


def photographs(paths: list[Path] | None) -> list[Image.Image]:
    """The pictures in these files, or the two that come with scikit-learn."""
    if paths is None:
        from sklearn.datasets import load_sample_images

        return [Image.fromarray(image) for image in load_sample_images().images]
    try:
        return [Image.open(path).convert("RGB") for path in paths]
    except OSError as error:
        raise UserError(f"--image: {error}") from error


def build(name: str) -> nn.Module:
    """timm's model with random weights, the same ones every time."""
    if not timm.is_model(name):
        raise UserError(f"--model {name}: timm has no such model.{suggest(name, timm.list_models())}")
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False).eval()


@torch.no_grad()
def run(args: argparse.Namespace) -> None:
    """The tour."""
    # 1. Create the model with timm, and preprocess the pictures as it expects.
    model = build(args.model)
    data = resolve_model_data_config(model)
    transform = eval_transform(data["input_size"][-1], crop_ratio=data["crop_pct"], mean=data["mean"], std=data["std"])
    x = torch.stack([transform(image) for image in photographs(args.image)])

    # 2. Add ATS in one line. Weights can be loaded before or after: the state-dict keys do not change.
    ats.patch(model, blocks=args.blocks, num_tokens=args.num_tokens)
    if args.checkpoint:
        load_weights(model, args.checkpoint)
    print(f"{args.model}, {f'weights of {args.checkpoint}' if args.checkpoint else 'random weights'}: {model.ats}")

    # 3. Run it, and see what it kept.
    model.ats.trace = True
    logits = model(x)
    trace = model.ats.last
    cost = gflops(model, trace, x.shape)
    print(f"input tokens: {model.num_prefix_tokens + model.patch_embed.num_patches}")
    for kept in trace:
        print(f"kept by block {kept.block:2d}: {kept.num_tokens.tolist()}")
    print(f"GFLOPs: {', '.join(f'{value:.2f}' for value in cost.as_run.tolist())} instead of {cost.dense:.2f}")
    print(f"classes: {logits.argmax(dim=1).tolist()}")

    # 4. Draw the kept tokens.
    views = look(model, x)[2]
    print(f"picture: {draw_kept_tokens(args.output, as_pictures(x, data['mean'], data['std']), views)}")

    # 5. Change the setting, or remove ATS: the model is as it was.
    model.ats.num_tokens = 0.5
    model(x)
    print(f"with num_tokens 0.5 block {model.ats.last[-1].block} keeps {model.ats.last[-1].num_tokens.tolist()}")
    print(f"dense again: classes {ats.unpatch(model)(x).argmax(dim=1).tolist()}")


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit status."""
    try:
        run(parse(argv))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
