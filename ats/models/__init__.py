"""`build_model(cfg)`: the network that MODEL.NAME names.

A new backbone is a file with a class derived from `ats.models.backbone.Backbone` and a function that builds it from the
configuration, registered in MODELS (docs/EXTENDING.md).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module

from fvcore.common.config import CfgNode
from torch import nn

from ats.config.schema import warn_of_unread_keys
from ats.errors import UserError, suggest
from ats.files import similar_folder
from ats.models.activation_checkpoint import set_grad_checkpointing

__all__ = ["MODELS", "build_model"]

# MODEL.NAME -> function that builds it from the configuration; "module:function" is imported on first use.
MODELS: dict[str, Callable[[CfgNode], nn.Module] | str] = {
    "ViT": "ats.models.vit:vit_from_cfg",
    "XViT": "ats.models.xvit:xvit_from_cfg",
    "TimeSformer": "ats.models.timesformer:timesformer_from_cfg",
    "MViT": "ats.models.mvit.model:mvit_from_cfg",
    "CvT": "ats.models.cvt.model:cvt_from_cfg",
    "PSViT": "ats.models.psvit:psvit_from_cfg",
    "timm/<name>": "ats.plugin.timm.backbone:timm_from_cfg",
}


def build_model(cfg: CfgNode) -> nn.Module:
    """The network described by `cfg`, on the CPU, with fresh weights. Warns about keys of another network or sampler.

    Raises:
        UserError: unknown MODEL.NAME, or keys that do not fit together.
    """
    name = cfg.MODEL.NAME
    build = MODELS.get("timm/<name>" if name.startswith("timm/") else name)
    if build is None:
        raise UserError(f"MODEL.NAME {name}: choose from {', '.join(MODELS)}.{suggest(name, MODELS)}")
    if cfg.MODEL.NUM_CLASSES is None:
        folder = cfg.DATA.PATH_TO_DATA_DIR
        if folder and not os.path.exists(os.path.expanduser(folder)):
            raise UserError(f"There is no folder {folder} (DATA.PATH_TO_DATA_DIR).{similar_folder(folder)}")
        raise UserError(
            "MODEL.NUM_CLASSES is None and there are no classes to count in DATA.PATH_TO_DATA_DIR "
            f"({folder or 'not set'}): it needs train/<class>/*.jpg, or train.csv for videos. "
            "Give the right folder, or MODEL.NUM_CLASSES N."
        )
    if isinstance(build, str):
        module, function = build.split(":")
        build = getattr(import_module(module), function)
    model = build(cfg)
    if cfg.ATS.ENABLE:
        layouts = getattr(model, "layouts", ("packed",))  # your own network may be a plain nn.Module
        if cfg.ATS.LAYOUT not in layouts:
            raise UserError(
                f"ATS.LAYOUT {cfg.ATS.LAYOUT}: MODEL.NAME {name} supports the layout {' and '.join(layouts)} only."
            )
        model.layout = cfg.ATS.LAYOUT
    model.cpu_backend = cfg.ATS.CPU_BACKEND
    warn_of_unread_keys(cfg)
    if cfg.MODEL.ACT_CHECKPOINT:
        set_grad_checkpointing(model)
    return model
