"""`build_model(cfg)`: the network that MODEL.NAME names.

To add a backbone, write `models/<name>.py` with a `<name>_from_cfg(cfg)` and register it in MODELS. A model has
`forward(x)` (logits), `forward_tokens(x)` (logits and the trace of kept tokens) and `multiply_adds(trace, input_shape,
paper=...)`.
"""

from __future__ import annotations

from collections.abc import Callable

from fvcore.common.config import CfgNode
from torch import nn

from ats.config.unread import warn_of_unread_keys
from ats.errors import UserError, suggest
from ats.models.cvt import CvT, cvt_from_cfg
from ats.models.mvit import MViT, mvit_from_cfg
from ats.models.psvit import PSViT, psvit_from_cfg
from ats.models.recompute import set_grad_checkpointing
from ats.models.timesformer import TimeSformer, timesformer_from_cfg
from ats.models.timm_config import PREFIX, timm_from_cfg
from ats.models.vit import VisionTransformer, vit_from_cfg
from ats.models.xvit import XViT, xvit_from_cfg
from ats.sampling import REDUCERS, SAMPLERS

__all__ = [
    "MODELS",
    "CvT",
    "MViT",
    "PSViT",
    "TimeSformer",
    "VisionTransformer",
    "XViT",
    "build_model",
    "has_layouts",
    "num_blocks",
]

MODELS: dict[str, Callable[[CfgNode], nn.Module]] = {
    "ViT": vit_from_cfg,
    "XViT": xvit_from_cfg,
    "TimeSformer": timesformer_from_cfg,
    "MViT": mvit_from_cfg,
    "CvT": cvt_from_cfg,
    "PSViT": psvit_from_cfg,
}


def has_layouts(name: str) -> bool:
    """Whether the network MODEL.NAME `name` has all of ATS.LAYOUT, not packed alone."""
    return name == "ViT" or name.startswith(PREFIX)


def build_model(cfg: CfgNode) -> nn.Module:
    """The network described by `cfg`, on the CPU, with freshly initialised weights.

    Keys that are set for another network or sampler are named in a warning.

    Raises:
        UserError: unknown MODEL.NAME, or keys that do not fit together.
    """
    if cfg.ATS.ENABLE and cfg.ATS.LAYOUT != "packed" and not has_layouts(cfg.MODEL.NAME):
        raise UserError(f"ATS.LAYOUT {cfg.ATS.LAYOUT}: MODEL.NAME {cfg.MODEL.NAME} has the layout packed only.")
    if cfg.ATS.ENABLE and cfg.ATS.SAMPLER in REDUCERS and cfg.MODEL.NAME in MODELS and cfg.MODEL.NAME != "ViT":
        raise UserError(
            f"ATS.SAMPLER {cfg.ATS.SAMPLER}: not for MODEL.NAME {cfg.MODEL.NAME}, only for ViT and {PREFIX}<name>. "
            f"For it choose from {', '.join(SAMPLERS)}."
        )
    if cfg.MODEL.NAME not in MODELS and not cfg.MODEL.NAME.startswith(PREFIX):
        options = [*MODELS, f"{PREFIX}<name>"]
        raise UserError(
            f"MODEL.NAME {cfg.MODEL.NAME}: choose from {', '.join(options)}.{suggest(cfg.MODEL.NAME, MODELS)}"
        )
    model = (timm_from_cfg if cfg.MODEL.NAME.startswith(PREFIX) else MODELS[cfg.MODEL.NAME])(cfg)
    warn_of_unread_keys(cfg)
    if cfg.MODEL.ACT_CHECKPOINT:
        set_grad_checkpointing(model)
    return model


def num_blocks(model: nn.Module) -> int:
    """Blocks of a network of this package, as ATS.BLOCKS counts them."""
    if isinstance(model, CvT):
        return sum(len(stage.blocks) for stage in model.stages)
    if isinstance(model, PSViT):
        return len(model.ps_layers) + len(model.trans_layers)
    return len((model.base_model if isinstance(model, XViT) else model).blocks)
