"""From SlowFast's MVIT keys to the blocks of an MViT: widths, heads, poolings, grids; and which blocks can sample."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ats.errors import UserError
from ats.models.dense_grid import ONE, Grid
from ats.models.mvit.dense import BlockSpec, PoolSpec, divide


def plan_blocks(
    *,
    depth: int,
    embed_dim: int,
    num_heads: int,
    patch_grid: Grid,
    input_grid: Grid,
    dim_mul: Sequence[Sequence[float]] = (),
    head_mul: Sequence[Sequence[float]] = (),
    pool_q_stride: Sequence[Sequence[int]] = (),
    pool_kv_stride: Sequence[Sequence[int]] = (),
    pool_kv_stride_adaptive: Sequence[int] | None = None,
    pool_kvq_kernel: Sequence[int] | None = None,
    dim_mul_in_att: bool = False,
) -> list[BlockSpec]:
    """The blocks that SlowFast's MVIT keys describe (their names and meanings are in `config/defaults.py`).

    Args:
        patch_grid: size over stride, rounded down, by which SlowFast sizes its tables.
        input_grid: grid of the patches that come of this size, which may be larger.

    Raises:
        UserError: entries that do not fit the depth, the widths or the grid.
    """
    if pool_kv_stride_adaptive is not None and pool_kv_stride:
        raise UserError("MVIT.POOL_KV_STRIDE and MVIT.POOL_KV_STRIDE_ADAPTIVE exclude each other: set one to None.")
    widths, heads = _per_block("DIM_MUL", dim_mul, depth), _per_block("HEAD_MUL", head_mul, depth)
    strides_q = _per_block("POOL_Q_STRIDE", pool_q_stride, depth, length=3)
    strides_kv = _per_block("POOL_KV_STRIDE", pool_kv_stride, depth, length=3)
    specs, grid, table_grid, adaptive = [], input_grid, patch_grid, pool_kv_stride_adaptive
    dim = embed_dim
    for i in range(depth):
        num_heads = round(num_heads * heads.get(i, [1.0])[0])
        # v1 widens at the end of the block before the entry, v2 in the attention of the block itself.
        at = i if dim_mul_in_att else i + 1
        next_heads = num_heads if dim_mul_in_att else round(num_heads * heads.get(at, [1.0])[0])
        dim_out = round(dim * widths.get(at, [1.0])[0] / next_heads) * next_heads
        dim_attn = dim_out if dim_mul_in_att else dim
        if dim_attn % num_heads:
            raise UserError(
                f"Block {i} has width {dim_attn} and {num_heads} heads, which do not divide it: see MVIT.EMBED_DIM, "
                "MVIT.NUM_HEADS, MVIT.DIM_MUL and MVIT.HEAD_MUL."
            )
        stride_q = strides_q.get(i)
        if adaptive is not None:
            adaptive = [max(s // q, 1) for s, q in zip(adaptive, stride_q or ONE, strict=True)]
            strides_kv[i] = adaptive
        skip = PoolSpec(tuple(s + 1 if s > 1 else 1 for s in stride_q), tuple(stride_q)) if stride_q else None
        spec = BlockSpec(
            dim_in=dim,
            dim_attn=dim_attn,
            dim_out=dim_out,
            num_heads=num_heads,
            pool_q=_pool(stride_q, pool_kvq_kernel),
            pool_kv=_pool(strides_kv.get(i), pool_kvq_kernel),
            skip=None if skip is None or skip.stride == ONE else skip,
            grid=table_grid,
        )
        if spec.skip is not None and spec.skip.grid(grid) != spec.query_grid(grid):
            raise UserError(
                f"MVIT.POOL_Q_STRIDE {list(stride_q)} (block {i}): queries and the residual's max pooling come out as "
                f"{spec.query_grid(grid)} and {spec.skip.grid(grid)}; use strides 1, 2 or 4 and odd kernels."
            )
        specs.append(spec)
        grid = spec.query_grid(grid)
        table_grid = tuple(n // s for n, s in zip(table_grid, stride_q or ONE, strict=True))
        dim = dim_out
    return specs


def _per_block(name: str, entries: Sequence[Sequence[float]], depth: int, length: int = 1) -> dict[int, Sequence]:
    """[[block, value, ...], ...] as block -> values. DIM_MUL and HEAD_MUL may name the block behind the last."""
    result = {}
    for entry in entries:
        if not isinstance(entry, Sequence) or len(entry) != 1 + length or not 0 <= entry[0] <= depth:
            values = "t, h, w" if length == 3 else "factor"
            raise UserError(f"MVIT.{name} {entry}: give [[block, {values}], ...] with blocks 0 to {depth - 1}.")
        result[int(entry[0])] = list(entry[1:])
    return result


def _pool(stride: Sequence[int] | None, kernel: Sequence[int] | None) -> PoolSpec | None:
    if stride is None:
        return None
    kernel = tuple(kernel) if kernel is not None else tuple(s + 1 if s > 1 else 1 for s in stride)
    pool = PoolSpec(kernel, tuple(stride))
    return None if pool.is_identity else pool


def check_samplers(samplers: Collection[int], blocks: Sequence[BlockSpec], input_grid: Grid) -> None:
    """Refuse blocks that cannot sample: a dropped cell of the keys must stand for whole tokens of the block's output.

    Args:
        samplers: the blocks. input_grid: grid of the patches.

    Raises:
        UserError: names the blocks that can; or a pooling behind them leaves cells that stand for no token.
    """
    allowed, grid = [], input_grid
    for index, spec in enumerate(blocks):
        query_grid, key_grid = spec.query_grid(grid), spec.key_grid(grid)
        if spec.queries_per_cell(grid) is not None:
            allowed.append(index)
        for pool, pooled in ((spec.pool_q, query_grid), (spec.pool_kv, key_grid)):
            if index >= min(samplers, default=len(blocks)) and pool and pooled != divide(grid, pool.stride):
                raise UserError(
                    f"ATS needs odd pooling kernels, block {index} has {list(pool.kernel)}: set MVIT.POOL_KVQ_KERNEL."
                )
        grid = query_grid
    refused = sorted(set(samplers) - set(allowed))
    if refused:
        raise UserError(
            f"ATS.BLOCKS: {refused} cannot sample patches on a grid {' x '.join(map(str, input_grid))}, as the pooled "
            f"keys that are scored are not groups of their tokens. Blocks that can: {allowed}."
        )
