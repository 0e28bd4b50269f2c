"""The network that tests of the benchmark measure."""

from __future__ import annotations

from ats.config import CfgNode, get_cfg

TINY = ["VIT.EMBED_DIM", 32, "VIT.NUM_HEADS", 2, "VIT.MLP_RATIO", 2, "MODEL.NUM_CLASSES", 5, "ATS.ENABLE", True]


def tiny(*overrides: object) -> CfgNode:
    """A narrow ViT of 12 blocks over 224 x 224 pixels, ATS in blocks 3 to 11."""
    cfg = get_cfg()
    cfg.merge_from_list([*TINY, *overrides])
    return cfg
