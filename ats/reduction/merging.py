"""Building blocks of merging reductions on ragged tokens: groups of tokens, their weighted means, nearest tokens.

Shapes: as in `base.py`; N rows of the longest sequence in the padded layout, C channels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from ats.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ats.reduction.base import Step
    from ats.tokens import Layout, RaggedTokens


def sizes(tokens: RaggedTokens, dtype: torch.dtype) -> Tensor:
    """[T] how many original tokens each token stands for."""
    return tokens.x.new_ones(tokens.x.shape[0], dtype=dtype) if tokens.size is None else tokens.size


def size_bias(size: Tensor | None, factor: float) -> Tensor | None:
    """The bias on the logits of keys that stand for several tokens: factor * log(size); None if there is none."""
    if size is None or factor == 0:
        return None
    return size.log() if factor == 1 else factor * size.log()


def weighted_mean(x: Tensor, weight: Tensor, target: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """The weighted mean of every group of rows, and each group's total weight. A row alone in its group stays exactly
    the same.

    Args:
        x: [T, C]. weight: [T], float32 or better. target: [T] int64, the group of each row; -1: in no group.
        index: [T'] int64, a row of each group; arbitrary for padding, a group without rows.

    Returns:
        [T', C] in the dtype of x, and [T']; for padding arbitrary finite values, and 1.
    """
    num_groups = index.shape[0]
    total = group_sums(weight, target, num_groups)
    total = torch.where(total > 0, total, 1)
    group = target.clamp_min(0)
    share = weight / total.index_select(0, group)
    own = torch.arange(x.shape[0], device=x.device)
    joins = (target >= 0) & (index.index_select(0, group) != own)  # the others of each group
    mean = x.index_select(0, index) * share.index_select(0, index)[:, None]
    if x.is_cuda or torch.compiler.is_compiling():  # nonzero would be a host wait, or a data-dependent shape
        group = torch.where(joins, group, num_groups)  # an extra row, cut off: NaN * 0 is NaN
        mean = torch.cat([mean, mean.new_zeros(1, mean.shape[1])])
        mean = mean.index_add(0, group, x * share[:, None])[:num_groups]
    else:
        rows = joins.nonzero().squeeze(1)
        joining = x.index_select(0, rows) * share.index_select(0, rows)[:, None]
        mean.index_add_(0, group.index_select(0, rows), joining)
    return mean.to(x.dtype), total


def group_sums(x: Tensor, target: Tensor, num_targets: int) -> Tensor:
    """[num_targets] sums of x [T] over the rows with this target; -1: in no group."""
    target = torch.where(target >= 0, target, num_targets)
    return x.new_zeros(num_targets + 1).index_add(0, target, x)[:num_targets]


def nearest_kept(step: Step) -> Tensor:
    """[T] int64: for every token of a block's input the row of `step.kept` that absorbs it. For a kept token that is
    itself, else the kept candidate with the nearest key (cosine, all heads as one vector); -1 for padding.

    Prefix tokens absorb no others.
    """
    layout, kept, num_prefix = step.tokens.layout, step.kept.layout, step.tokens.num_prefix_tokens
    dtype = torch.promote_types(step.k.dtype, torch.float32)
    with torch.autocast(step.k.device.type, enabled=False):
        unit = torch.nn.functional.normalize(step.k.detach().flatten(1).to(dtype), dim=1)
        similarity = layout.pad(unit) @ kept.pad(unit.index_select(0, step.index)).transpose(1, 2)  # [S, M, M']
        similarity[:, :, :num_prefix] = -torch.inf
        similarity = similarity.masked_fill(~kept.mask[:, None], -torch.inf)
    nearest = layout.unpad(similarity.argmax(dim=2)) + kept.start.index_select(0, layout.sequence)
    own = torch.arange(step.index.shape[0], device=nearest.device)
    if not kept.full:  # a padding row holds some dropped token
        own = torch.where(kept.mask.flatten(), own, nearest.index_select(0, step.index))
    nearest = nearest.index_copy(0, step.index, own)
    return nearest if layout.full else nearest.masked_fill(~layout.mask.flatten(), -1)


def nearest_among(k: Tensor, layout: Layout, takes: Tensor, num_prefix_tokens: int) -> Tensor:
    """[T] int64: for every token the row of the nearest token of its sequence (cosine of the keys) among those marked
    in `takes` [S, M], prefix tokens excluded.
    """
    dtype = torch.promote_types(k.dtype, torch.float32)
    with torch.autocast(k.device.type, enabled=False):
        unit = torch.nn.functional.normalize(layout.pad(k.detach().flatten(1).to(dtype)), dim=2)
        takes = takes & (torch.arange(layout.longest, device=takes.device) >= num_prefix_tokens)
        similarity = (unit @ unit.transpose(1, 2)).masked_fill(~takes[:, None], -torch.inf)
    return layout.unpad(similarity.argmax(dim=2) + layout.start[:, None])


def fuse_dropped(step: Step, weight: Tensor, *, limit: int) -> RaggedTokens:
    """The kept tokens and, at the end of each sequence that lost some, one more: the weighted mean of the lost ones.

    Args:
        weight: [T] of every token of the block's input. limit: the most tokens a sequence can have then.
    """
    tokens, kept, layout = step.tokens, step.kept, step.kept.layout
    goes = tokens.layout.mask & ~step.mask  # [S, M]
    size, weight = ((tokens.layout.pad(t) * goes).to(weight.dtype) for t in (sizes(tokens, weight.dtype), weight))
    padded = tokens.layout.pad(tokens.x).masked_fill(~goes[..., None], 0)  # NaN * 0 is NaN
    total = weight.sum(dim=1, keepdim=True)
    x = (padded * weight[..., None]).sum(dim=1) / torch.where(total > 0, total, 1)
    x, size = x.to(kept.x.dtype), size.sum(dim=1)
    column = torch.arange(layout.longest + 1, device=goes.device)
    loses = tokens.layout.lengths > layout.lengths
    lengths = layout.lengths + loses
    single = not isinstance(layout.longest, int)  # in a graph where the number of tokens depends on the image
    if single:
        columns = only(lengths, layout.longest + 1)
    elif layout.kind == "padded":
        columns = int(lengths.max())
    else:
        columns = min(limit, layout.longest + 1) if layout.kind == "static" else layout.longest + 1
    last = ((column == layout.lengths[:, None]) & loses[:, None])[:, :columns]

    def extended(rows: Tensor, value: Tensor | int) -> Tensor:
        padded = layout.pad(rows)
        padded = torch.cat([padded, padded[:, :1]], dim=1)[:, :columns]
        return torch.where(last.reshape(*last.shape, *[1] * (padded.ndim - 2)), value, padded)

    fused = repack(
        kept,
        None if single else lengths,
        max_tokens=limit,
        x=extended(kept.x, x[:, None]),
        position=extended(kept.position, -1),
        size=extended(sizes(kept, weight.dtype), size[:, None]),
    )
    if step.follows:
        place = torch.where(goes, layout.lengths[:, None], step.mask.cumsum(dim=1) - 1)
        step.taken_by = tokens.layout.unpad(place + fused.layout.start[:, None])
    return replace(fused, has_fused=True)


def only(lengths: Tensor, most: int) -> int:
    """The one entry of `lengths` [1], in a graph where it depends on the image; at most `most`."""
    from ats.compat import export_check

    length: Any = lengths.item()
    export_check(length >= 2)
    export_check(length <= most)
    return length


def cls_row(step: Step) -> Tensor:
    """[S, H, N] attention of CLS to every token, float32 or better; for reductions after the attention."""
    from ats.attention import cls_attention

    layout = step.kept.layout
    dtype = torch.promote_types(step.k.dtype, torch.float32)
    with torch.autocast(step.k.device.type, enabled=False):
        bias = None if step.bias is None else step.bias[:, :, 0]
        q = layout.first_rows(step.q).to(dtype)
        return cls_attention(q, step.k.to(dtype), keys=layout, scale=step.scale, bias=bias)


class Matching(NamedTuple):
    """Which tokens merge, in the padded layout."""

    order: Tensor  # [S, N'] positions of the tokens that stay, in their new order; arbitrary for padding
    target: Tensor  # [S, N] where each token goes, as an index into `order`; -1: nowhere (dropped, or padding)
    lengths: Tensor  # [S] number of tokens that stay

    def merge(self, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """The mean of every group of tokens that merge, weighted by how many original tokens each one stands for.

        Args:
            x: [S, N, C]. size: [S, N], float32 or better.

        Returns:
            [S, N', C] and the new sizes [S, N'].
        """
        num_sequences, length = self.order.shape
        sequence = torch.arange(num_sequences, device=x.device)[:, None]
        target = torch.where(self.target >= 0, sequence * length + self.target, -1).flatten()
        index = (sequence * x.shape[1] + self.order).flatten()
        x, size = weighted_mean(x.flatten(0, 1), size.flatten(), target, index)
        return x.unflatten(0, (num_sequences, length)), size.unflatten(0, (num_sequences, length))


def bipartite_soft_matching(
    metric: Tensor,
    r: int | Tensor,
    *,
    num_prefix_tokens: int = 1,
    lengths: Tensor | None = None,
    among: Tensor | None = None,
    above: Callable[[Tensor], Tensor | float] | None = None,
) -> Matching:
    """ToMe, section 3 and appendix D: split tokens into those at even positions (A) and odd positions (B). Each token
    of A proposes to its most similar token of B (cosine), and the r best proposals merge. Prefix tokens take no part.
    The new order is the prefix, the rest of A, the rest of B. It is not spatial, and it decides the next split.

    Args:
        metric: [S, N, D] the vectors to compare.
        r: 0 or more, for all sequences or [S]; at most half of the tokens, prefix tokens excluded, merge.
        lengths: [S] tokens per sequence, which come first in its row; None: N.
        among: [S] only the first that many tokens may merge; None: all.
        above: function from the cosine of each proposal, [S, A] with -inf where there is none, to the threshold above
            which proposals merge; None: no threshold.
    """
    num_sequences, num_tokens, _ = metric.shape
    if lengths is None:
        lengths = torch.full((num_sequences,), num_tokens, device=metric.device)
    metric = metric.detach()
    unit = metric / metric.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(metric.dtype).tiny)
    similarity = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)  # [S, A, B]
    position = torch.arange(num_tokens, device=metric.device)
    last = lengths if among is None else among
    may_merge = (position >= num_prefix_tokens) & (position < last[:, None])  # [S, N]
    allowed = may_merge[:, ::2, None] & may_merge[:, None, 1::2]
    best, partner = similarity.masked_fill(~allowed, -torch.inf).max(dim=2)
    num_merged = ((lengths - num_prefix_tokens) // 2).clamp_max(r).clamp_min(0)
    if above is not None:
        num_merged = num_merged.minimum((best.clamp_max(1) > above(best)).sum(dim=1))  # round-off above 1
    rank = inverse(best.argsort(dim=1, descending=True, stable=True))
    merged = rank < num_merged[:, None]  # [S, A]

    # The new order: prefix 0, rest of A 1, rest of B 2, padding and merged tokens last.
    place = torch.where(position < num_prefix_tokens, 0, 1 + position % 2).expand(num_sequences, -1)
    gone = torch.zeros_like(may_merge)
    gone[:, ::2] = merged
    place = place.masked_fill(gone | (position >= lengths[:, None]), 3)
    order = place.argsort(dim=1, stable=True)
    new_index = inverse(order)
    target = new_index.masked_fill(position >= lengths[:, None], -1)
    target[:, ::2] = torch.where(merged, new_index.gather(1, 2 * partner + 1), target[:, ::2])
    longest: Any = num_tokens
    if isinstance(r, int):  # sym: in an exported graph the number of tokens may depend on the image
        longest -= torch.sym_max(torch.sym_min(r, (num_tokens - num_prefix_tokens) // 2), 0)
    return Matching(order[:, :longest], target, lengths - num_merged)


def inverse(order: Tensor) -> Tensor:
    """The inverse of permutations [S, N]."""
    places = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter(1, order, places)


def rows_of(x: Tensor, index: Tensor) -> Tensor:
    """[S, N, ...] -> [S, M, ...], the rows `index` [S, M] of each sequence."""
    start = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (start + index).flatten()).unflatten(0, index.shape)


def repack_matched(
    step: Step, matching: Matching, size: Tensor, *, max_tokens: int, size_factor: float, uniform: bool
) -> RaggedTokens:
    """Apply a matching to `step.kept`: the tokens that are left.

    Args:
        size: [S, N], float32 or better, how many original tokens each token stands for.
        size_factor: see `Reduction.size_factor`. uniform: all sequences keep the same number.
    """
    tokens, layout = step.kept, step.kept.layout
    x, size = matching.merge(layout.pad(tokens.x), size)
    merged = repack(
        tokens,
        None if uniform else matching.lengths,
        max_tokens=max_tokens,
        x=x,
        position=layout.pad(tokens.position).gather(1, matching.order),
        size=size,
        key_bias=size_bias(size, size_factor),
    )
    if step.follows:
        taken_by = torch.where(matching.target >= 0, matching.target + merged.layout.start[:, None], -1)
        step.taken_by = layout.unpad(taken_by)
    return merged


def repack(
    tokens: RaggedTokens, lengths: Tensor | None, *, max_tokens: int, x: Tensor, **padded: Tensor | None
) -> RaggedTokens:
    """Padded rows as RaggedTokens.

    Args:
        tokens: the tokens they replace. lengths: [S] how many rows of each sequence are tokens; None: all.
        max_tokens: see `RaggedTokens`. x: [S, N', C].
        padded: other attributes of `RaggedTokens`, [S, N'] (position, size, key_bias), or None.
    """
    from ats.tokens import SINGLE

    longest = x.shape[1]
    if lengths is not None and tokens.layout.kind == SINGLE:
        longest, lengths = only(lengths, longest), None
    layout = tokens.layout.of_lengths(lengths, longest=longest)
    if not layout.full:  # padding rows have no position
        padded["position"] = torch.where(layout.mask, padded["position"], tokens.num_positions)
    rows: dict[str, Any] = {"layout": layout, "max_tokens": max_tokens}
    rows |= {name: None if t is None else layout.unpad(t[:, : layout.longest]) for name, t in padded.items()}
    return replace(tokens, x=layout.unpad(x[:, : layout.longest]), **rows)
