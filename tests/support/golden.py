"""Golden cases of the official ATS code, and A4 (the true DeiT-S) as files that the command line can evaluate.

    python tests/support/golden.py DIR     # DIR/deit_small.pth in the DeiT release's format, DIR/val/<class>/*.png

A4's weights are too large for a repository; they are drawn key by key from a seed (see "recipe" in its case.json).
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

FIXTURES = Path(__file__).parents[1] / "fixtures"


def golden_case(name: str) -> tuple[dict, np.lib.npyio.NpzFile]:
    """`case.json` and the arrays of a case in fixtures/image."""
    folder = FIXTURES / "image" / name
    return json.loads((folder / "case.json").read_text()), np.load(folder / "golden.npz")


def images(pixels: np.ndarray, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Stored pixels [B, 3, H, W] (uint8) as the reference saw them."""
    return torch.from_numpy(((pixels / 255.0 - 0.5) / 0.25).astype(np.float32)).to(dtype)


def weights_by_recipe(recipe: dict) -> dict[str, torch.Tensor]:
    """A DeiT-S state dict drawn from the recipe of case A4."""
    shapes = json.loads((FIXTURES / "keys" / "deit_small_patch16_224.json").read_text())["release_file_layout"]["model"]
    weights = {}
    for key, shape in shapes.items():
        z = np.random.default_rng([recipe["SEED"], zlib.crc32(key.encode())]).standard_normal(shape)
        if "norm" in key and key.endswith("weight"):
            z = 1 + 0.1 * z
        elif key.endswith("bias"):
            z = 0.1 * z
        elif key in ("pos_embed", "cls_token"):
            z = 0.3 * z
        else:
            z = z / np.sqrt(np.prod(shape[1:]))
            if key.endswith("attn.qkv.weight"):
                z[: 2 * recipe["embed_dim"]] *= recipe["QK_GAIN"]
        weights[key] = torch.from_numpy(z.astype(np.float32))
    return weights


def weights_by_seed(recipe: dict, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a case for `model`, whose keys and shapes are the case's (see "weights_recipe" in its case.json);
    to the bit those that its numbers were made with.
    """
    rng, weights = np.random.default_rng(recipe["weights_seed"]), {}
    for key, value in sorted(model.state_dict().items()):
        z = rng.standard_normal(tuple(value.shape))
        if "norm" in key and key.endswith("weight"):
            z = 1 + 0.1 * z
        elif key.endswith("bias"):
            z = 0.1 * z
        elif key in ("pos_embed", "cls_token"):
            z = 0.3 * z
        else:
            z = z / np.sqrt(np.prod(value.shape[1:]))
            if key.endswith("attn.qkv.weight"):
                z[: 2 * value.shape[1]] *= recipe["qk_gain"]
        weights[key] = torch.from_numpy(z.astype(np.float32))
    return weights


def write_deit_small(folder: Path, *, num_classes: int = 1000) -> Path:
    """Write case A4 as a DeiT checkpoint and an ImageNet tree of `num_classes` folders; returns the former."""
    case, golden = golden_case("A4_deit_small_recipe")
    labels = golden["logits"].argmax(1).tolist()
    for label in range(num_classes):
        (folder / "val" / f"class{label:04d}").mkdir(parents=True, exist_ok=True)
    for i, (pixels, label) in enumerate(zip(golden["image_u8"], labels, strict=True)):
        Image.fromarray(pixels.transpose(1, 2, 0)).save(folder / "val" / f"class{label:04d}" / f"{i}.png")
    checkpoint = folder / "deit_small_patch16_224-cd65a155.pth"
    torch.save({"model": weights_by_recipe(case["weights"])}, checkpoint)
    return checkpoint


if __name__ == "__main__":
    print(write_deit_small(Path(sys.argv[1])))
