"""Dense maps from a vision transformer that drops tokens: `model.ats.restore` gives every patch a feature again.

    python examples/dense_maps.py --images photos                            # timm's DINOv2; downloads its weights
    python examples/dense_maps.py --images photos --weights vit_s14.pth      # nothing is downloaded

Compares ways to drop or merge tokens, and ways to restore them, at equal GFLOPs: how well each image's map correlates
with the dense network's. A map is the output of a decoder, if the file of weights is {"model": ..., "decoder": ...},
else the first three principal components of the patches as colours. Prints a table and writes a picture.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # runs from a clone that is not installed

import timm
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image
from tabulate import tabulate
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn
from tqdm import tqdm

import ats
from ats.checkpoint import load_weights
from ats.errors import UserError, exit_status, suggest
from ats.flops import dense_gflops, gflops

SIDE, BATCH_SIZE, NUM_DRAWN = 224, 20, 5
# Name -> the arguments of `ats.patch`, and the ways to restore that are compared.
METHODS = {
    "ATS": ({"blocks": range(3, 12)}, ("zero", "last", "nearest")),
    "ATS merge": ({"blocks": range(3, 12), "dropped": "merge"}, ("nearest",)),
    "merge, then ATS": ({"blocks": range(12), "sampler": "merge_sample"}, ("nearest",)),
    "ToMe": ({"blocks": range(12), "sampler": "tome"}, ("nearest",)),
}
DRAWN = ("merge, then ATS", "nearest")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=Path, required=True, help="a folder, searched recursively")
    parser.add_argument("--model", default="vit_small_patch14_dinov2", help="a timm model of docs/PLUGIN.md, 12 blocks")
    parser.add_argument("--weights", type=Path, help="its weights; default: timm's, downloaded")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.62, 0.46, 0.365], help="GFLOPs / dense")
    parser.add_argument("--output", type=Path, default=Path("output/dense_maps.png"), help="picture to write")
    return parser.parse_args(argv)


class Upsampler(nn.Module):
    """Patch features [B, h, w, C] -> a map [B, 1, SIDE, SIDE] in 0..1: transposed convolutions upconv1, bn1, ..., then
    final_conv. Its weights give its sizes.
    """

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        self.depth = sum(key.startswith("upconv") and key.endswith("weight") for key in state)
        for i in range(1, self.depth + 1):
            wide, narrow, kernel, _ = state[f"upconv{i}.weight"].shape
            self.add_module(f"upconv{i}", nn.ConvTranspose2d(wide, narrow, kernel, stride=2, padding=kernel // 2 - 1))
            self.add_module(f"bn{i}", nn.BatchNorm2d(narrow))
        self.final_conv = nn.Conv2d(state["final_conv.weight"].shape[1], 1, 1)
        self.load_state_dict(state, strict=False)  # num_batches_tracked may be missing
        self.eval()

    def forward(self, patches: Tensor) -> Tensor:
        x = patches.movedim(-1, 1)
        for i in range(1, self.depth + 1):
            x = self.get_submodule(f"bn{i}")(self.get_submodule(f"upconv{i}")(x)).relu()
        return F.interpolate(self.final_conv(x), size=(SIDE, SIDE), mode="bilinear").sigmoid()


def components(features: Tensor) -> Callable[[Tensor], Tensor]:
    """Fit principal components to the dense features [B, h, w, C]. Returns a function from features to the first three,
    [B, 3, h, w] in 0..1.
    """
    flat = features.flatten(0, 2)
    mean = flat.mean(dim=0)
    axes = torch.linalg.svd(flat - mean, full_matrices=False).Vh[:3].T
    low, high = ((flat - mean) @ axes).quantile(torch.tensor([0.02, 0.98]), dim=0)
    return lambda own: (((own - mean) @ axes - low) / (high - low)).clamp(0, 1).movedim(-1, 1)


def build(args: argparse.Namespace) -> tuple[nn.Module, dict[str, Tensor] | None]:
    """The model, and its decoder's weights if the file has them."""
    if not timm.is_model(args.model):
        raise UserError(f"--model {args.model}: timm has no such model.{suggest(args.model, timm.list_models())}")
    model = timm.create_model(args.model, pretrained=args.weights is None, num_classes=0, img_size=SIDE).eval()
    if args.weights is None:
        return model, None
    if not args.weights.is_file():
        raise UserError(f"--weights {args.weights}: there is no such file.")
    state = torch.load(args.weights, weights_only=True) if args.weights.suffix == ".pth" else {}
    load_weights(model, state.get("model", args.weights))
    return model, state.get("decoder")


def read(folder: Path, model: nn.Module) -> Tensor:
    """[N, 3, SIDE, SIDE] the folder's images as the model wants them."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if len(paths) < 2:
        raise UserError(f"--images {folder}: it holds {len(paths)} images; give a folder with at least 2.")
    transform = create_transform(**resolve_model_data_config(model) | {"input_size": (3, SIDE, SIDE)})
    return torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])


def patches(model: nn.Module, x: Tensor) -> Tensor:
    """[N, h, w, C] the features of the patches."""
    grid = model.patch_embed.dynamic_feat_size((SIDE, SIDE))
    parts = [model.forward_features(part)[:, model.num_prefix_tokens :] for part in x.split(BATCH_SIZE)]
    return torch.cat(parts).unflatten(1, grid)


def mean_gflops(model: nn.Module, x: Tensor) -> float:
    """Mean GFLOPs per image."""
    costs = [gflops(model, model.forward_tokens(part)[1], part.shape).as_run for part in x.split(BATCH_SIZE)]
    return torch.cat(costs).mean().item()


def correlation(a: Tensor, b: Tensor) -> Tensor:
    """[N] Pearson correlation of each image's two maps."""
    a, b = (own.flatten(1) - own.flatten(1).mean(dim=1, keepdim=True) for own in (a, b))
    return F.cosine_similarity(a, b)


@torch.inference_mode()
def run(args: argparse.Namespace) -> None:
    """Measure, print, draw."""
    model, decoder = build(args)
    x = read(args.images, model)
    features = patches(model, x)
    to_map = components(features) if decoder is None else Upsampler(decoder)
    dense, cost = to_map(features), dense_gflops(ats.patch(model, **METHODS["ToMe"][0]), (1, *x.shape[1:]))
    ats.unpatch(model)
    lines: dict[tuple[str, str], list[str]] = {}
    drawn = [dense]
    rounds = [(name, budget) for name in METHODS for budget in args.budgets]
    for name, budget in tqdm(rounds, disable=not sys.stderr.isatty()):
        settings, modes = METHODS[name]
        ats.patch(model, **settings)
        ats.calibrate(model, x[:: max(len(x) // 40, 1)], gflops=budget * cost, progress=False)
        for mode in modes:
            model.ats.restore = mode
            own = to_map(patches(model, x))
            lines.setdefault((name, mode), []).append(f"{correlation(own, dense).mean():.3f}")
            if (name, mode) == DRAWN:
                drawn.append(own)
        lines[name, modes[-1]][-1] += f" at {mean_gflops(model, x) / cost:.3g}"
        ats.unpatch(model)
    headers = ["", "restore", *(f"{budget:g} of the GFLOPs" for budget in args.budgets)]
    print(
        f"Correlation with the dense network's maps, mean of {len(x)} images, and their GFLOPs / dense after K was "
        f"found on some 40 of them; {args.model}, dense {cost:.2f} GFLOPs\n"
    )
    print(tabulate([[*key, *own] for key, own in lines.items()], headers, "github", disable_numparse=True))
    draw(args, x, drawn, resolve_model_data_config(model))
    print(f"\nPicture: {args.output}")


def draw(args: argparse.Namespace, x: Tensor, maps: list[Tensor], data: dict) -> None:
    """A row for each of some images: itself, the dense map, and those at the budgets."""
    mean, std = (torch.tensor(data[name])[:, None, None] for name in ("mean", "std"))
    chosen = torch.linspace(0, len(x) - 1, min(NUM_DRAWN, len(x))).long().tolist()
    titles = ["image", "dense", *(f"{DRAWN[0]}\n{budget:g} of the GFLOPs" for budget in args.budgets)]
    figure = Figure(figsize=(1.7 * len(titles), 1.75 * len(chosen) + 0.3), layout="constrained")
    axes = figure.subplots(len(chosen), len(titles), squeeze=False)
    for row, i in zip(axes, chosen, strict=True):
        for axis, picture in zip(row, [(x[i] * std + mean).clamp(0, 1), *(own[i] for own in maps)], strict=True):
            axis.imshow(picture.movedim(0, -1).squeeze(-1).numpy(), vmin=0, vmax=1, cmap="magma")
            axis.set_axis_off()
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=8)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=110)


def main(argv: list[str]) -> int:
    """Run the command line; returns the exit status."""
    return exit_status(lambda: run(parse(argv)), debug=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
