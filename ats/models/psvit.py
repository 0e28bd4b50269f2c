"""PS-ViT (vision transformer with progressive sampling), with adaptive token sampling in its transformer layers.

Names, shapes and numbers are yuexy/PS-ViT's (`models/ps_vit.py`, `layers/progressive_sample.py`). Yue et al.,
"Vision Transformer with Progressive Sampling", ICCV 2021. Tokens are features sampled at points of a convolutional
feature map. The first NUM_ITERS blocks move the points by offsets that the previous block predicts. The other blocks
are a ViT with a CLS token, where ATS works as in ViT (`block.py`).

Block indices run through the network: with 4 iterations, blocks 0 to 3 move the points and later ones can sample.

Trace: `patches` are indices of points. Point x * rows + y starts in column x and row y of the grid (y fastest, unlike
row major), in the centre of its part of the feature map.

Shapes: B images, P points, N = 1 + P tokens, C channels; points are (y, x) in pixels of the feature map [H, W], whole
numbers are pixel centres.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ats.errors import UserError, suggest
from ats.models.backbone import Backbone, Records, init_linears, reductions_from_cfg, settings, trunc_normal_02_
from ats.models.cost import BlockGrid, conv_multiply_adds, linear_multiply_adds
from ats.models.vit import vit_blocks
from ats.reduction import Reduction
from ats.tokens import LAYOUTS, KeptTokens

logger = logging.getLogger(__name__)

STRIDE = 4  # pixels of the image to a pixel of the feature map


def float32_or_better(device: torch.device) -> AbstractContextManager:
    """A context without autocast; devices without autocast (meta) need none."""
    has_autocast = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if has_autocast else nullcontext()


class Bottleneck(nn.Module):
    """A residual block of ResNet: 1 x 1, 3 x 3 and 1 x 1 convolutions with batch norm."""

    def __init__(self, dim_in: int, dim: int, dim_out: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(dim_in, dim, 1, bias=False), nn.BatchNorm2d(dim)
        self.conv2, self.bn2 = nn.Conv2d(dim, dim, 3, padding=1, bias=False), nn.BatchNorm2d(dim)
        self.conv3, self.bn3 = nn.Conv2d(dim, dim_out, 1, bias=False), nn.BatchNorm2d(dim_out)
        self.downsample = None
        if dim_in != dim_out:
            self.downsample = nn.Sequential(nn.Conv2d(dim_in, dim_out, 1, bias=False), nn.BatchNorm2d(dim_out))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C_in, H, W] -> [B, C_out, H, W]."""
        skip = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return F.relu(self.bn3(self.conv3(x)) + skip)


class SamplingLayer(nn.Module):
    """One iteration: sample features at the points, run a transformer block, predict offsets of the points.

    Args:
        block: the transformer block.
        gamma: factor on the offsets, for sampling only: the points themselves move by the whole offset.
        predicts: whether another iteration follows.
        point_gradient: a name in POINT_GRADIENTS; raises a UserError for any other.
    """

    def __init__(
        self, block: nn.Module, dim: int, *, gamma: float, predicts: bool, point_gradient: str = "released"
    ) -> None:
        super().__init__()
        if point_gradient not in POINT_GRADIENTS:
            near = suggest(point_gradient, POINT_GRADIENTS)
            raise UserError(f"PSVIT.POINT_GRADIENT {point_gradient}: choose from {', '.join(POINT_GRADIENTS)}.{near}")
        self.gamma, self.point_gradient = gamma, point_gradient
        self.transformer_layer = block
        self.offset_layer = nn.Linear(dim, 2) if predicts else None

    def forward(
        self,
        features: Tensor,
        points: Tensor,
        offsets: Tensor | None,
        previous: Tensor | None,
        pos_layer: nn.Linear,
        feature_size: float,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """The next tokens [B, P, C], offsets [B, P, 2] (None in the last iteration) and points [B, P, 2].

        Points and offsets are float32 or better, even under autocast or with bfloat16 weights: bfloat16 would round
        them to a quarter of a pixel. Offsets get no gradient from the positions or from the next iteration's points.

        Args:
            features: [B, C, H, W].
            points, offsets: [B, P, 2]; it samples at points + gamma * offsets.
            previous: [B, P, C] tokens of the previous iteration.
            pos_layer: projects points / feature_size to the width of the tokens.
        """
        moved = points
        if offsets is not None:
            moved, points = points + self.gamma * offsets, points + offsets.detach()
        x = POINT_GRADIENTS[self.point_gradient](features.to(moved.dtype), moved)
        with float32_or_better(x.device):
            x = (x + linear(pos_layer, points / feature_size)).to(pos_layer.weight.dtype)
        x = x if previous is None else x + previous
        x = self.transformer_layer(x)
        if self.offset_layer is None:
            return x, None, points
        with float32_or_better(x.device):
            return x, linear(self.offset_layer, x.to(points.dtype)), points


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer in the dtype of its input, which may be more precise than its weights."""
    return F.linear(x, layer.weight.to(x.dtype), layer.bias.to(x.dtype))


def sample_at(features: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of features [B, C, H, W] at points [B, P, 2]; zeros beyond the border. [B, P, C]."""
    height, width = features.shape[2:]
    y, x = points.unbind(-1)
    grid = torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], dim=-1)  # grid_sample wants -1..1
    sampled = F.grid_sample(features, grid[:, :, None], align_corners=True)
    return sampled.squeeze(3).transpose(1, 2)


class ReleasedGradient(torch.autograd.Function):
    """`sample_at` with the backward pass of the release's CUDA kernel (`layers/cinclude/cuda_helper.hpp` there).

    Inside the border this is the exact gradient. A point less than a pixel outside is treated as if it were on the
    border, where values do not fade to zero: its pixels get their shares at the nearest border position. Its own
    gradient is the slope of these pixels, extrapolated beyond the upper and left border, 0 beyond the lower and right.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, points: Tensor) -> Tensor:
        """[B, C, H, W], [B, P, 2] -> [B, P, C], of one dtype."""
        ctx.save_for_backward(features, points)
        return sample_at(features, points)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the values [B, P, C] -> the gradients of features and points."""
        features, points = ctx.saved_tensors
        last = torch.tensor(features.shape[2:], dtype=points.dtype, device=points.device) - 1
        reached = ((points > -1) & (points < last + 1)).all(dim=2, keepdim=True)
        points, grad = points.where(reached, 0), grad.where(reached, 0).transpose(1, 2)
        on_border = points.clamp(min=0).minimum(last)
        low = on_border.floor()
        pixel = (low, (low + 1).minimum(last))  # beyond the lower and right border, both are the last pixel
        share = (1 - (on_border - low), on_border - low)
        distance = (pixel[1] - points, points - low)  # of the actual point: may be negative
        flat, grad_points = features.flatten(2), torch.zeros_like(points)
        grad_flat = torch.zeros_like(flat)
        for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
            index = pixel[y][..., 0].long() * features.shape[3] + pixel[x][..., 1].long()
            index = index[:, None].expand(grad.shape)
            grad_flat.scatter_add_(2, index, grad * (share[y][..., 0] * share[x][..., 1])[:, None])
            slope = (flat.gather(2, index) * grad).sum(dim=1)
            grad_points[..., 0] += (2 * y - 1) * slope * distance[x][..., 1]
            grad_points[..., 1] += (2 * x - 1) * slope * distance[y][..., 0]
        return grad_flat.view_as(features), grad_points


# Sampling by its backward pass: features [B, C, H, W], points [B, P, 2] of the same dtype -> [B, P, C].
POINT_GRADIENTS = {"released": ReleasedGradient.apply, "grid_sample": sample_at}


class PSViT(Backbone):
    """PS-ViT.

    Args:
        img_size: side of the images, which fixes the points.
        num_points: points along height and width.
        num_iters: blocks that move the points; `depth` counts them.
        stem_dims: widths of the first convolution, inside the bottlenecks, and of the first bottleneck's output.
        offset_gamma, point_gradient: see SamplingLayer.
        blocks: other arguments of `vit_blocks`.
    """

    layouts = LAYOUTS
    num_prefix_tokens = 1
    layer_patterns: ClassVar[dict] = {
        "stem": r"^stem|pos_layer",
        "ps_layers": r"^ps_layers\.(\d+)",
        "trans_layers": [(r"^trans_layers\.(\d+)", None), (r"^cls_token", (0,)), (r"^norm", (99999,))],
    }

    def __init__(
        self,
        *,
        img_size: int = 224,
        num_points: Sequence[int] = (14, 14),
        num_classes: int = 1000,
        num_iters: int = 4,
        stem_dims: Sequence[int] = (64, 64, 256),
        offset_gamma: float = 1.0,
        point_gradient: str = "released",
        depth: int = 14,
        embed_dim: int = 384,
        head_drop_rate: float = 0.0,
        reductions: dict[int, Reduction] | None = None,
        **blocks: Any,
    ) -> None:
        super().__init__()
        self.num_classes, self.img_size, self.num_points = num_classes, img_size, tuple(num_points)
        self.num_iters, self.feature_size = num_iters, img_size // STRIDE
        self.register_buffer("point_coord", self.first_points())
        self.pos_layer = nn.Linear(2, embed_dim)
        first, inner, middle = stem_dims
        self.stem = nn.Sequential(
            nn.Conv2d(3, first, 7, stride=2, padding=3, bias=False),
            nn.BatchNorm2d(first),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2, padding=1),
            Bottleneck(first, inner, middle),
            Bottleneck(middle, inner, embed_dim),
        )
        layers = vit_blocks(depth, embed_dim, **blocks)
        options = {"gamma": offset_gamma, "point_gradient": point_gradient}
        self.ps_layers = nn.ModuleList(
            SamplingLayer(block, embed_dim, predicts=index < num_iters - 1, **options)
            for index, block in enumerate(layers[:num_iters])
        )
        self.trans_layers = nn.ModuleList(layers[num_iters:])
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.norm = nn.LayerNorm(embed_dim)
        self.head_drop = nn.Dropout(head_drop_rate)
        self.head = nn.Linear(embed_dim, num_classes)
        self.init_weights()
        if reductions and min(reductions) < num_iters:
            raise UserError(
                f"ATS.BLOCKS {sorted(reductions)}: blocks 0 to {num_iters - 1} of PS-ViT move the points, without CLS. "
                f"Blocks that can sample: {num_iters} to {depth - 1}."
            )
        self.reduce_blocks(reductions, blocks=self.trans_layers, first_index=num_iters)

    def first_points(self) -> Tensor:
        """The initial points [1, P, 2]: centres of equal parts of the feature map, y fastest."""
        y, x = (torch.arange(n) * (self.feature_size / n) + self.feature_size / n / 2 for n in self.num_points)
        return torch.stack([y.repeat(len(x)), x.repeat_interleave(len(y))], dim=1)[None]

    def init_weights(self) -> None:
        """Fresh weights as in the reference: truncated normal of standard deviation 0.02; points that do not move."""
        trunc_normal_02_(self.cls_token)
        init_linears(self)
        for layer in self.ps_layers:
            if layer.offset_layer is not None:
                nn.init.zeros_(layer.offset_layer.weight)

    def run(self, x: Tensor) -> tuple[Tensor, Records]:
        x = self.embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        tokens = self.run_blocks(x, blocks=self.trans_layers)
        return self.head(self.head_drop(self.norm(tokens.prefix()[:, 0]))), tokens.trace

    def embed(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] -> the tokens after the last iteration [B, P, C]; images must have the training size."""
        if x.ndim != 4 or x.shape[1:] != (3, self.img_size, self.img_size):
            raise UserError(
                f"This PS-ViT takes images [B, 3, {self.img_size}, {self.img_size}], not {list(x.shape)}: its "
                "points are fixed by DATA.TRAIN_CROP_SIZE."
            )
        features = self.stem(x)
        points = self.point_coord.to(torch.promote_types(x.dtype, torch.float32))
        points, offsets, tokens = points.expand(x.shape[0], -1, -1), None, None
        for layer in self.ps_layers:
            tokens, offsets, points = layer(features, points, offsets, tokens, self.pos_layer, self.feature_size)
        self.points = points.detach()
        return tokens

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of the release for this model. The release stores the shared `pos_layer` with every iteration, and
        the initial points, which depend on the image size.
        """
        state = dict(state)
        for key in [key for key in state if ".position_layer." in key]:
            shared = state.get(f"pos_layer.{key.rsplit('.', 1)[1]}")
            if shared is not None and torch.equal(state[key], shared):
                del state[key]  # a position layer that differs is reported as an unexpected key
        points, own = state.get("point_coord"), self.first_points()
        if points is not None and points.shape == own.shape and not torch.allclose(points.float(), own, atol=1e-3):
            logger.info("point_coord is of another image size: using the points for %d pixels.", self.img_size)
            state["point_coord"] = own
        return state

    def block_list(self) -> list[nn.Module]:
        return [*(layer.transformer_layer for layer in self.ps_layers), *self.trans_layers]

    def block_grids(self, input_shape: Sequence[int]) -> list[BlockGrid]:
        line = BlockGrid.of(1, 1, self.num_points[0] * self.num_points[1])  # the points' order has no spatial meaning
        return [line] * (len(self.ps_layers) + len(self.trans_layers))

    def token_places(self, input_shape: Sequence[int]) -> Tensor:
        return self.points / self.feature_size

    def prefix_of(self, index: int) -> int:
        return 0 if index < self.num_iters else 1

    def block_multiply_adds(
        self, trace: Sequence[KeptTokens], input_shape: Sequence[int], *, paper: bool
    ) -> list[Tensor]:
        """Of each block, [B] float64; PS layers with the layers of positions and offsets, without bilinear sampling."""
        costs, num_points = super().block_multiply_adds(trace, input_shape, paper=paper), math.prod(self.num_points)
        for index, layer in enumerate(self.ps_layers):
            linears = [self.pos_layer] + [layer.offset_layer] * (layer.offset_layer is not None)
            costs[index] = costs[index] + sum(linear_multiply_adds(linear, num_points) for linear in linears)
        return costs

    def stem_multiply_adds(self, trace: Sequence[KeptTokens], input_shape: Sequence[int]) -> float:
        halves = [-(-side // 2) for side in input_shape[2:]]  # the first convolution and the pooling halve, rounding up
        quarters = [-(-side // 2) for side in halves]
        convs = [module for module in self.stem[1:].modules() if isinstance(module, nn.Conv2d)]
        cost = conv_multiply_adds(self.stem[0], math.prod(halves)) + linear_multiply_adds(self.head)
        return cost + sum(conv_multiply_adds(conv, math.prod(quarters)) for conv in convs)


def psvit_from_cfg(cfg: CfgNode) -> PSViT:
    """MODEL.NAME PSViT, described by the PSVIT and ATS keys and DATA.TRAIN_CROP_SIZE."""
    psvit = cfg.PSVIT
    if not 1 <= psvit.NUM_ITERS <= psvit.DEPTH:
        raise UserError(f"PSVIT.NUM_ITERS {psvit.NUM_ITERS}: give 1 to PSVIT.DEPTH, {psvit.DEPTH}.")
    if psvit.EMBED_DIM % psvit.NUM_HEADS:
        raise UserError(f"PSVIT.EMBED_DIM {psvit.EMBED_DIM} is not a multiple of PSVIT.NUM_HEADS {psvit.NUM_HEADS}.")
    return PSViT(
        img_size=cfg.DATA.TRAIN_CROP_SIZE,
        num_classes=cfg.MODEL.NUM_CLASSES,
        head_drop_rate=cfg.MODEL.DROPOUT_RATE,
        reductions=reductions_from_cfg(
            cfg, depth=psvit.DEPTH, num_prefix_tokens=1, can_sample=range(psvit.NUM_ITERS, psvit.DEPTH)
        ),
        **settings(psvit),
    )
