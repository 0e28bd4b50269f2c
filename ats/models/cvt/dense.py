"""The block of CvT on dense tokens: queries, keys and values are convolved on the token grid before they are projected.

Names, shapes and numbers are those of microsoft/CvT (`lib/models/cls_cvt.py`), so its checkpoints load as they are. Wu
et al., "CvT: Introducing Convolutions to Vision Transformers", ICCV 2021.

Shapes: B images, N = P + grid tokens, P = 1 in a stage with CLS, else 0, C channels, a grid (H, W), row major; keys and
    values lie on a coarser grid (h, w).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, QuickGELU
from torch import Tensor, nn

NORM_EPS = 1e-5


@dataclass(frozen=True)
class StageSpec:
    """One stage of the network; the names are those of the CVT keys."""

    patch_size: int
    patch_stride: int
    patch_padding: int
    dim: int
    num_heads: int
    depth: int
    mlp_ratio: float
    attn_drop_rate: float
    drop_rate: float
    drop_path_rate: float
    qkv_bias: bool
    cls_token: bool
    method: str
    kernel_qkv: int
    padding_kv: int
    stride_kv: int
    padding_q: int
    stride_q: int


class ConvProjection(nn.Module):
    """What precedes a linear projection: a depthwise convolution with batch norm ("dw_bn"), or an average ("avg")."""

    def __init__(self, dim: int, method: str, *, kernel: int, stride: int, padding: int) -> None:
        super().__init__()
        self.stride = stride
        if method == "avg":
            self.avg = nn.AvgPool2d(kernel, stride=stride, padding=padding, ceil_mode=True)
        else:
            self.conv = nn.Conv2d(dim, dim, kernel, stride=stride, padding=padding, groups=dim, bias=False)
            self.bn = nn.BatchNorm2d(dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, C, h, w]."""
        if not hasattr(self, "conv"):
            return self.avg(x)
        x = self.conv(x)
        if x.device.type == "cpu":
            # As rows of tokens, which it is already but for a batch of one. There torch's CPU batch norm (2.15) has a
            # wrong backward if x is not and its gradient is a slice of tokens behind CLS.
            x = x.contiguous(memory_format=torch.channels_last)
        return self.bn(x)


class ConvAttention(nn.Module):
    """Attention with convolutional projections. CLS is not on the grid: it goes to the linear projections directly.

    The logits are divided by the root of the whole width, not of a head's, as in the reference.

    Attributes:
        conv_proj_q, conv_proj_k, conv_proj_v: None where the projection is only linear.
    """

    def __init__(self, spec: StageSpec) -> None:
        super().__init__()
        dim = spec.dim
        self.num_heads, self.scale = spec.num_heads, dim**-0.5
        sizes = {"q": (spec.stride_q, spec.padding_q)} | dict.fromkeys("kv", (spec.stride_kv, spec.padding_kv))
        for name, (stride, padding) in sizes.items():
            is_linear = spec.method == "linear" or (spec.method == "avg" and name == "q")
            options = {"kernel": spec.kernel_qkv, "stride": stride, "padding": padding}
            setattr(self, f"conv_proj_{name}", None if is_linear else ConvProjection(dim, spec.method, **options))
        self.proj_q = nn.Linear(dim, dim, bias=spec.qkv_bias)
        self.proj_k = nn.Linear(dim, dim, bias=spec.qkv_bias)
        self.proj_v = nn.Linear(dim, dim, bias=spec.qkv_bias)
        self.attn_drop = nn.Dropout(spec.attn_drop_rate)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(spec.drop_rate)

    def forward(self, x: Tensor, grid: tuple[int, int], num_prefix_tokens: int) -> Tensor:
        """Normalised tokens [B, N, C] on `grid` -> [B, N, C]."""
        prefix, patches = x[:, :num_prefix_tokens], x[:, num_prefix_tokens:]
        volume = patches.transpose(1, 2).unflatten(2, grid)
        heads = []
        for name in "qkv":
            conv, linear = getattr(self, f"conv_proj_{name}"), getattr(self, f"proj_{name}")
            rows = patches if conv is None else conv(volume).flatten(2).transpose(1, 2)
            projected = linear(torch.cat([prefix, rows], dim=1))
            heads.append(projected.unflatten(-1, (self.num_heads, -1)).transpose(1, 2))
        dropout_p = self.attn_drop.p if self.training else 0.0
        out = F.scaled_dot_product_attention(*heads, dropout_p=dropout_p, scale=self.scale)
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))


class ConvBlock(nn.Module):
    """Pre-norm block with convolutional projections and an MLP with QuickGELU."""

    def __init__(self, spec: StageSpec, *, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        self.spec = spec
        self.norm1 = nn.LayerNorm(spec.dim, eps=NORM_EPS)
        self.attn = ConvAttention(spec)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(spec.dim, eps=NORM_EPS)
        self.mlp = Mlp(spec.dim, int(spec.dim * spec.mlp_ratio), act_layer=QuickGELU, drop=spec.drop_rate)

    def forward(self, x: Tensor, grid: tuple[int, int], num_prefix_tokens: int) -> Tensor:
        """[B, N, C] on `grid` -> [B, N, C]."""
        x = x + self.drop_path(self.attn(self.norm1(x), grid, num_prefix_tokens))
        return x + self.drop_path(self.mlp(self.norm2(x)))
