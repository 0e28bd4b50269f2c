"""The block of MViT v1 and v2 on dense tokens: attention whose queries, keys and values are pooled on the token grid.

Names, shapes and numbers are SlowFast's (`slowfast/models/attention.py`), so its checkpoints load unchanged. Fan et
al., "Multiscale Vision Transformers", ICCV 2021 (v1); Li et al., "MViTv2", CVPR 2022 (v2).

Shapes: B clips or images, N = P + grid tokens, P prefix tokens (1 with CLS, else 0), a grid (T, H, W) in (t h w) order,
    N_q and N_k tokens after the pooling of queries and of keys, H heads of width D, A = H * D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from ats.models.dense_grid import ONE, Grid, convolved_grid
from ats.models.weights import linear_part, refuse_stale

NORM_EPS = 1e-6


@dataclass(frozen=True)
class PoolSpec:
    """A pooling on the grid, padded by kernel // 2."""

    kernel: Grid
    stride: Grid

    @property
    def padding(self) -> Grid:
        return tuple(k // 2 for k in self.kernel)

    def grid(self, grid: Grid) -> Grid:
        """The output grid: the size over the stride, rounded up if the kernel is odd."""
        return convolved_grid(grid, self.kernel, self.stride, self.padding)

    def layer(self, mode: str, dim: int = 0) -> nn.Module:
        """The pooling by "max", "avg" or "conv", a depthwise convolution of `dim` channels."""
        if mode == "conv":
            return nn.Conv3d(dim, dim, self.kernel, self.stride, self.padding, groups=dim, bias=False)
        return (nn.MaxPool3d if mode == "max" else nn.AvgPool3d)(self.kernel, self.stride, self.padding)


@dataclass(frozen=True)
class BlockSpec:
    """One block. v1 changes the width in the MLP (dim_attn == dim_in), v2 in the attention (dim_attn == dim_out)."""

    dim_in: int
    dim_attn: int
    dim_out: int
    num_heads: int
    pool_q: PoolSpec | None  # None: no pooling and no norm
    pool_kv: PoolSpec | None
    skip: PoolSpec | None  # max pooling of the residual path; None if the queries keep the grid
    grid: Grid  # of the position tables, by floor division as in SlowFast

    def query_grid(self, grid: Grid) -> Grid:
        """The grid of the queries and the block's output, for an input `grid`."""
        return grid if self.pool_q is None else self.pool_q.grid(grid)

    def key_grid(self, grid: Grid) -> Grid:
        """The grid of keys and values: the cells that ATS scores."""
        return grid if self.pool_kv is None else self.pool_kv.grid(grid)

    @property
    def strides(self) -> tuple[Grid, Grid]:
        """Strides of the queries and of keys and values."""
        return tuple(ONE if pool is None else pool.stride for pool in (self.pool_q, self.pool_kv))

    def queries_per_cell(self, grid: Grid) -> Grid | None:
        """Queries that a key cell covers along each axis (the last cell may cover fewer), for an input `grid`; None if
        cells cut through queries.

        A cell covers as many tokens as the keys' stride, a query as many as its own stride. If one is a multiple of the
        other, they fit on a grid of any size. A single cell always covers all queries.
        """
        steps = []
        for step_q, step_k, num_q, num_k in zip(*self.strides, self.query_grid(grid), self.key_grid(grid), strict=True):
            if num_k > 1 and step_k % step_q:
                return None
            steps.append(num_q if num_k == 1 else step_k // step_q)
        return tuple(steps)


class MultiScaleAttention(nn.Module):
    """Attention from pooled queries to pooled keys and values.

    Args:
        mode: "conv" pools by a depthwise convolution, shared by the heads, and a LayerNorm over a head's width; "max"
            and "avg" have no weights and no norm.
        rel_pos_spatial, rel_pos_temporal: v2's decomposed relative positions.
        residual_pooling: add the pooled queries to the output (patches only), as v2 does.
    """

    def __init__(
        self,
        spec: BlockSpec,
        *,
        mode: str = "conv",
        qkv_bias: bool = True,
        rel_pos_spatial: bool = False,
        rel_pos_temporal: bool = False,
        residual_pooling: bool = False,
        drop_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.spec, self.num_heads = spec, spec.num_heads
        self.head_dim = spec.dim_attn // spec.num_heads
        self.scale = self.head_dim**-0.5
        self.residual_pooling = residual_pooling
        self.qkv = nn.Linear(spec.dim_in, 3 * spec.dim_attn, bias=qkv_bias)
        self.proj = nn.Linear(spec.dim_attn, spec.dim_attn)
        self.proj_drop = nn.Dropout(drop_rate)
        for name, pool in (("q", spec.pool_q), ("k", spec.pool_kv), ("v", spec.pool_kv)):
            setattr(self, f"pool_{name}", None if pool is None else pool.layer(mode, self.head_dim))
            has_norm = pool is not None and mode == "conv"
            setattr(self, f"norm_{name}", nn.LayerNorm(self.head_dim, eps=NORM_EPS) if has_norm else None)
        _, height, width = (max(n // stride[axis] for stride in spec.strides) for axis, n in enumerate(spec.grid))
        sizes = (spec.grid[0] * rel_pos_temporal, height * rel_pos_spatial, width * rel_pos_spatial)
        for name, size in zip("thw", sizes, strict=True):
            table = nn.Parameter(torch.zeros(2 * size - 1, self.head_dim)) if size else None
            self.register_parameter(f"rel_pos_{name}", table)

    @property
    def has_rel_pos(self) -> bool:
        return self.rel_pos_h is not None or self.rel_pos_t is not None

    def forward(self, x: Tensor, grid: Grid, num_prefix_tokens: int) -> Tensor:
        """Normalised tokens [B, N, C] on `grid` -> [B, N_q, A]."""
        parts = []
        for names in self.pooled_alike("qkv"):
            part = self.project(x, names)
            if self.pools(names):
                part = pool_grid(self.pools(names), part, grid, num_prefix_tokens)
            parts += self.normalised(names, part)
        q, k, v = parts
        bias = None
        if self.has_rel_pos:
            query_grid, key_grid = self.spec.query_grid(grid), self.spec.key_grid(grid)
            bias = self.position_bias(q[:, num_prefix_tokens:], query_grid, key_grid, num_prefix_tokens)
        q_, k_, v_ = (t.transpose(1, 2) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q_, k_, v_, attn_mask=bias, scale=self.scale).transpose(1, 2)
        if self.residual_pooling:
            out = out + F.pad(q[:, num_prefix_tokens:], (0, 0, 0, 0, num_prefix_tokens, 0))
        return self.proj_drop(self.proj(out.flatten(2)))

    def pooled_alike(self, names: str) -> list[str]:
        """`names` (qkv or kv) in groups with the same pooling, each projected and pooled at once."""
        if "q" not in names or self.spec.pool_q == self.spec.pool_kv:
            return [names]
        return ["q", names[1:]]

    def project(self, x: Tensor, names: str) -> Tensor:
        """Adjacent parts of the joint projection, `names` of q, k, v: [..., C] -> [..., len(names), H, D].

        A projection per group needs no copy; a slice of the joint one is not contiguous, as pooling requires.
        """
        if names == "qkv":
            x = self.qkv(x)
        else:
            start = "qkv".index(names) * self.spec.dim_attn
            part = slice(start, start + len(names) * self.spec.dim_attn)
            x = linear_part(self.qkv, x, part)
        return x.unflatten(-1, (len(names), self.num_heads, -1))

    def pools(self, names: str) -> list[nn.Module]:
        """The poolings of a group; empty without pooling."""
        pools = [getattr(self, f"pool_{name}") for name in names]
        return [] if pools[0] is None else pools

    def normalised(self, names: str, x: Tensor) -> list[Tensor]:
        """The parts of x [..., len(names), H, D], each after the norm of its pooling (if any)."""
        norms = [getattr(self, f"norm_{name}") for name in names]
        return [t if norm is None else norm(t) for norm, t in zip(norms, x.unbind(-3), strict=True)]

    def position_bias(self, q: Tensor, query_grid: Grid, key_grid: Grid, num_prefix_tokens: int) -> Tensor:
        """Relative positions as a bias on the logits: the sum of q . R over the axes, [B, H, N_q, N_k]; 0 in the row
        and the column of CLS.

        Args:
            q: [B, grid of the queries, H, D], pooled and normalised but not scaled; without CLS.
        """
        q = q.unflatten(1, query_grid)
        terms = []  # of each axis with a table: [B, H, T_q, H_q, W_q, keys along the axis]
        equations = ("bthwnd,tkd->bnthwk", "bthwnd,hkd->bnthwk", "bthwnd,wkd->bnthwk")
        tables = (self.rel_pos_t, self.rel_pos_h, self.rel_pos_w)
        for equation, table, num_q, num_k in zip(equations, tables, query_grid, key_grid, strict=True):
            # contiguous: otherwise their sum, which is many times larger, inherits their transposed strides
            axis = None if table is None else relative_table(table, num_q, num_k).to(q.dtype)
            terms.append(None if axis is None else torch.einsum(equation, q, axis).contiguous())
        t, h, w = terms
        bias = 0 if h is None else (h[..., :, None] + w[..., None, :])[..., None, :, :]
        bias = bias if t is None else bias + t[..., :, None, None]
        bias = bias.expand(*bias.shape[:-3], *key_grid).flatten(-3).flatten(2, 4)
        # Padding by zero columns would still copy.
        return F.pad(bias, (num_prefix_tokens, 0, num_prefix_tokens, 0)) if num_prefix_tokens else bias


class MultiScaleBlock(nn.Module):
    """Pre-norm block with pooled attention.

    Where the width changes, `proj` projects the residual path (of the MLP in v1, of the attention in v2). Its input is
    the normalised input, not the input itself.

    Args:
        attention: options of MultiScaleAttention.
    """

    def __init__(
        self,
        spec: BlockSpec,
        *,
        mlp_ratio: float = 4.0,
        drop_path_rate: float = 0.0,
        drop_rate: float = 0.0,
        **attention: Any,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.norm1 = nn.LayerNorm(spec.dim_in, eps=NORM_EPS)
        self.attn = MultiScaleAttention(spec, drop_rate=drop_rate, **attention)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(spec.dim_attn, eps=NORM_EPS)
        self.mlp = Mlp(spec.dim_attn, int(spec.dim_attn * mlp_ratio), spec.dim_out, drop=drop_rate)
        self.proj = nn.Linear(spec.dim_in, spec.dim_out) if spec.dim_in != spec.dim_out else None
        self.pool_skip = None if spec.skip is None else spec.skip.layer("max")

    @property
    def widens_in_attention(self) -> bool:
        """`proj` is in the residual path of the attention (v2), not of the MLP (v1)."""
        return self.proj is not None and self.spec.dim_attn == self.spec.dim_out

    def forward(self, x: Tensor, grid: Grid, num_prefix_tokens: int) -> tuple[Tensor, Grid]:
        """[B, N, dim_in] on `grid` -> [B, N_q, dim_out] and its grid."""
        normed = self.norm1(x)
        skip = self.proj(normed) if self.widens_in_attention else x
        if self.pool_skip is not None:
            skip = pool_grid([self.pool_skip], skip[:, :, None, None], grid, num_prefix_tokens)[:, :, 0, 0]
        x = skip + self.drop_path(self.attn(normed, grid, num_prefix_tokens))
        return self.feed_forward(x, self.drop_path), self.spec.query_grid(grid)

    def feed_forward(self, x: Tensor, drop_path: nn.Module) -> Tensor:
        """The second half of the block, pointwise: [..., dim_attn] -> [..., dim_out]."""
        normed = self.norm2(x)
        if self.proj is not None and not self.widens_in_attention:
            x = self.proj(normed)
        return x + drop_path(self.mlp(normed))


def pool_grid(pools: Sequence[nn.Module], x: Tensor, grid: Grid, num_prefix_tokens: int) -> Tensor:
    """Pool the patches of x [B, N, P, H, D] on their grid -> [B, N', P, H, D]. Prefix tokens do not change.

    Each of the P parts has its own pool, shared by its heads; all have the same geometry. Parts and heads are the
    channels of one operation, in memory order, so nothing is transposed.
    """
    parts, pool = x.shape[2:], pools[0]
    prefix, patches = x[:, :num_prefix_tokens], x[:, num_prefix_tokens:].flatten(2).contiguous()
    dense_grid = patches.unflatten(1, grid)
    if isinstance(pool, nn.Conv3d):
        for own in pools:
            refuse_stale(own)
        weight = torch.cat([own.weight for own in pools for _ in range(parts[1])])
        pooled = depthwise_convolution(dense_grid, weight, pool.stride, pool.padding)
    else:
        pooled = pool(dense_grid.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1)
    pooled = pooled.flatten(1, 3).unflatten(-1, parts)
    return torch.cat([prefix, pooled], dim=1) if num_prefix_tokens else pooled


def depthwise_convolution(x: Tensor, weight: Tensor, stride: Grid, padding: Grid) -> Tensor:
    """Depthwise conv3d of x [B, T, H, W, C] with weight [C, 1, t, h, w]."""
    groups, num_frames, num_taps = x.shape[-1], x.shape[1], weight.shape[2]
    keeps_time = stride[0] == 1 and num_taps == 2 * padding[0] + 1
    if x.is_cuda or num_taps == 1 or not keeps_time or num_frames <= padding[0]:
        volume = x.permute(0, 4, 1, 2, 3)  # channels last: no copy
        out = F.conv3d(volume, weight, stride=stride, padding=padding, groups=groups)
        return out.permute(0, 2, 3, 4, 1)
    # PyTorch's fast depthwise CPU kernels are 2D: convolve all frames once per tap in time, and add up.
    frames = x.flatten(0, 1).permute(0, 3, 1, 2)

    def tap(i: int) -> Tensor:
        out = F.conv2d(frames, weight[:, :, i], stride=stride[1:], padding=padding[1:], groups=groups)
        return out.permute(0, 2, 3, 1).unflatten(0, (-1, num_frames))

    out = tap(padding[0])
    for i in range(num_taps):
        ahead = i - padding[0]
        if ahead:
            length = num_frames - abs(ahead)
            out.narrow(1, max(-ahead, 0), length).add_(tap(i).narrow(1, max(ahead, 0), length))
    return out


def relative_table(table: Tensor, num_q: int, num_k: int) -> Tensor:
    """The rows of a table of distances [L, D] for all queries and keys along an axis: [num_q, num_k, D]; the table is
    resized to 2 * max(num_q, num_k) - 1 distances (SlowFast `attention.py`, get_rel_pos).
    """
    return resize_table(table, 2 * max(num_q, num_k) - 1)[relative_index(num_q, num_k, table.device)]


def relative_index(num_q: int, num_k: int, device: torch.device) -> Tensor:
    """[num_q, num_k] int64, the row of a query and a key in a table of 2 * max(num_q, num_k) - 1 distances.

    Distances are in units of the finer grid, truncated to whole numbers.
    """
    step_q, step_k = max(num_k / num_q, 1.0), max(num_q / num_k, 1.0)
    i = torch.arange(num_q, device=device)[:, None] * step_q
    j = torch.arange(num_k, device=device)[None, :] * step_k
    return (i - j + (num_k - 1) * step_k).long()


def resize_table(table: Tensor, length: int) -> Tensor:
    """A table of distances [L, D] interpolated linearly to `length` rows."""
    if len(table) == length:
        return table
    return F.interpolate(table.T[None], size=length, mode="linear")[0].T
