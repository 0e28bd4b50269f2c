"""`build_model(cfg)`: the network that MODEL.NAME names.

To add a backbone, write a file with a class derived from `ats.models.backbone.Backbone` and a function that builds it
from the configuration, and register that function in MODELS (docs/EXTENDING.md).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module

from fvcore.common.config import CfgNode
from torch import nn

from ats.config.unread import warn_of_unread_keys
from ats.errors import UserError, suggest
from ats.models.activation_checkpoint import set_grad_checkpointing
from ats.reduction.sampling import REDUCERS, SAMPLERS

__all__ = ["MODELS", "build_model", "has_layouts"]

TIMM = "timm/"  # MODEL.NAME timm/<name>

# MODEL.NAME -> what builds it from the configuration; "module:function" is imported when it is first asked for.
MODELS: dict[str, Callable[[CfgNode], nn.Module] | str] = {
    "ViT": "ats.models.vit:vit_from_cfg",
    "XViT": "ats.models.xvit:xvit_from_cfg",
    "TimeSformer": "ats.models.timesformer:timesformer_from_cfg",
    "MViT": "ats.models.mvit:mvit_from_cfg",
    "CvT": "ats.models.cvt:cvt_from_cfg",
    "PSViT": "ats.models.psvit:psvit_from_cfg",
    "timm/<name>": "ats.plugin.timm.backbone:timm_from_cfg",
}


def has_layouts(name: str) -> bool:
    """Whether the network MODEL.NAME `name` has all of ATS.LAYOUT, not packed alone."""
    return name == "ViT" or name.startswith(TIMM)


def builder(name: str) -> Callable[[CfgNode], nn.Module]:
    """What builds MODEL.NAME `name`.

    Raises:
        UserError: unknown MODEL.NAME.
    """
    found = MODELS.get("timm/<name>" if name.startswith(TIMM) else name)
    if found is None:
        raise UserError(f"MODEL.NAME {name}: choose from {', '.join(MODELS)}.{suggest(name, MODELS)}")
    if isinstance(found, str):
        module, function = found.split(":")
        return getattr(import_module(module), function)
    return found


def build_model(cfg: CfgNode) -> nn.Module:
    """The network described by `cfg`, on the CPU, with freshly initialised weights.

    Keys that are set for another network or sampler are named in a warning.

    Raises:
        UserError: unknown MODEL.NAME, or keys that do not fit together.
    """
    build = builder(cfg.MODEL.NAME)
    if cfg.ATS.ENABLE and cfg.ATS.LAYOUT != "packed" and not has_layouts(cfg.MODEL.NAME):
        raise UserError(f"ATS.LAYOUT {cfg.ATS.LAYOUT}: MODEL.NAME {cfg.MODEL.NAME} has the layout packed only.")
    if cfg.ATS.ENABLE and cfg.ATS.SAMPLER in REDUCERS and cfg.MODEL.NAME in MODELS and cfg.MODEL.NAME != "ViT":
        raise UserError(
            f"ATS.SAMPLER {cfg.ATS.SAMPLER}: not for MODEL.NAME {cfg.MODEL.NAME}, only for ViT and timm/<name>. "
            f"For it choose from {', '.join(SAMPLERS)}."
        )
    model = build(cfg)
    warn_of_unread_keys(cfg)
    if cfg.MODEL.ACT_CHECKPOINT:
        set_grad_checkpointing(model)
    return model
