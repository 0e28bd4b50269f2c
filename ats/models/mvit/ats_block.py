"""Adaptive token sampling in a block of MViT: pooled cells are scored and sampled, the tokens they stand for are kept.

CLS attends to pooled keys, each a cell of a coarser grid than the tokens' (in blocks 4 to 13 of MViT-B a cell stands
for 2 x 2 tokens). So the cells are what a score exists for, and what is sampled: a dropped cell takes all its tokens
with it. `ATS.NUM_TOKENS` counts cells (and CLS) here. Everything else works on what is left:

* tokens are packed; norms, projections and the MLP see kept tokens only;
* a pooling needs the grid: q, k and v are put on a canvas of the whole grid, 0 where a token was dropped (-inf for max
  pooling), pooled, and taken back from where there is something. That is memory traffic and the depthwise convolution;
* a cell of a coarser grid is there if one of the tokens it stands for is: token p belongs to cell p // stride. Cells
  that are not there are no keys, no queries and no tokens; a cell that is there only in part (at the border of the kept
  region) is pooled from what is left of it and zeros;
* where a stride does not divide the grid, the last cells of an axis stand for fewer tokens;
* relative positions are those of the kept queries and keys, wherever they lie in memory.

What happens at a change of stage (block 14 of MViT-B, stride 2), with tokens dropped before it: the queries of the 14 x
14 grid are projected for the kept tokens, pooled on the canvas, and one query remains for each of the 7 x 7 cells that
holds at least one kept token; keys and values are pooled with stride 1 and remain where a token was kept; the residual
goes through its max pooling on a canvas filled with -inf. From then on the 7 x 7 cells are the tokens. Where cells were
sampled on the 7 x 7 grid, as in blocks 4 to 13 of the video networks, each of them is whole or gone, so the change of
stage meets no partial cells.

With every cell kept the block is the dense one, to round-off.

Shapes: as in `mvit_block.py` and `ats/tokens.py`; T_q, T_k packed queries and keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ats.attention import ragged_attention
from ats.models.block import ATSBlock, score_candidates
from ats.models.dense_grid import ONE, Grid, coarsen, rescale, tokens_of_cells
from ats.models.mvit.dense import MultiScaleBlock, pool_grid, relative_index, resize_table
from ats.reduction.sampling import BlockSampler
from ats.tokens import Layout, RaggedTokens


class MultiScaleATSBlock(nn.Module):
    """A MultiScaleBlock on ragged tokens; with a `sampler` it keeps some of them, without it all.

    It has no parameters of its own and registers the host's children under the host's names, so state dicts do not
    change.

    Args:
        host: the block whose children are used. It must not be used otherwise afterwards.
        sampler: what to keep; None for an ordinary block behind one that samples.
    """

    def __init__(self, host: MultiScaleBlock, sampler: BlockSampler | None) -> None:
        super().__init__()
        for name, child in host.named_children():
            self.add_module(name, child)
        self.proj, self.pool_skip = host.proj, host.pool_skip
        self.spec, self.sampler = host.spec, sampler

    widens_in_attention = MultiScaleBlock.widens_in_attention
    feed_forward = MultiScaleBlock.feed_forward

    @property
    def projects_all_queries(self) -> bool:
        """Queries are needed of every token that comes in: to pool them, to add positions, or to score with them."""
        attn, sampler = self.attn, self.sampler
        return (
            attn.pool_q is not None or attn.has_rel_pos or (sampler is not None and sampler.score == "mean_attention")
        )

    def forward(self, tokens: RaggedTokens, grid: Grid) -> tuple[RaggedTokens, Grid]:
        """Tokens on `grid` in; those of the output's grid that are kept out, after a full block."""
        attn, spec = self.attn, self.spec
        query_grid, key_grid = spec.query_grid(grid), spec.key_grid(grid)
        stride_q, stride_kv = (ONE if pool is None else pool.stride for pool in (spec.pool_q, spec.pool_kv))
        queries = coarsen(tokens, grid, stride_q)
        keys = queries if stride_q == stride_kv else coarsen(tokens, grid, stride_kv)
        x = self.norm1(tokens.x)
        q, k, v = self.pooled_parts(x, tokens, queries, keys, grid)
        matched_q, matched_k = q, k
        if attn.has_rel_pos:
            matched_q, matched_k = self.with_positions(q, k, queries, keys, query_grid, key_grid)

        kept, index = queries, None
        if self.sampler is not None:
            scoring_q = matched_q
            if self.sampler.score != "mean_attention":
                first = queries.layout.start
                scoring_q = attn.project(rows(x, first), "q")[:, 0] if q is None else rows(matched_q, first)
            mask, slots = self.sample(queries, keys, scoring_q, matched_k, v, grid)
            kept, index = queries.keep(mask, slots=slots)
        if q is None:
            matched_q = attn.project(rows(x, index), "q")[:, 0]
        else:
            matched_q = rows(matched_q, index)

        out = attend(matched_q, matched_k, v, queries=kept.layout, keys=keys.layout, scale=attn.scale)
        if attn.residual_pooling:
            patches = matched_q[..., : attn.head_dim]
            if kept.num_prefix_tokens:
                patches = patches * (kept.position >= kept.num_prefix_tokens)[:, None, None]
            out = out + patches
        out = attn.proj_drop(attn.proj(out.flatten(1)))
        skip = self.skip(tokens, x, queries, kept, index, grid)
        x = skip + ATSBlock.drop_path(self.drop_path, out, kept.layout)
        x = self.feed_forward(x, lambda y: ATSBlock.drop_path(self.drop_path, y, kept.layout))
        return kept.with_x(x), query_grid

    def pooled_parts(
        self, x: Tensor, tokens: RaggedTokens, queries: RaggedTokens, keys: RaggedTokens, grid: Grid
    ) -> tuple[Tensor | None, Tensor, Tensor]:
        """Queries (if all are needed), keys and values of normalised tokens [T, C]: [T_q, H, D] and [T_k, H, D], pooled
        and normalised.
        """
        attn, names = self.attn, "qkv" if self.projects_all_queries else "kv"
        parts = []
        for group in attn.pooled_alike(names):
            part = attn.project(x, group)
            if attn.pools(group):
                part = pool_ragged(attn.pools(group), part, tokens, queries if "q" in group else keys, grid)
            parts += attn.normalised(group, part)
        return (None, *parts)[-3:]

    def with_positions(
        self, q: Tensor, k: Tensor, queries: RaggedTokens, keys: RaggedTokens, query_grid: Grid, key_grid: Grid
    ) -> tuple[Tensor, Tensor]:
        """Queries and keys widened so that their product is q . k + the relative positions' term / scale.

        The term is a sum over axes of (q . R)[coordinate of the key]: the query carries q . R for every coordinate, the
        key a 1 at its own. So the term needs no matrix of its own and any attention kernel will do. CLS carries zeros.
        The width is filled up to a multiple of 8, as fused kernels like it.
        """
        attn, num_prefix = self.attn, queries.num_prefix_tokens
        tables, columns, ones, start = [], [], [], 0
        by_axis = zip((attn.rel_pos_t, attn.rel_pos_h, attn.rel_pos_w), query_grid, key_grid, strict=True)
        for axis, (table, num_q, num_k) in enumerate(by_axis):
            if table is not None:
                tables.append(resize_table(table, 2 * max(num_q, num_k) - 1))
                columns.append(along_axis(start + relative_index(num_q, num_k, q.device), query_grid, axis))
                ones.append(along_axis(torch.eye(num_k, dtype=k.dtype, device=k.device), key_grid, axis))
                start += len(tables[-1])
        fill = -sum(one.shape[-1] for one in ones) % 8
        # One product with all distances, from which every query takes those it has to the coordinates of keys; what
        # CLS and the filling take is a product with zeros.
        tables.append(tables[0].new_zeros(1, attn.head_dim))
        products = F.linear(q, torch.cat(tables).to(q.dtype) / attn.scale)
        columns = F.pad(torch.cat(columns, dim=-1).flatten(0, 2), (0, fill, num_prefix, 0), value=start)
        columns = rows(columns, queries.position)[:, None].expand(-1, q.shape[1], -1)
        ones = F.pad(torch.cat(ones, dim=-1).flatten(0, 2), (0, fill, num_prefix, 0))
        ones = rows(ones, keys.position)[:, None].expand(-1, k.shape[1], -1)
        return torch.cat([q, products.gather(-1, columns)], dim=-1), torch.cat([k, ones], dim=-1)

    def skip(
        self,
        tokens: RaggedTokens,
        x: Tensor,
        queries: RaggedTokens,
        kept: RaggedTokens,
        index: Tensor | None,
        grid: Grid,
    ) -> Tensor:
        """The residual path of the kept tokens [T', dim_attn]; `x` are the normalised tokens."""
        if self.pool_skip is None:
            return self.proj(rows(x, index)) if self.widens_in_attention else kept.x
        skip = self.proj(x) if self.widens_in_attention else tokens.x
        skip = pool_ragged([self.pool_skip], skip[:, None, None], tokens, queries, grid)[:, 0, 0]
        return rows(skip, index)

    @torch.no_grad()
    def sample(
        self,
        queries: RaggedTokens,
        keys: RaggedTokens,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        grid: Grid,
    ) -> tuple[Tensor, int]:
        """Score and sample the cells, for an input on `grid`.

        Args:
            q: with relative positions, of CLS [S, H, D]; of all queries [T_q, H, D] for the score mean_attention.
            k: with relative positions. v: the cells' values.

        Returns:
            A mask [S, M] of the queries to keep, and the token slots afterwards.
        """
        sampler, layout, num_prefix = self.sampler, keys.layout, keys.num_prefix_tokens
        candidates = score_candidates(sampler.score, keys, q, k, v, scale=self.attn.scale, queries=queries.layout)
        keep = sampler(candidates, slots=keys.slots, num_prefix_tokens=num_prefix)
        keep = F.pad(keep, (num_prefix, 0), value=True)
        slots = min(sampler.budget(keys.slots), keys.slots)
        if keys is queries:
            return keep, slots
        spec = self.spec
        cells = keys.to_grid(layout.unpad(keep))[:, num_prefix:].unflatten(1, spec.key_grid(grid))
        cells = tokens_of_cells(cells, spec.query_grid(grid), spec.queries_per_cell(grid))
        mask = queries.from_grid(F.pad(cells.flatten(1), (num_prefix, 0), value=True))
        return queries.layout.pad(mask), rescale(slots, keys.num_positions, queries.num_positions, num_prefix)


def attend(q: Tensor, k: Tensor, v: Tensor, *, queries: Layout, keys: Layout, scale: float) -> Tensor:
    """`ragged_attention` for values narrower than queries and keys [T_q, H, D]; fused kernels want one width."""
    fill = q.shape[-1] - v.shape[-1]
    if fill == 0:
        return ragged_attention(q, k, v, queries=queries, keys=keys, scale=scale)
    wide = F.pad(v, (0, fill))
    return ragged_attention(q, k, wide, queries=queries, keys=keys, scale=scale)[..., : v.shape[-1]]


def rows(x: Tensor, index: Tensor | None) -> Tensor:
    """Rows of x, or all; a gather of whole rows, which indexing by brackets is not sure to be."""
    return x if index is None else x.index_select(0, index)


def pool_ragged(pools: Sequence[nn.Module], x: Tensor, tokens: RaggedTokens, cells: RaggedTokens, grid: Grid) -> Tensor:
    """Pool x [T, P, H, D] of `tokens` on a canvas of the whole `grid`, each of the P parts by its own of `pools`: the
    values [T', P, H, D] of `cells`.
    """
    is_max = isinstance(pools[0], nn.MaxPool3d)
    canvas = tokens.to_grid(x, -torch.inf if is_max else 0)
    out = cells.from_grid(pool_grid(pools, canvas, grid, tokens.num_prefix_tokens))
    # With a stride above the kernel's reach a cell may be there by a token that the kernel does not see.
    return out.masked_fill(out == -torch.inf, 0) if is_max else out


def along_axis(x: Tensor, grid: Grid, axis: int) -> Tensor:
    """[n, m], a row for every coordinate along `axis` -> [T, H, W, m], for every position of the grid; not copied."""
    shape = [-1 if i == axis else 1 for i in range(3)]
    return x.reshape(*shape, x.shape[-1]).expand(*grid, x.shape[-1])
