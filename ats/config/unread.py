"""Keys that were set and are not read: those of other networks, samplers and kinds of data.

What is read by whom is declared here. A key counts as set if its value is not the default.
"""

from __future__ import annotations

import logging
from functools import cache

from ats.config.schema import KEY, CfgNode, flatten

logger = logging.getLogger(__name__)

# Sections that describe networks, and which of them a network reads; one that is not named here may read all.
NETWORK_SECTIONS = ("VIT.", "XVIT.", "TEMPORAL_HEAD.", "TIMESFORMER.", "MVIT.", "CVT.", "PSVIT.", "TIMM.")
NETWORKS: dict[str, tuple[str, ...]] = {
    "ViT": ("VIT.",),
    "XViT": ("VIT.", "XVIT.", "TEMPORAL_HEAD."),
    "TimeSformer": ("VIT.", "TIMESFORMER."),
    "MViT": ("MVIT.",),
    "CvT": ("CVT.",),
    "PSViT": ("PSVIT.",),
    "timm/<name>": ("TIMM.",),
}
HAVE_FRAMES = ("XViT", "TimeSformer")  # networks that can share their choice of tokens among frames

# Keys of samplers, and which of them a sampler reads; one that is not named here may read all.
_CHOICE = ("ATS.NUM_TOKENS", "ATS.MIN_TOKENS", "ATS.SCORE", "ATS.SHARE_FRAMES")
SAMPLER_KEYS = (*_CHOICE, "ATS.RULE", "ATS.SEED", "TOME.", "EVIT.")
SAMPLERS: dict[str, tuple[str, ...]] = {
    "inverse_transform": (*_CHOICE, "ATS.RULE"),
    "topk": _CHOICE,
    "random": (*_CHOICE, "ATS.SEED"),
    "tome": ("TOME.",),
    "evit": ("EVIT.",),
}


def unread_keys(cfg: CfgNode) -> dict[str, list[str]]:
    """The keys of `cfg` that are set and not read, under what does not read them: "MODEL.NAME ViT"."""
    keys = [key for key, value in flatten(cfg) if key in KEY and value != KEY[key].default]
    network = "timm/<name>" if cfg.MODEL.NAME.startswith("timm/") else cfg.MODEL.NAME
    sampler = cfg.ATS.SAMPLER
    unread: dict[str, list[str]] = {}
    if network in NETWORKS:
        others = tuple(section for section in NETWORK_SECTIONS if section not in NETWORKS[network])
        frames = ("ATS.SHARE_FRAMES",) if cfg.ATS.ENABLE and network not in HAVE_FRAMES else ()
        unread[f"MODEL.NAME {cfg.MODEL.NAME}"] = [key for key in keys if key.startswith((*others, *frames))]
    if cfg.ATS.ENABLE and sampler in SAMPLERS:
        others = tuple(key for key in SAMPLER_KEYS if key not in SAMPLERS[sampler])
        said = unread.get(f"MODEL.NAME {cfg.MODEL.NAME}", [])
        unread[f"ATS.SAMPLER {sampler}"] = [key for key in keys if key.startswith(others) and key not in said]
    return {reader: names for reader, names in unread.items() if names}


def warn_of_unread_keys(cfg: CfgNode) -> None:
    """One warning, once in a process, that names the keys of `cfg` that are set and not read."""
    unread = unread_keys(cfg)
    if unread:
        _warn("; ".join(f"{reader} does not read {', '.join(names)}" for reader, names in unread.items()))


@cache
def _warn(text: str) -> None:
    logger.warning("Keys without effect: %s.", text)
