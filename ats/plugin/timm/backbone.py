"""MODEL.NAME timm/<name>: any timm vision transformer that `ats.patch` accepts, described by the config."""

from __future__ import annotations

import timm
from fvcore.common.config import CfgNode
from torch import nn

from ats.errors import UserError, suggest
from ats.models.block import samplers_from_cfg
from ats.plugin.timm.model import adopt, num_prefix_tokens, refusal

PREFIX = "timm/"


def timm_from_cfg(cfg: CfgNode) -> nn.Module:
    """timm's model of that name with ATS as the ATS keys say; the VIT keys have no meaning for it.

    Its weights are fresh unless TIMM.PRETRAINED lets timm download its own.

    Raises:
        UserError: timm does not have it, it is not understood, or TIMM.KWARGS or the image size do not fit.
    """
    name = cfg.MODEL.NAME.removeprefix(PREFIX)
    if not timm.is_model(name):
        raise UserError(f"MODEL.NAME {cfg.MODEL.NAME}: timm has no {name}.{suggest(name, timm.list_models())}")
    model = _create(name, cfg)
    reason = refusal(model)
    if reason:
        raise UserError(
            f"MODEL.NAME {cfg.MODEL.NAME}, a {type(model).__name__}, is not understood: {reason}. See docs/PLUGIN.md."
        )
    _check_image_size(model, cfg)
    samplers = samplers_from_cfg(cfg, depth=len(model.blocks), num_prefix_tokens=num_prefix_tokens(model))
    adopt(model, samplers, layout=cfg.ATS.LAYOUT)
    return model


def _create(name: str, cfg: CfgNode) -> nn.Module:
    pairs = cfg.TIMM.KWARGS
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
        raise UserError(f"TIMM.KWARGS {pairs}: give pairs of name and value, e.g. [[img_size, 384]].")
    kwargs = {"num_classes": cfg.MODEL.NUM_CLASSES, "drop_rate": cfg.MODEL.DROPOUT_RATE} | dict(pairs)
    try:
        return timm.create_model(name, pretrained=cfg.TIMM.PRETRAINED, **kwargs)
    except (TypeError, AssertionError, ValueError) as error:
        raise UserError(f"TIMM.KWARGS {pairs}: timm cannot build {name} so: {error}") from error
    except (RuntimeError, OSError) as error:
        if not cfg.TIMM.PRETRAINED:
            raise
        raise UserError(
            f"TIMM.PRETRAINED True: timm could not get the weights of {name}: {error}\n"
            "Without a network, set it to False and give a file: TEST.CHECKPOINT_FILE_PATH (or TRAIN. to start from)."
        ) from error


def _check_image_size(model: nn.Module, cfg: CfgNode) -> None:
    """timm's models take images of one size unless they are built for any."""
    size = model.patch_embed.img_size
    if size is None or not getattr(model.patch_embed, "strict_img_size", True):
        return
    keys = ["DATA.TEST_CROP_SIZE"] + (["DATA.TRAIN_CROP_SIZE"] if cfg.TRAIN.ENABLE else [])
    for key in keys:
        side = cfg.DATA[key.removeprefix("DATA.")]
        if tuple(size) != (side, side):
            raise UserError(
                f"{key} {side}: {cfg.MODEL.NAME} takes images of {size[0]} x {size[1]} pixels. Set {key} {size[0]}, "
                f'or TIMM.KWARGS "[[img_size, {side}]]".'
            )
