"""A network with ATS against the dense one with the same weights, sample by sample."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ats.config import CfgNode
from ats.datasets.build import mean_std
from ats.engine.device import select_device
from ats.engine.evaluate import build_trained, check_weights
from ats.errors import UserError
from ats.flops import gflops
from ats.models import build_model
from ats.visualize.grids import BlockView, look
from ats.visualize.pictures import as_pictures


class Guess(NamedTuple):
    """The class a network gives the highest probability, and that probability."""

    label: int
    confidence: float


@dataclass
class SampleView:
    """What two networks made of one sample."""

    picture: Tensor  # [3, T, H, W] in 0..1, T = 1 for images
    dense: Guess
    ats: Guess
    gflops: float  # of the network with ATS
    dense_gflops: float
    blocks: list[BlockView]  # one per ATS block


class Networks:
    """The network of a config and its dense twin (ATS.ENABLE False) with the same weights, in evaluation mode.

    Raises:
        UserError: ATS is off, there are no weights, or they do not fit.
    """

    def __init__(self, cfg: CfgNode) -> None:
        if not cfg.ATS.ENABLE:
            raise UserError("ATS.ENABLE is False: there are no tokens to drop. Add ATS.ENABLE True.")
        weights = cfg.TEST.CHECKPOINT_FILE_PATH
        hint = " (or, for a model of timm, TIMM.PRETRAINED True)"
        check_weights(cfg, weights, why="what untrained weights keep means nothing", hint=hint)
        self.device = select_device(cfg.DEVICE)
        self.ats = build_trained(cfg, weights).to(self.device).eval()
        without = cfg.clone()
        without.defrost()
        without.merge_from_list(["ATS.ENABLE", False, "TIMM.PRETRAINED", False])
        self.dense = build_model(without).to(self.device).eval()
        self.dense.load_state_dict(self.ats.state_dict())
        self.mean_std = mean_std(cfg)

    @torch.inference_mode()
    def compare(self, x: Tensor) -> list[SampleView]:
        """Views of a batch of images [B, 3, H, W] or clips [B, 3, T, H, W], normalised as by the data sets."""
        x = x.to(self.device)
        logits, trace, views = look(self.ats, x)
        cost = gflops(self.ats, trace, x.shape)
        dense = guesses(self.dense, self.dense.forward_tokens(x)[0])
        rows = zip(as_pictures(x, *self.mean_std), dense, guesses(self.ats, logits), cost.as_run.tolist(), strict=True)
        return [SampleView(*row, cost.dense, [view.sample(index) for view in views]) for index, row in enumerate(rows)]


def guesses(model: nn.Module, logits: Tensor) -> list[Guess]:
    """A guess for each row of `logits` [B, C]."""
    probability = (logits if model.gives_probabilities else logits.float().softmax(dim=1)).cpu()
    confidence, label = probability.max(dim=1)
    return [Guess(*pair) for pair in zip(label.tolist(), confidence.tolist(), strict=True)]
