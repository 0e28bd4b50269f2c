"""CvT's block, dense and with ATS. It convolves queries, keys and values on the token grid before projecting them.

Names, shapes and numbers are microsoft/CvT's (`lib/models/cls_cvt.py`), so its checkpoints load unchanged. Wu et
al., "CvT: Introducing Convolutions to Vision Transformers", ICCV 2021.

ATS runs in the last stage. CLS attends to keys on a strided grid (stride 2 in all released networks): a key is a cell
that covers 2 x 2 tokens. So cells are scored and sampled, as in MViT (`mvit/ats_block.py`), and a dropped cell drops
its tokens. `ATS.NUM_TOKENS` counts cells (and CLS) here. After tokens were dropped:

* tokens are packed; norms, linear projections and the MLP run on kept tokens only;
* convolutions need the grid: normalised tokens are scattered to the dense grid, with zeros for dropped tokens, as
  outside the image;
* only present cells (`dense_grid.py`) are keys. Cells are kept or dropped whole, so the keys of the next block are the
  kept cells of this one;
* batch norm in training takes its statistics over the present tokens (for queries) and cells (for keys and values) of
  the block's input, as in "attend N x N, then drop rows";
* queries are convolved for all input tokens and projected for the kept ones.

If every cell is kept, the block equals the dense one to round-off, in training too.

Shapes, besides those of `ats/tokens.py`: B images, N = P + grid tokens, P = 1 in a stage with CLS, else 0, a grid
(H, W), row major; keys and values lie on a coarser grid (h, w).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from operator import attrgetter

import torch
import torch.nn.functional as F
from timm.layers import DropPath, Mlp, QuickGELU
from torch import Tensor, nn

from ats.errors import UserError
from ats.models.block import ATSBlock
from ats.models.dense_grid import Grid, coarsen, tokens_of_cells
from ats.models.weights import refuse_stale
from ats.reduction import Step
from ats.tokens import Layout, RaggedTokens

NORM_EPS = 1e-5


@dataclass(frozen=True)
class StageSpec:
    """One stage of the network. The names are those of the CVT keys, which have one entry per stage."""

    patch_size: int
    patch_stride: int
    patch_padding: int
    dim_embed: int
    num_heads: int
    depth: int
    mlp_ratio: float
    attn_drop_rate: float
    drop_rate: float
    drop_path_rate: float
    qkv_bias: bool
    cls_token: bool
    qkv_proj_method: str
    kernel_qkv: int
    padding_kv: int
    stride_kv: int
    padding_q: int
    stride_q: int


class ConvProjection(nn.Module):
    """What precedes a linear projection: a depthwise convolution with batch norm ("dw_bn") or an average ("avg")."""

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
            # torch's CPU batch norm (2.15) has a wrong backward if x is not channels-last and its gradient is a slice
            # of tokens after CLS. Copies only for a batch of one; other batches are channels-last already.
            x = x.contiguous(memory_format=torch.channels_last)
        return self.bn(x)


class ConvAttention(nn.Module):
    """Attention with convolutional projections. CLS is not on the grid and skips the convolutions.

    The scale of the logits is the root of the whole width, not of a head's, as in the reference.

    Attributes:
        conv_proj_q, conv_proj_k, conv_proj_v: None if the projection is only linear.
    """

    def __init__(self, spec: StageSpec) -> None:
        super().__init__()
        dim, method = spec.dim_embed, spec.qkv_proj_method
        self.num_heads, self.scale = spec.num_heads, dim**-0.5
        sizes = {"q": (spec.stride_q, spec.padding_q)} | dict.fromkeys("kv", (spec.stride_kv, spec.padding_kv))
        for name, (stride, padding) in sizes.items():
            is_linear = method == "linear" or (method == "avg" and name == "q")
            options = {"kernel": spec.kernel_qkv, "stride": stride, "padding": padding}
            setattr(self, f"conv_proj_{name}", None if is_linear else ConvProjection(dim, method, **options))
        self.proj_q, self.proj_k, self.proj_v = (nn.Linear(dim, dim, bias=spec.qkv_bias) for _ in "qkv")
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
        self.norm1 = nn.LayerNorm(spec.dim_embed, eps=NORM_EPS)
        self.attn = ConvAttention(spec)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(spec.dim_embed, eps=NORM_EPS)
        self.mlp = Mlp(spec.dim_embed, int(spec.dim_embed * spec.mlp_ratio), act_layer=QuickGELU, drop=spec.drop_rate)

    def forward(self, x: Tensor, grid: tuple[int, int], num_prefix_tokens: int) -> Tensor:
        """[B, N, C] on `grid` -> [B, N, C]."""
        x = x + self.drop_path(self.attn(self.norm1(x), grid, num_prefix_tokens))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ConvATSBlock(ATSBlock):
    """A ConvBlock on ragged tokens, on the grid `tokens.grid`. `max_tokens` counts cells."""

    drop_path1 = drop_path2 = property(attrgetter("drop_path"))  # one module for both branches
    ls1 = ls2 = nn.Identity()  # no LayerScale

    @property
    def key_stride(self) -> Grid:
        """Tokens of a cell along (t, h, w)."""
        conv = self.attn.conv_proj_k
        return (1, 1, 1) if conv is None else (1, conv.stride, conv.stride)

    def project(self, tokens: RaggedTokens) -> Step:
        """Keys and values of the cells; `Step.x` is the input of the queries' projection."""
        cells = replace(coarsen(tokens, self.key_stride), max_tokens=tokens.max_tokens)  # both count cells
        x = self.norm1(tokens.x)
        self._begin("scatter and gather")
        dense = tokens.to_grid(x)
        self._begin("qkv")
        k, v = (self.heads(name, self.convolved(name, x, dense, tokens, cells)) for name in "kv")
        x = self.convolved("q", x, dense, tokens, tokens)
        by_all = getattr(self.reduction, "score", None) == "mean_attention"
        q = self.heads("q", x) if by_all else None
        return Step(tokens, x, queries=tokens, keys=cells, q=q, k=k, v=v, scale=self.attn.scale, kept=tokens)

    def heads(self, name: str, x: Tensor) -> Tensor:
        """The linear projection `name` (q, k, v): [T, C] -> [T, H, D]."""
        return getattr(self.attn, f"proj_{name}")(x).unflatten(-1, (self.attn.num_heads, -1))

    def convolved(self, name: str, x: Tensor, dense: Tensor, tokens: RaggedTokens, cells: RaggedTokens) -> Tensor:
        """The convolution `name` of the tokens, at `cells`; CLS does not change: [T', C].

        Args:
            x: [T, C] normalised tokens. dense: [S, N, C] the same on their grid.
        """
        conv, num_prefix = getattr(self.attn, f"conv_proj_{name}"), tokens.num_prefix_tokens
        if conv is None:
            return x
        volume = dense[:, num_prefix:].transpose(1, 2).unflatten(2, tokens.grid[1:])
        out = conv.conv(volume).flatten(2).transpose(1, 2)
        layout = cells.layout
        total = layout.total - num_prefix * len(layout.lengths)
        patches = Layout(layout.lengths - num_prefix, total=total, longest=layout.longest - num_prefix)
        first_patch = (patches.sequence + 1) * num_prefix
        in_packed = torch.arange(patches.total, device=x.device) + first_patch
        on_grid = patches.sequence * out.shape[1] + cells.position[in_packed] - num_prefix
        of_cells = batch_norm(conv.bn, out.reshape(-1, out.shape[-1])[on_grid])
        if num_prefix == 0:
            return of_cells
        packed = of_cells.new_zeros(cells.layout.total, of_cells.shape[1]).index_copy(0, in_packed, of_cells)
        return packed.index_copy(0, cells.prefix_index(), x[tokens.prefix_index()].to(of_cells.dtype))

    def project_q(self, x: Tensor, tokens: RaggedTokens | None = None) -> Tensor:
        return self.heads("q", x)

    def spread(self, keep: Tensor, max_tokens: int, step: Step) -> tuple[Tensor, int]:
        """A kept cell keeps all its tokens."""
        tokens, cells, num_prefix = step.tokens, step.keys, step.tokens.num_prefix_tokens
        on_cells = cells.to_grid(cells.layout.unpad(keep))[:, num_prefix:].unflatten(1, cells.grid)
        on_tokens = tokens_of_cells(on_cells, tokens.grid, self.key_stride).flatten(1)
        mask = tokens.from_grid(F.pad(on_tokens, (num_prefix, 0), value=True))
        return tokens.layout.pad(mask), max_tokens


def batch_norm(bn: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """Batch norm of rows [T, C]. A single row has no statistics: it uses the running ones, in training too."""
    if bn.training and len(x) == 1:
        refuse_stale(bn)
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
    # T images of one pixel: for one image of T pixels (a transposed view) torch's CPU backward is wrong (2.15).
    return bn(x[:, :, None, None])[:, :, 0, 0]


def check_stage(spec: StageSpec) -> None:
    """Raise a UserError, with the config keys to change, if the stage's keys are not cells of whole tokens."""
    if spec.qkv_proj_method == "avg":
        raise UserError("ATS needs CVT.QKV_PROJ_METHOD dw_bn or linear in the last stage, not avg.")
    if spec.qkv_proj_method == "dw_bn" and 2 * spec.padding_kv != spec.kernel_qkv - 1:
        raise UserError(
            f"ATS needs CVT.PADDING_KV (CVT.KERNEL_QKV - 1) / 2 in the last stage, not {spec.padding_kv} with kernel "
            f"{spec.kernel_qkv}."
        )
