"""A network with ATS beside the dense one with the same weights, sample by sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ats.checkpoint import load_weights
from ats.config import CfgNode
from ats.datasets.build import mean_std
from ats.engine.device import select_device
from ats.errors import UserError
from ats.flops import gflops
from ats.models import build_model
from ats.models.xvit import XViT
from ats.visualize.grids import BlockView, look


class Guess(NamedTuple):
    """The class a network gives the highest probability, and that probability."""

    label: int
    confidence: float


@dataclass
class SampleView:
    """What two networks made of one sample.

    Attributes:
        picture: [3, T, H, W] in 0..1, T = 1 for images.
        dense, ats: their guesses.
        gflops: of the network with ATS; dense_gflops: of the dense one.
        blocks: views of the ATS blocks.
    """

    picture: Tensor
    dense: Guess
    ats: Guess
    gflops: float
    dense_gflops: float
    blocks: list[BlockView]


class Networks:
    """The network of a configuration, and the same with ATS.ENABLE False, with its weights, in eval mode.

    Raises:
        UserError: ATS is off, there are no weights, or they do not fit.
    """

    def __init__(self, cfg: CfgNode) -> None:
        if not cfg.ATS.ENABLE:
            raise UserError("ATS.ENABLE is False: there are no tokens to drop. Add ATS.ENABLE True ATS.BLOCKS [3,4,5].")
        if not cfg.ATS.BLOCKS:
            raise UserError("ATS.BLOCKS is empty: no block drops tokens. Add for example ATS.BLOCKS [3,4,5].")
        weights = cfg.TEST.CHECKPOINT_FILE_PATH
        if not weights and not (cfg.MODEL.NAME.startswith("timm/") and cfg.TIMM.PRETRAINED):
            raise UserError(
                "TEST.CHECKPOINT_FILE_PATH is empty: what untrained weights keep means nothing. "
                "Type TEST.CHECKPOINT_FILE_PATH FILE (or, for a model of timm, TIMM.PRETRAINED True)."
            )
        self.device = select_device(cfg.DEVICE)
        self.ats = build_model(cfg)
        if weights:
            load_weights(self.ats, weights)
        without = cfg.clone()
        without.defrost()
        without.merge_from_list(["ATS.ENABLE", False, "TIMM.PRETRAINED", False])
        self.dense = build_model(without)
        self.dense.load_state_dict(self.ats.state_dict())
        self.ats.to(self.device).eval()
        self.dense.to(self.device).eval()
        mean, std = mean_std(cfg)
        self.mean, self.std = torch.tensor(mean), torch.tensor(std)

    @torch.inference_mode()
    def compare(self, x: Tensor) -> list[SampleView]:
        """Views of a batch of images [B, 3, H, W] or clips [B, 3, T, H, W], normalised as the data sets do it."""
        x = x.to(self.device)
        logits, trace, views = look(self.ats, x)
        cost = gflops(self.ats, trace, x.shape)
        dense = guesses(self.dense, self.dense.forward_tokens(x)[0])
        pictures = self.pictures(x)
        return [
            SampleView(
                picture=pictures[i],
                dense=dense[i],
                ats=guess,
                gflops=cost.as_run[i].item(),
                dense_gflops=cost.dense,
                blocks=[view.sample(i) for view in views],
            )
            for i, guess in enumerate(guesses(self.ats, logits))
        ]

    def pictures(self, x: Tensor) -> Tensor:
        """Network inputs as pictures [B, 3, T, H, W] in 0..1."""
        x = x.cpu()
        x = x[:, :, None] if x.ndim == 4 else x
        return (x * self.std[:, None, None, None] + self.mean[:, None, None, None]).clamp(0, 1)


def guesses(model: nn.Module, logits: Tensor) -> list[Guess]:
    """A guess for each row of `logits` [B, C]."""
    is_probability = isinstance(model, XViT) and model.consensus is None and not model.before_softmax
    probability = (logits if is_probability else logits.float().softmax(dim=1)).cpu()
    confidence, label = probability.max(dim=1)
    return [Guess(*pair) for pair in zip(label.tolist(), confidence.tolist(), strict=True)]


def class_label(names: Sequence[str], label: int) -> str:
    """The name of a class, or its number where there is none."""
    return names[label] if label < len(names) else f"class {label}"
