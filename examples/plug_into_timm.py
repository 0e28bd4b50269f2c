"""ATS in a timm model, step by step: patch it, see which tokens it keeps and what it saves, draw them, remove it.

    python examples/plug_into_timm.py       # a small ViT, trained on CIFAR-10 here; scikit-learn's two photographs
    python examples/plug_into_timm.py --model deit_tiny_patch16_224 --checkpoint deit_tiny_patch16_224-a1311bcb.pth \
        --image cat.jpg

Nothing is downloaded. A model without --checkpoint has random weights, which only show how it works.
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

# timm's arguments of configs/CIFAR10/ViT.yaml, and its weights and preprocessing.
CIFAR10 = {"img_size": 32, "patch_size": 1, "embed_dim": 96, "depth": 12, "num_heads": 3, "mlp_ratio": 2.0}
CIFAR10 |= {"num_classes": 10}
CIFAR10_WEIGHTS = Path("configs/CIFAR10/weights/vit_dense.safetensors")
CIFAR10_DATA = {"input_size": (3, 32, 32), "crop_pct": 1.0}
CIFAR10_DATA |= {"mean": (0.4914, 0.4822, 0.4465), "std": (0.247, 0.2435, 0.2616)}


CIFAR10_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a timm model of docs/PLUGIN.md; default: the one trained on CIFAR-10")
    parser.add_argument("--checkpoint", type=Path, help="weights, timm's or the release's; default: random")
    parser.add_argument("--image", type=Path, nargs="+", help="pictures; default: scikit-learn's two photographs")
    parser.add_argument("--blocks", type=int, nargs="+", default=list(range(3, 12)), help="the blocks that sample")
    parser.add_argument("--num-tokens", type=float, default=1.0, help="K, a ratio or a number; default: all")
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


def build(name: str | None) -> nn.Module:
    """timm's model with random weights, the same ones every time; None: a small ViT for CIFAR-10."""
    if name is None:
        return timm.create_model("vit_tiny_r_s16_p8_224", **CIFAR10).eval()
    if not timm.is_model(name):
        raise UserError(f"--model {name}: timm has no such model.{suggest(name, timm.list_models())}")
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False).eval()


@torch.no_grad()
def run(args: argparse.Namespace) -> None:
    """The tour."""
    # 1. Create the model with timm, and preprocess the pictures as it expects.
    model = build(args.model)
    data = resolve_model_data_config(model) if args.model else CIFAR10_DATA
    transform = eval_transform(data["input_size"][-1], crop_ratio=data["crop_pct"], mean=data["mean"], std=data["std"])
    x = torch.stack([transform(image) for image in photographs(args.image)])

    # 2. Add ATS in one line. Weights can be loaded before or after: the state-dict keys do not change.
    ats.patch(model, blocks=args.blocks, num_tokens=args.num_tokens)
    checkpoint = args.checkpoint or (None if args.model else CIFAR10_WEIGHTS)
    if checkpoint:
        load_weights(model, checkpoint)
    weights = f"weights of {checkpoint}" if checkpoint else "random weights"
    print(f"{args.model or 'a small ViT for CIFAR-10'}, {weights}: {model.ats}")

    # 3. Run it, and see what it kept.
    model.ats.trace = True
    logits = model(x)
    trace = model.ats.last
    cost = gflops(model, trace, x.shape)
    print(f"input tokens: {model.num_prefix_tokens + model.patch_embed.num_patches}")
    for kept in trace:
        print(f"kept by block {kept.block:2d}: {kept.num_tokens.tolist()}")
    print(
        f"GFLOPs per picture: {', '.join(f'{value:.3g}' for value in cost.as_run.tolist())} instead of {cost.dense:.3g}"
    )
    names = CIFAR10_CLASSES if args.model is None else list(map(str, range(logits.shape[1])))
    print(f"classes: {', '.join(names[label] for label in logits.argmax(dim=1))}")

    # 4. Draw the kept tokens.
    views = look(model, x)[2]
    print(f"picture: {draw_kept_tokens(args.output, as_pictures(x, data['mean'], data['std']), views)}")

    # 5. Change the setting, or remove ATS: the model is as it was.
    model.ats.num_tokens = 0.5
    model(x)
    print(f"with num_tokens 0.5 block {model.ats.last[-1].block} keeps {model.ats.last[-1].num_tokens.tolist()}")
    print(f"dense again: classes {', '.join(names[label] for label in ats.unpatch(model)(x).argmax(dim=1))}")


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
