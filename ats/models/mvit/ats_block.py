"""Adaptive token sampling in a block of MViT: it scores and samples pooled cells and keeps the tokens they cover.

CLS attends to pooled keys. Each key is a cell of a grid coarser than the tokens' (in blocks 4 to 13 of MViT-B a cell
covers 2 x 2 tokens). So cells are scored and sampled: a dropped cell drops all its tokens. `ATS.NUM_TOKENS` counts
cells (and CLS) here. Once tokens have been dropped:

* tokens are packed; norms, projections and the MLP run on kept tokens only;
* pooling needs the grid: q, k and v are scattered to the dense grid with zeros for dropped tokens (-inf for max
  pooling), pooled, and gathered at the present cells. This costs memory traffic and the depthwise convolution;
* only present cells (`dense_grid.py`) are keys, queries or tokens. A cell at the border of the kept region pools its
  present tokens and zeros;
* relative positions are those of the kept queries and keys, wherever they lie in memory.

A change of stage (block 14 of MViT-B, stride 2) pools queries too: each of the 7 x 7 cells with at least one kept token
has a query and is a new token. Keys and values are pooled with stride 1 and stay where a token was kept. If cells were
sampled on the 7 x 7 grid before, as in the video networks, every cell is whole or absent.

If every cell is kept, the block equals the dense one to round-off.

Shapes: as in `dense.py` and `ats/tokens.py`; T_q, T_k packed queries and keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ats.attention import ragged_attention
from ats.models.block import ATSBlock, rows
from ats.models.dense_grid import Grid, coarsen, rescale, tokens_of_cells
from ats.models.mvit.dense import BlockSpec, MultiScaleBlock, pool_grid, relative_index, resize_table
from ats.models.weights import projects_parts, refuse_stale
from ats.reduction import Step
from ats.tokens import RaggedTokens


class MultiScaleATSBlock(ATSBlock):
    """A MultiScaleBlock on ragged tokens, on the grid `tokens.grid`."""

    attn: Any  # a MultiScaleAttention
    pool_skip: nn.Module | None
    spec: BlockSpec
    widens_in_attention = MultiScaleBlock.widens_in_attention
    feed_forward = MultiScaleBlock.feed_forward
    drop_path1 = property(attrgetter("drop_path"))  # one module for both branches
    ls1 = nn.Identity()  # no LayerScale

    @property
    def projects_all_queries(self) -> bool:
        """Whether it needs the queries of all input tokens: to pool them, to add positions, or to score with them."""
        by_all = self.reduction is not None and self.reduction.score == "mean_attention"
        return self.attn.pool_q is not None or self.attn.has_rel_pos or by_all or not projects_parts(self.attn)

    def project(self, tokens: RaggedTokens) -> Step:
        """Queries (if all are needed), keys and values, pooled on the grid, with relative positions."""
        spec, grid = self.spec, tokens.grid
        stride_q, stride_kv = spec.strides
        queries = coarsen(tokens, stride_q)
        keys = queries if stride_q == stride_kv else coarsen(tokens, stride_kv)
        x = self.norm1(tokens.x)
        q, k, v = self.pooled_parts(x, tokens, queries, keys)
        if self.attn.has_rel_pos:
            q, k = self.with_positions(q, k, queries, keys, spec.query_grid(grid), spec.key_grid(grid))
        return Step(tokens, x, queries=queries, keys=keys, q=q, k=k, v=v, scale=self.attn.scale, kept=queries)

    def pooled_parts(
        self, x: Tensor, tokens: RaggedTokens, queries: RaggedTokens, keys: RaggedTokens
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Queries (if all are needed), keys and values of normalised tokens [T, C]: [T_q, H, D] and [T_k, H, D], pooled
        and normalised.
        """
        attn, names = self.attn, "qkv" if self.projects_all_queries else "kv"
        parts = []
        for group in attn.pooled_alike(names):
            part = attn.project(x, group)
            if attn.pools(group):
                self._begin("scatter and gather")
                part = pool_ragged(attn.pools(group), part, tokens, queries if "q" in group else keys)
                self._begin("qkv")
            parts += attn.normalised(group, part)
        return (None, *parts)[-3:]

    def with_positions(
        self, q: Tensor, k: Tensor, queries: RaggedTokens, keys: RaggedTokens, query_grid: Grid, key_grid: Grid
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys widened so that their product is q . k + the relative positions' term / scale.

        The term is a sum of (q . R)[coordinate of the key] over the axes. The query appends q . R for all coordinates,
        the key a one-hot vector of its own, so any attention kernel works without a bias matrix. CLS appends zeros.
        Padded to a multiple of 8, as fused kernels prefer.
        """
        attn, num_prefix = self.attn, queries.num_prefix_tokens
        refuse_stale(attn)
        tables, columns, ones, start = [], [], [], 0
        by_axis = zip((attn.rel_pos_t, attn.rel_pos_h, attn.rel_pos_w), query_grid, key_grid, strict=True)
        for axis, (table, num_q, num_k) in enumerate(by_axis):
            if table is not None:
                tables.append(resize_table(table, 2 * max(num_q, num_k) - 1))
                columns.append(along_axis(start + relative_index(num_q, num_k, q.device), query_grid, axis))
                ones.append(along_axis(torch.eye(num_k, dtype=k.dtype, device=k.device), key_grid, axis))
                start += len(tables[-1])
        fill = -sum(one.shape[-1] for one in ones) % 8
        # One product with all distances, from which each query gathers those to the keys' coordinates. CLS and padding
        # gather a product with zeros.
        tables.append(tables[0].new_zeros(1, attn.head_dim))
        products = F.linear(q, torch.cat(tables).to(q.dtype) / attn.scale)
        gathered = F.pad(torch.cat(columns, dim=-1).flatten(0, 2), (0, fill, num_prefix, 0), value=start)
        gathered = rows(gathered, queries.position)[:, None].expand(-1, q.shape[1], -1)
        one_hot = F.pad(torch.cat(ones, dim=-1).flatten(0, 2), (0, fill, num_prefix, 0))
        one_hot = rows(one_hot, keys.position)[:, None].expand(-1, k.shape[1], -1)
        return torch.cat([q, products.gather(-1, gathered)], dim=-1), torch.cat([k, one_hot], dim=-1)

    def project_q(self, x: Tensor, tokens: RaggedTokens | None = None) -> Tensor:
        return self.attn.project(x, "q")[:, 0]

    def spread(self, keep: Tensor, max_tokens: int, step: Step) -> tuple[Tensor, int]:
        """A kept cell keeps all its queries."""
        queries, keys, spec, grid = step.queries, step.keys, self.spec, step.tokens.grid
        if keys is queries:
            return keep, max_tokens
        num_prefix = keys.num_prefix_tokens
        cells = keys.to_grid(keys.layout.unpad(keep))[:, num_prefix:].unflatten(1, spec.key_grid(grid))
        cells = tokens_of_cells(cells, spec.query_grid(grid), spec.queries_per_cell(grid))
        mask = queries.from_grid(F.pad(cells.flatten(1), (num_prefix, 0), value=True))
        return queries.layout.pad(mask), rescale(max_tokens, keys.num_positions, queries.num_positions, num_prefix)

    def weighted_values(self, q: Tensor, step: Step) -> Tensor:
        kept, attn, extra = step.kept, self.attn, q.shape[-1] - step.v.shape[-1]
        # Positions widen queries and keys by `extra`; fused kernels need values of the same width.
        v = F.pad(step.v, (0, extra)) if extra else step.v
        out = ragged_attention(q, step.k, v, queries=kept.layout, keys=step.keys.layout, scale=attn.scale)
        out = out[..., :-extra] if extra else out
        if attn.residual_pooling:
            patches = q[..., : attn.head_dim]
            if kept.num_prefix_tokens:
                patches = patches * (kept.position >= kept.num_prefix_tokens)[:, None, None]
            out = out + patches
        return out.flatten(1)

    def residual(self, step: Step) -> Tensor:
        """The residual path of the kept tokens [T', dim_attn]."""
        if self.pool_skip is None:
            return self.proj(rows(step.x, step.index)) if self.widens_in_attention else step.kept.x
        self._begin("scatter and gather")
        skip = self.proj(step.x) if self.widens_in_attention else step.tokens.x
        skip = pool_ragged([self.pool_skip], skip[:, None, None], step.tokens, step.queries)[:, 0, 0]
        return rows(skip, step.index)

    def finish(self, tokens: RaggedTokens) -> RaggedTokens:
        drop_path = partial(self.drop_sequences, self.drop_path, layout=tokens.layout)
        return tokens.with_x(self.feed_forward(tokens.x, drop_path))


def pool_ragged(pools: Sequence[nn.Module], x: Tensor, tokens: RaggedTokens, cells: RaggedTokens) -> Tensor:
    """Pool x [T, P, H, D] of `tokens` on the dense grid, with one of `pools` per part P, and gather `cells`:
    [T', P, H, D].
    """
    is_max = isinstance(pools[0], nn.MaxPool3d)
    dense = tokens.to_grid(x, -torch.inf if is_max else 0)
    out = cells.from_grid(pool_grid(pools, dense, tokens.grid, tokens.num_prefix_tokens))
    # If the stride exceeds the kernel, a present cell may have no token that the kernel sees.
    return out.masked_fill(out == -torch.inf, 0) if is_max else out


def along_axis(x: Tensor, grid: Grid, axis: int) -> Tensor:
    """[n, m], a row per coordinate along `axis` -> [T, H, W, m], a row per position of the grid; a view."""
    shape = [-1 if i == axis else 1 for i in range(3)]
    return x.reshape(*shape, x.shape[-1]).expand(*grid, x.shape[-1])
