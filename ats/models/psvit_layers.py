"""What PS-ViT has besides transformer blocks: the bottlenecks of its stem, and features sampled at points that move.

Names, shapes and numbers are those of yuexy/PS-ViT (`models/ps_vit.py`, `layers/progressive_sample.py`).

Shapes: B images, P points, C channels; points are (y, x) in pixels of a feature map [H, W], whole numbers are pixel
centres.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ats.errors import UserError, suggest


def float32_or_better(device: torch.device) -> AbstractContextManager:
    """Within it autocast is off; devices that know no autocast (meta) need nothing."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


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
    """One iteration: features at the points, a transformer block on them, and where the points move next.

    Args:
        block: the transformer block.
        gamma: factor on the offsets for sampling. Only there: the points themselves move by the whole offset.
        predicts: whether another iteration follows.
        point_gradient: one of POINT_GRADIENTS.

    Raises:
        UserError: a `point_gradient` that does not exist.
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
        """The next tokens [B, P, C], offsets [B, P, 2] (of the last iteration None) and points [B, P, 2].

        Points and offsets are float32 or better, also under autocast: bfloat16 rounds them to a quarter of a pixel.
        No gradient goes from the positions, and from one iteration's points to the next, back into the offsets.

        Args:
            features: [B, C, H, W].
            points, offsets: where to sample is points + gamma * offsets, [B, P, 2].
            previous: [B, P, C] tokens of the iteration before.
            pos_layer: from points over `feature_size` to the width of the tokens.
        """
        moved = points
        if offsets is not None:
            moved, points = points + self.gamma * offsets, points + offsets.detach()
        x = POINT_GRADIENTS[self.point_gradient](features.to(moved.dtype), moved)
        with float32_or_better(x.device):
            x = x + pos_layer(points / feature_size)
        x = x if previous is None else x + previous
        x = self.transformer_layer(x)
        if self.offset_layer is None:
            return x, None, points
        with float32_or_better(x.device):
            return x, self.offset_layer(x.to(points.dtype)), points


def sample_at(features: Tensor, points: Tensor) -> Tensor:
    """Bilinear values of features [B, C, H, W] at points [B, P, 2]; zeros beyond the border. [B, P, C]."""
    height, width = features.shape[2:]
    y, x = points.unbind(-1)
    grid = torch.stack([2 * x / (width - 1) - 1, 2 * y / (height - 1) - 1], dim=-1)  # grid_sample wants -1..1
    sampled = F.grid_sample(features, grid[:, :, None], align_corners=True)
    return sampled.squeeze(3).transpose(1, 2)


class ReleasedGradient(torch.autograd.Function):
    """`sample_at` with the backward pass of the release's CUDA kernel (`layers/cinclude/cuda_helper.hpp` there).

    Inside the border this is the gradient. A point less than a pixel beyond it is treated as if it were on the border,
    where values do not fade to zero: its pixels get their shares at the nearest place of the border, and what moves it
    is the slope of these pixels, extrapolated beyond the upper and left border and 0 beyond the lower and right one.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, features: Tensor, points: Tensor) -> Tensor:
        """[B, C, H, W], [B, P, 2] -> [B, P, C], of one dtype."""
        ctx.save_for_backward(features, points)
        return sample_at(features, points)

    @staticmethod
    @once_differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        """For the gradient [B, P, C] of the values, those of features and points."""
        features, points = ctx.saved_tensors
        last = torch.tensor(features.shape[2:], dtype=points.dtype, device=points.device) - 1
        reached = ((points > -1) & (points < last + 1)).all(dim=2, keepdim=True)
        points, grad = points.where(reached, 0), grad.where(reached, 0).transpose(1, 2)
        on_border = points.clamp(min=0).minimum(last)
        low = on_border.floor()
        pixel = (low, (low + 1).minimum(last))  # beyond the lower and right border both are the last one
        share = (1 - (on_border - low), on_border - low)
        distance = (pixel[1] - points, points - low)  # of the point where it is: may be negative
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


# The sampling with one or the other backward pass: features [B, C, H, W], points [B, P, 2] of one dtype -> [B, P, C].
POINT_GRADIENTS = {"released": ReleasedGradient.apply, "grid_sample": sample_at}
