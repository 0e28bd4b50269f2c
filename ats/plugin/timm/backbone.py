"""MODEL.NAME timm/<name>: any timm vision transformer that `ats.patch` accepts, described by the config."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit
from urllib.request import getproxies

import timm
from fvcore.common.config import CfgNode
from huggingface_hub import constants as hub
from torch import nn

from ats.config.preprocessing import PREFIX
from ats.errors import UserError, suggest
from ats.models.backbone import reductions_from_cfg
from ats.plugin.timm.model import attach, network, refusal


def timm_from_cfg(cfg: CfgNode) -> nn.Module:
    """The timm model named by MODEL.NAME, described by the TIMM and ATS keys; the VIT keys are ignored. Weights are
    random unless TIMM.PRETRAINED lets timm download its own.

    Raises:
        UserError: timm does not have it, ATS does not support it, or TIMM.KWARGS or the image size do not fit.
    """
    name = cfg.MODEL.NAME.removeprefix(PREFIX)
    if not timm.is_model(name):
        raise UserError(f"MODEL.NAME {cfg.MODEL.NAME}: timm has no {name}.{suggest(name, timm.list_models())}")
    pairs = cfg.TIMM.KWARGS
    if not all(isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
        raise UserError(f"TIMM.KWARGS {pairs}: give pairs of name and value, e.g. [[img_size, 384]].")
    kwargs = {"num_classes": cfg.MODEL.NUM_CLASSES, "drop_rate": cfg.MODEL.DROPOUT_RATE} | dict(pairs)
    try:
        with hub_or_cache(cfg.TIMM.PRETRAINED):
            model = timm.create_model(name, pretrained=cfg.TIMM.PRETRAINED, **kwargs)
    except Exception as error:  # timm checks little: wrong arguments can raise anything
        if cfg.TIMM.PRETRAINED and isinstance(error, (RuntimeError, OSError)):
            raise UserError(
                f"TIMM.PRETRAINED True: timm cannot get the weights of {name} from {hub.ENDPOINT}. Type "
                "TIMM.PRETRAINED False and, if you have them as a file, TRAIN.CHECKPOINT_FILE_PATH FILE to train "
                f"from it, TEST.CHECKPOINT_FILE_PATH FILE to evaluate it. The reason: {error}"
            ) from error
        reason = str(error) or type(error).__name__
        raise UserError(f"TIMM.KWARGS {pairs}: timm cannot build {name} with these: {reason}") from error
    reason = refusal(model)
    if reason:
        raise UserError(
            f"MODEL.NAME {cfg.MODEL.NAME}, a {type(model).__name__}, is not supported: {reason}. See docs/PLUGIN.md."
        )
    size = model.patch_embed.img_size  # most of timm's models take images of one size only
    if size is not None and getattr(model.patch_embed, "strict_img_size", True):
        for key in ["TEST_CROP_SIZE"] + ["TRAIN_CROP_SIZE"] * cfg.TRAIN.ENABLE:
            side = cfg.DATA[key]
            if tuple(size) != (side, side):
                raise UserError(
                    f"DATA.{key} {side}: {cfg.MODEL.NAME} takes images of {size[0]} x {size[1]} pixels. Set DATA.{key} "
                    f'{size[0]}, or TIMM.KWARGS "[[img_size, {side}]]".'
                )
    attach(model, reductions_from_cfg(cfg, **network(model)))
    return model


@contextmanager
def hub_or_cache(pretrained: bool) -> Iterator[None]:
    """Inside, the Hugging Face hub reads only its cache if its host does not resolve; otherwise it would retry for a
    minute. Behind a proxy nothing changes, since the proxy may resolve the host.
    """
    before = hub.HF_HUB_OFFLINE
    if pretrained and not before and not getproxies():
        try:
            socket.getaddrinfo(urlsplit(hub.ENDPOINT).hostname, None)
        except OSError:
            hub.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        hub.HF_HUB_OFFLINE = before
