"""From SlowFast's MVIT keys to the blocks of an MViT (widths, heads, poolings, grids); which blocks can sample."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fvcore.common.config import CfgNode

from ats.errors import UserError
from ats.models.dense_grid import ONE, Grid, divide
from ats.models.mvit.dense import BlockSpec, PoolSpec


def plan_blocks(mvit: CfgNode, patch_grid: Grid, input_grid: Grid) -> list[BlockSpec]:
    """The blocks that the MVIT section describes. Raises a UserError for entries that do not fit together.

    Args:
        patch_grid: input size / stride, rounded down, which sets the size of SlowFast's tables.
        input_grid: actual grid of the patches, which may be larger.
    """
    depth, num_heads, dim, kernel = mvit.DEPTH, mvit.NUM_HEADS, mvit.EMBED_DIM, mvit.POOL_KVQ_KERNEL
    adaptive, widens_in_attention = mvit.POOL_KV_STRIDE_ADAPTIVE, mvit.DIM_MUL_IN_ATT
    if adaptive is not None and mvit.POOL_KV_STRIDE:
        raise UserError("MVIT.POOL_KV_STRIDE and MVIT.POOL_KV_STRIDE_ADAPTIVE exclude each other: set one to None.")
    widths, heads = (_per_block(mvit, name) for name in ("DIM_MUL", "HEAD_MUL"))
    strides_q, strides_kv = (_per_block(mvit, name, length=3) for name in ("POOL_Q_STRIDE", "POOL_KV_STRIDE"))
    specs, grid, table_grid = [], input_grid, patch_grid
    for i in range(depth):
        num_heads = round(num_heads * heads.get(i, [1.0])[0])
        # An entry of v1 widens the end of the previous block; one of v2 widens the attention of its own block.
        at = i if widens_in_attention else i + 1
        next_heads = num_heads if widens_in_attention else round(num_heads * heads.get(at, [1.0])[0])
        dim_out = round(dim * widths.get(at, [1.0])[0] / next_heads) * next_heads
        dim_attn = dim_out if widens_in_attention else dim
        if dim_attn % num_heads:
            raise UserError(
                f"Block {i} has width {dim_attn} and {num_heads} heads, which do not divide it: see MVIT.EMBED_DIM, "
                "MVIT.NUM_HEADS, MVIT.DIM_MUL and MVIT.HEAD_MUL."
            )
        stride_q = strides_q.get(i)
        if adaptive is not None:
            adaptive = [max(s // q, 1) for s, q in zip(adaptive, stride_q or ONE, strict=True)]
            strides_kv[i] = adaptive
        spec = BlockSpec(
            dim_in=dim,
            dim_attn=dim_attn,
            dim_out=dim_out,
            num_heads=num_heads,
            pool_q=_pool(stride_q, kernel),
            pool_kv=_pool(strides_kv.get(i), kernel),
            skip=_pool(stride_q, None),
            grid=table_grid,
        )
        if spec.skip is not None and spec.skip.grid(grid) != spec.query_grid(grid):
            raise UserError(
                f"MVIT.POOL_Q_STRIDE {list(stride_q)} (block {i}): queries and the residual's max pooling have grids "
                f"{spec.query_grid(grid)} and {spec.skip.grid(grid)}; use strides 1, 2 or 4 and odd kernels."
            )
        specs.append(spec)
        grid = spec.query_grid(grid)
        table_grid = tuple(n // s for n, s in zip(table_grid, stride_q or ONE, strict=True))
        dim = dim_out
    return specs


def _per_block(mvit: CfgNode, name: str, length: int = 1) -> dict[int, list]:
    """[[block, value, ...], ...] as block -> values. DIM_MUL and HEAD_MUL may name the block after the last."""
    result, depth = {}, mvit.DEPTH
    for entry in mvit[name] or ():
        if not isinstance(entry, Sequence) or len(entry) != 1 + length or not 0 <= entry[0] <= depth:
            values = "t, h, w" if length == 3 else "factor"
            raise UserError(f"MVIT.{name} {entry}: give [[block, {values}], ...] with blocks 0 to {depth - 1}.")
        result[int(entry[0])] = list(entry[1:])
    return result


def _pool(stride: Sequence[int] | None, kernel: Sequence[int] | None) -> PoolSpec | None:
    """The pooling with this stride, by default with kernel stride + 1; None if it would change nothing."""
    if stride is None:
        return None
    kernel = tuple(kernel) if kernel is not None else tuple(s + 1 if s > 1 else 1 for s in stride)
    pool = PoolSpec(kernel, tuple(stride))
    return None if pool == PoolSpec(ONE, ONE) else pool


def blocks_that_can_sample(blocks: Sequence[BlockSpec], input_grid: Grid) -> list[int]:
    """The blocks that can sample if the patches lie on `input_grid`: a dropped cell of the keys must cover whole tokens
    of the block's output.
    """
    allowed, grid = [], input_grid
    for index, spec in enumerate(blocks):
        if spec.queries_per_cell(grid) is not None:
            allowed.append(index)
        grid = spec.query_grid(grid)
    return allowed


def check_sampling_blocks(sampling_blocks: Collection[int], blocks: Sequence[BlockSpec], input_grid: Grid) -> None:
    """Raise a UserError for blocks that cannot sample if the patches lie on `input_grid`. It names the blocks that can,
    or a pooling that creates cells without tokens.
    """
    grid = input_grid
    for index, spec in enumerate(blocks):
        query_grid, key_grid = spec.query_grid(grid), spec.key_grid(grid)
        for pool, pooled in ((spec.pool_q, query_grid), (spec.pool_kv, key_grid)):
            if index >= min(sampling_blocks, default=len(blocks)) and pool and pooled != divide(grid, pool.stride):
                raise UserError(
                    f"ATS needs odd pooling kernels, block {index} has {list(pool.kernel)}: set MVIT.POOL_KVQ_KERNEL."
                )
        grid = query_grid
    allowed = blocks_that_can_sample(blocks, input_grid)
    refused = sorted(set(sampling_blocks) - set(allowed))
    if refused:
        raise UserError(
            f"ATS.BLOCKS: {refused} cannot sample patches on a grid {' x '.join(map(str, input_grid))}, because the "
            f"pooled keys that are scored are not groups of their tokens. Blocks that can: {allowed}."
        )
