"""The variants of a network that are compared, and the images they run on.

How many tokens ATS keeps differs between images. So the target is the mean GFLOPs of ATS over some images, and the
amount of each other method (K, r, keep rate) is searched until its network costs the same. Methods run in the blocks
that their authors use (`Reduction.usual_blocks`): ToMe merges in every block, EViT drops in three.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from ats.datasets import build_dataset, build_loader, input_shape
from ats.datasets.loader import collate
from ats.engine.evaluate import build_trained
from ats.errors import UserError, suggest
from ats.models.block import ats_blocks
from ats.reduction import REDUCTIONS

# Name -> config keys that turn a config with ATS into the variant. Every other name is a value of ATS.SAMPLER.
VARIANTS: dict[str, list] = {
    "dense": ["ATS.ENABLE", False],
    "ats": [],
    "padded": ["ATS.LAYOUT", "padded"],
    "static": ["ATS.LAYOUT", "static"],
    "static_graph": ["ATS.LAYOUT", "static"],  # static as one CUDA graph
    "dense_graph": ["ATS.ENABLE", False],
}
GRAPHS = ("static_graph", "dense_graph")


def variant_keys(name: str) -> list:
    """[KEY, VALUE, ...] of a variant. UserError if there is no such variant."""
    if name in VARIANTS:
        return VARIANTS[name]
    if name in REDUCTIONS:
        # Reset what only the config's own sampler reads: it would be reported as having no effect.
        unread = [] if REDUCTIONS[name].amount == "num_tokens" else ["ATS.NUM_TOKENS", 1.0]
        return ["ATS.SAMPLER", name, "ATS.STAGES", [], *unread]
    names = [*VARIANTS, *REDUCTIONS]
    raise UserError(f"--compare {name}: choose from {', '.join(names)}.{suggest(name, names)}")


def build_variant(cfg: CfgNode, name: str, device: torch.device, keys: Sequence = ()) -> nn.Module:
    """The variant's network in evaluation mode, with the weights of TEST.CHECKPOINT_FILE_PATH or random ones. `keys`,
    [KEY, VALUE, ...], override the variant's own.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list([*variant_keys(name), *keys])
    torch.manual_seed(cfg.RNG_SEED)
    return build_trained(cfg, cfg.TEST.CHECKPOINT_FILE_PATH).to(device).eval()


def build_variants(
    cfg: CfgNode, names: Sequence[str], device: torch.device, *, equal_gflops: bool, dense_keys: Sequence = ()
) -> dict[str, nn.Module]:
    """Name -> network: dense (with `dense_keys`), then `names`. Includes ats if other variants must match its cost."""
    matched = [name for name in names if equal_gflops and name in REDUCTIONS]
    models: dict[str, nn.Module] = {}
    for name in dict.fromkeys(["dense", *(["ats"] if matched else []), *names]):
        keys = dense_keys if name.startswith("dense") else []
        if name in matched:
            blocks = REDUCTIONS[name].usual_blocks(len(models["dense"].block_list()))
            keys = [] if blocks is None else ["ATS.BLOCKS", blocks]
        models[name] = build_variant(cfg, name, device, keys)
    return models


def describe_reductions(model: nn.Module) -> str:
    """What the blocks of a network are set to; "" for a dense one."""
    reductions = [block.reduction for block in ats_blocks(model)]
    if not reductions:
        return ""
    amount, values = reductions[0].setting[0], [reduction.setting[1] for reduction in reductions]
    values = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values]
    blocks = [reduction.block for reduction in reductions]
    whole = len(blocks) > 2 and blocks == list(range(blocks[0], blocks[-1] + 1))
    where = f"{blocks[0]}-{blocks[-1]}" if whole else ", ".join(map(str, blocks))
    return f"{amount} {values[0] if len(set(values)) == 1 else ', '.join(map(str, values))} in blocks {where}"


def read_batch(cfg: CfgNode, batch_size: int, image_size: int | None = None) -> Tensor:
    """Images [B, 3, H, W] or clips [B, 3, T, H, W] of the evaluation data, if DATA.PATH_TO_DATA_DIR is set and
    `image_size` is not, repeated if there are too few. Otherwise random, of `image_size` pixels or DATA.TEST_CROP_SIZE.
    """
    if cfg.DATA.PATH_TO_DATA_DIR and image_size is None:
        dataset = build_loader(cfg, "test").dataset
        step = max(len(dataset) // batch_size, 1)
        return torch.stack([dataset[(i * step) % len(dataset)].x for i in range(batch_size)])
    side = image_size or cfg.DATA.TEST_CROP_SIZE
    generator = torch.Generator().manual_seed(cfg.RNG_SEED)
    return torch.randn(batch_size, *input_shape(cfg)[:-2], side, side, generator=generator)


def labelled_images(cfg: CfgNode, num_images: int) -> DataLoader:
    """Batches of `num_images` evenly spaced images of the evaluation data; 0: all of them. UserError if there are no
    weights or no data, or the data are videos.
    """
    if cfg.TEST.DATASET.lower() == "kinetics":
        raise UserError("--accuracy is for images; tools/run_net.py evaluates videos, in their views.")
    if not cfg.TEST.CHECKPOINT_FILE_PATH or not cfg.DATA.PATH_TO_DATA_DIR:
        raise UserError("--accuracy needs weights and images: set TEST.CHECKPOINT_FILE_PATH and DATA.PATH_TO_DATA_DIR.")
    dataset = build_dataset(cfg, "test")
    num_images = min(num_images or len(dataset), len(dataset))
    chosen = [index * len(dataset) // num_images for index in range(num_images)]
    return DataLoader(Subset(dataset, chosen), batch_size=cfg.TEST.BATCH_SIZE, collate_fn=collate)
