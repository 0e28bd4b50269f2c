"""Adaptive token sampling in a block of CvT's last stage: cells of the keys' grid are scored and sampled.

CLS attends to keys on a strided grid (stride 2 in all released networks): a key is a cell that stands for 2 x 2 tokens.
So the cells are what a score exists for, and what is sampled, as in MViT (`mvit_ats.py`): a dropped cell takes its
tokens with it. `ATS.NUM_TOKENS` counts cells (and CLS) here. After tokens were dropped:

* tokens are packed; norms, linear projections and the MLP see what is left only;
* the convolutions need the grid: the normalised tokens are put on a canvas of all of it, zeros where a token was
  dropped, which is also what lies beyond the image's border; a depthwise convolution costs 9 multiply-adds a channel;
* cell c is a key if and only if one of the tokens p with p // stride == c is there. As cells are kept or dropped whole,
  the keys of the next block are exactly the cells that this block kept, each on the tokens it had. What the convolution
  gives at other cells near the border of the kept region is neither a key nor a value;
* the odd row or column of tokens at the end of an odd grid has cells of its own, with fewer tokens;
* batch norm in training takes its statistics over the tokens (of queries) and cells (of keys and values) that are
  there: those of the block's input, as in "attend N x N, then drop rows". Dropped places have no part in them;
* queries are convolved for the tokens of the input and projected for those that are kept.

With every cell kept the block is the dense one, to round-off, in training too.

Shapes: as in `cvt_block.py` and `ats/tokens.py`.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ats.attention import ragged_attention
from ats.errors import UserError
from ats.models.block import ATSBlock, score_candidates
from ats.models.cvt.dense import ConvBlock, StageSpec
from ats.models.dense_grid import Grid, coarsen, tokens_of_cells
from ats.reduction.sampling import BlockSampler
from ats.tokens import Layout, RaggedTokens


class ConvATSBlock(nn.Module):
    """A ConvBlock on ragged tokens; with a `sampler` it keeps some of them, without it all.

    It has no parameters of its own and registers the host's children under the host's names, so state dicts do not
    change.

    Args:
        host: the block whose children are used. It must not be used otherwise afterwards.
        sampler: what to keep; None for an ordinary block behind one that samples.
    """

    def __init__(self, host: ConvBlock, sampler: BlockSampler | None) -> None:
        super().__init__()
        for name, child in host.named_children():
            self.add_module(name, child)
        self.spec, self.sampler = host.spec, sampler

    @property
    def key_stride(self) -> Grid:
        """Tokens of a cell along (t, h, w)."""
        conv = self.attn.conv_proj_k
        return (1, 1, 1) if conv is None else (1, conv.stride, conv.stride)

    def forward(self, tokens: RaggedTokens, grid: tuple[int, int]) -> RaggedTokens:
        """Tokens on `grid` in, the kept ones out, both after a full block."""
        attn, sampler = self.attn, self.sampler
        cells = replace(coarsen(tokens, (1, *grid), self.key_stride), slots=tokens.slots)  # both count cells
        x = self.norm1(tokens.x)
        canvas = tokens.to_grid(x)
        k, v = (self.heads(name, self.convolved(name, x, canvas, tokens, cells, grid)) for name in "kv")
        rows = self.convolved("q", x, canvas, tokens, tokens, grid)
        kept = tokens
        if sampler is None:
            q = self.heads("q", rows)
        elif sampler.score == "mean_attention":
            q = self.heads("q", rows)
            kept, index = self.keep(tokens, cells, q, k, v, grid)
            q = q[index]
        else:
            of_cls = self.heads("q", rows[tokens.layout.start])
            kept, index = self.keep(tokens, cells, of_cls, k, v, grid)
            q = self.heads("q", rows[index])
        out = ragged_attention(
            q,
            k,
            v,
            queries=kept.layout,
            keys=cells.layout,
            scale=attn.scale,
            dropout_p=attn.attn_drop.p if self.training else 0.0,
        )
        out = attn.proj_drop(attn.proj(out.flatten(1)))
        x = kept.x + ATSBlock.drop_path(self.drop_path, out, kept.layout)
        return kept.with_x(x + ATSBlock.drop_path(self.drop_path, self.mlp(self.norm2(x)), kept.layout))

    def heads(self, name: str, x: Tensor) -> Tensor:
        """The linear projection `name` (q, k, v): [T, C] -> [T, H, D]."""
        return getattr(self.attn, f"proj_{name}")(x).unflatten(-1, (self.attn.num_heads, -1))

    def convolved(
        self, name: str, x: Tensor, canvas: Tensor, tokens: RaggedTokens, cells: RaggedTokens, grid: tuple[int, int]
    ) -> Tensor:
        """The convolution `name` of the tokens at `cells`, CLS passing by: [T', C].

        Args:
            x: [T, C] normalised tokens. canvas: [S, N, C] the same on their grid.
        """
        conv, num_prefix = getattr(self.attn, f"conv_proj_{name}"), tokens.num_prefix_tokens
        if conv is None:
            return x
        out = conv.conv(canvas[:, num_prefix:].transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
        patches = patch_layout(cells)
        first_patch = (patches.sequence + 1) * num_prefix
        in_packed = torch.arange(patches.total, device=x.device) + first_patch
        on_grid = patches.sequence * out.shape[1] + cells.position[in_packed] - num_prefix
        rows = batch_norm(conv.bn, out.reshape(-1, out.shape[-1])[on_grid])
        if num_prefix == 0:
            return rows
        packed = rows.new_zeros(cells.layout.total, rows.shape[1]).index_copy(0, in_packed, rows)
        return packed.index_copy(0, cells.prefix_index(), x[tokens.prefix_index()].to(rows.dtype))

    def keep(self, tokens: RaggedTokens, *scored: object) -> tuple[RaggedTokens, Tensor]:
        """The tokens that `sample` keeps, with the slots there are afterwards, and their indices in the old x."""
        slots = min(self.sampler.budget(tokens.slots), tokens.slots)
        return tokens.keep(self.sample(tokens, *scored), slots=slots)

    @torch.no_grad()
    def sample(
        self, tokens: RaggedTokens, cells: RaggedTokens, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int]
    ) -> Tensor:
        """Score and sample the cells: a mask [S, M] of the tokens to keep.

        Args:
            q: of CLS [S, H, D]; of all tokens [T, H, D] for the score mean_attention.
            k, v: [T', H, D] of the cells.
        """
        sampler, num_prefix = self.sampler, tokens.num_prefix_tokens
        candidates = score_candidates(sampler.score, cells, q, k, v, scale=self.attn.scale, queries=tokens.layout)
        keep = sampler(candidates, slots=cells.slots, num_prefix_tokens=num_prefix)
        keep = cells.layout.unpad(torch.cat([keep.new_ones(len(keep), num_prefix), keep], dim=1))
        coarse = tuple(-(-size // step) for size, step in zip((1, *grid), self.key_stride, strict=True))
        on_cells = cells.to_grid(keep)[:, num_prefix:].unflatten(1, coarse)
        on_tokens = tokens_of_cells(on_cells, (1, *grid), self.key_stride).flatten(1)
        mask = tokens.from_grid(F.pad(on_tokens, (num_prefix, 0), value=True))
        return tokens.layout.pad(mask)


def patch_layout(tokens: RaggedTokens) -> Layout:
    """The layout of the tokens without the prefix tokens."""
    layout, num_prefix = tokens.layout, tokens.num_prefix_tokens
    total = layout.total - num_prefix * len(layout.lengths)
    return Layout(layout.lengths - num_prefix, total=total, longest=layout.longest - num_prefix)


def batch_norm(bn: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """The host's batch norm on rows [T, C]. One row has no statistics: it gets the running ones, in training too."""
    if bn.training and len(x) == 1:
        return F.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps)
    # As T images of one pixel. As one image of T pixels (a transposed view) torch's CPU backward is wrong (torch 2.15).
    return bn(x[:, :, None, None])[:, :, 0, 0]


def begin_ragged(x: Tensor, grid: tuple[int, int], num_prefix_tokens: int, spec: StageSpec) -> RaggedTokens:
    """Dense tokens [B, N, C] on `grid` as ragged ones whose slots count the cells of the keys' grid (and CLS)."""
    stride = 1 if spec.method == "linear" else spec.stride_kv
    num_cells = -(-grid[0] // stride) * -(-grid[1] // stride)
    return replace(RaggedTokens.from_dense(x, num_prefix_tokens), slots=num_prefix_tokens + num_cells)


def check_stage(spec: StageSpec) -> None:
    """Refuse stages where a key is not the cell of whole tokens that dropping needs.

    Raises:
        UserError: names the keys to change.
    """
    if spec.method == "avg":
        raise UserError("ATS needs CVT.QKV_PROJ_METHOD dw_bn or linear in the last stage, not avg.")
    if spec.method == "dw_bn" and 2 * spec.padding_kv != spec.kernel_qkv - 1:
        raise UserError(
            f"ATS needs CVT.PADDING_KV (CVT.KERNEL_QKV - 1) / 2 in the last stage, not {spec.padding_kv} with kernel "
            f"{spec.kernel_qkv}."
        )
