"""The variants of a network that are compared, and labelled images to compare them on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from fvcore.common.config import CfgNode
from torch import nn
from torch.utils.data import DataLoader, Subset

from ats.benchmark.equal import MATCHED, authors_blocks
from ats.checkpoint import load_weights
from ats.datasets import build_dataset
from ats.datasets.build import collate
from ats.errors import UserError, suggest
from ats.models import build_model

# name: (what it is, the keys that make it of a config with ATS)
VARIANTS: dict[str, tuple[str, list]] = {
    "dense": ("the network without ATS", ["ATS.ENABLE", False]),
    "ats": ("the config as it is", []),
    "topk": ("the K highest scores", ["ATS.SAMPLER", "topk"]),
    "random": ("K tokens at random", ["ATS.SAMPLER", "random"]),
    "tome": ("ToMe instead of ATS", ["ATS.SAMPLER", "tome", "ATS.NUM_TOKENS", 1.0]),
    "evit": ("EViT instead of ATS", ["ATS.SAMPLER", "evit", "ATS.NUM_TOKENS", 1.0]),
    "padded": ("ATS, sequences padded to the longest", ["ATS.LAYOUT", "padded"]),
    "static": ("ATS, sequences padded to their slots", ["ATS.LAYOUT", "static"]),
    "static_graph": ("static as one CUDA graph", ["ATS.LAYOUT", "static"]),
    "dense_graph": ("dense as one CUDA graph", ["ATS.ENABLE", False]),
}
GRAPHS = ("static_graph", "dense_graph")


def build_variant(cfg: CfgNode, name: str, device: torch.device, keys: Sequence = ()) -> nn.Module:
    """The variant's network in evaluation mode, with the weights of TEST.CHECKPOINT_FILE_PATH, or random ones; `keys`
    go over its own.

    Raises:
        UserError: no such variant.
    """
    if name not in VARIANTS:
        raise UserError(f"--compare {name}: choose from {', '.join(VARIANTS)}.{suggest(name, VARIANTS)}")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list([*VARIANTS[name][1], *keys])
    torch.manual_seed(cfg.RNG_SEED)
    model = build_model(cfg)
    if cfg.TEST.CHECKPOINT_FILE_PATH:
        load_weights(model, cfg.TEST.CHECKPOINT_FILE_PATH)
    return model.to(device).eval()


def build_variants(
    cfg: CfgNode, names: Sequence[str], device: torch.device, *, equal_gflops: bool, dense_keys: Sequence = ()
) -> dict[str, nn.Module]:
    """Name -> network: dense (with `dense_keys`), the variants `names`, and ats where others are to cost as much."""
    matched = equal_gflops and any(name in MATCHED for name in names)
    models: dict[str, nn.Module] = {}
    for name in dict.fromkeys(["dense", *(["ats"] if matched else []), *names]):
        depth = len(getattr(models.get("dense"), "blocks", ()))  # 0: a network that the methods with blocks refuse
        blocks = authors_blocks(name, depth) if equal_gflops and depth else None
        keys = dense_keys if name.startswith("dense") else [] if blocks is None else ["ATS.BLOCKS", blocks]
        models[name] = build_variant(cfg, name, device, keys)
    return models


def labelled_images(cfg: CfgNode, num_images: int) -> DataLoader:
    """Batches of `num_images` images of the evaluation data, spread evenly; 0: all of them.

    Raises:
        UserError: there are no weights or no data, or they are videos.
    """
    if cfg.TEST.DATASET.lower() == "kinetics":
        raise UserError("--accuracy is for images; videos, in their views, are evaluated by tools/run_net.py.")
    if not cfg.TEST.CHECKPOINT_FILE_PATH or not cfg.DATA.PATH_TO_DATA_DIR:
        raise UserError("--accuracy needs weights and images: set TEST.CHECKPOINT_FILE_PATH and DATA.PATH_TO_DATA_DIR.")
    dataset = build_dataset(cfg, "test")
    num_images = min(num_images or len(dataset), len(dataset))
    chosen = [index * len(dataset) // num_images for index in range(num_images)]
    return DataLoader(Subset(dataset, chosen), batch_size=cfg.TEST.BATCH_SIZE, collate_fn=collate)
