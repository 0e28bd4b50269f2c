"""MODEL.NAME timm/<name>: preprocess images as the weights expect, unless the configuration says otherwise."""

from __future__ import annotations

import logging

from ats.config.schema import CfgNode

logger = logging.getLogger(__name__)

PREFIX = "timm/"


def adopt_preprocessing(cfg: CfgNode) -> None:
    """Set image keys left unset (mean, deviation, size, crop ratio, interpolation) to timm's `pretrained_cfg`.

    With a mean other than its training's, a network silently loses accuracy.
    """
    if not cfg.MODEL.NAME.startswith(PREFIX):
        return
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    from timm.models import get_pretrained_cfg

    name = cfg.MODEL.NAME.removeprefix(PREFIX)
    own = get_pretrained_cfg(name, allow_unregistered=False) if _is_model(name) else None
    if own is None:
        return
    sizes = [value for key, value in _pairs(cfg.TIMM.KWARGS) if key == "img_size"] or [own.input_size[-1]]
    side = sizes[-1][-1] if isinstance(sizes[-1], (list, tuple)) else sizes[-1]
    values = {
        "DATA.MEAN": list(own.mean),
        "DATA.STD": list(own.std),
        "DATA.TRAIN_CROP_SIZE": side,
        "DATA.TEST_CROP_SIZE": side,
        "DATA.TEST_CROP_RATIO": own.crop_pct,
        "DATA.TEST_INTERPOLATION": own.interpolation,
    }
    empty = {"DATA.MEAN": list(IMAGENET_DEFAULT_MEAN), "DATA.STD": list(IMAGENET_DEFAULT_STD)}  # what [] stands for
    now = {key: cfg.DATA[key.removeprefix("DATA.")] or empty.get(key) for key in values}
    new = {key: value for key, value in values.items() if key not in cfg.given and value != now[key]}
    if new:
        cfg.merge_from_list([word for pair in new.items() for word in pair])
        logger.info("As timm's %s: %s", name, ", ".join(f"{key} {value}" for key, value in new.items()))


def _is_model(name: str) -> bool:
    import timm

    return timm.is_model(name)


def _pairs(kwargs: list) -> list[tuple[str, object]]:
    """The pairs in TIMM.KWARGS; the network refuses anything else."""
    return [tuple(pair) for pair in kwargs if isinstance(pair, (list, tuple)) and len(pair) == 2]
