"""PiToMe (Tran et al., Accelerating Transformers with Spectrum-Preserving Token Merging, NeurIPS 2024): every block
merges redundant tokens after the attention. A token is redundant if many others are similar to it: its energy is high.

    e_i = mean_j f(cos(k_i, k_j) - m),   f(z) = z above 0, else exp(z) - 1,   m = margin * (1 - block / depth)

In the first half of the blocks, energy only decides the split into proposers and partners. In the second half, the 2r
tokens with the highest energy merge in pairs and all others are protected.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ats.lazy import torch
from ats.options import PROBABILITY, SHARE, option
from ats.reduction.base import Scheduled, Step, register
from ats.reduction.merging import Matching, bipartite_soft_matching, repack_matched, rows_of, sizes

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ats.tokens import RaggedTokens


@register("pitome")
@dataclass(frozen=True)
class PiToMe(Scheduled):
    """Merge redundant tokens, a share of those present."""

    title = "PiToMe"
    amount = "ratio"
    after_attention = True

    ratio: float = option(
        0.9,
        "Of ATS.SAMPLER pitome: share of the present tokens, prefix tokens excluded, that each of ATS.BLOCKS keeps; or "
        "a list with one entry per block of the network.",
        within=SHARE,
        types=(float, list),
        per_block=True,
        give="a share in (0, 1]",
    )
    margin: float = option(
        0.75,
        "Of ATS.SAMPLER pitome: similarity above which tokens count as redundant in block 0; it falls linearly.",
        within=PROBABILITY,
    )
    split_share: float = option(
        0.5,
        "Of ATS.SAMPLER pitome: share of the network's blocks, from the first, in which any token may merge; in later "
        "blocks only the most redundant ones may.",
        within=PROBABILITY,
    )
    prop_attn: bool = option(
        False, "Of ATS.SAMPLER pitome: proportional attention, which adds the log of a key's size to its logits."
    )

    @property
    def size_factor(self) -> float:
        return float(self.prop_attn)

    @property
    def protects(self) -> bool:
        """Whether tokens of low energy may not merge."""
        return self.block >= math.ceil(self.split_share * self.depth)

    def limit(self, max_tokens: int) -> int:
        return max_tokens - num_merged(max_tokens - self.num_prefix_tokens, self.ratio)

    def merge(self, step: Step) -> RaggedTokens:
        """Merge tokens whose keys, averaged over the heads, are similar."""
        margin = self.margin * (1 - self.block / self.depth)
        return merge_redundant(step, self.ratio, margin=margin, size_factor=self.size_factor, protects=self.protects)

    def multiply_adds(self, num_in: Tensor, num_out: Tensor, *, head_dim: int, num_heads: int) -> Tensor:
        return multiply_adds(num_in - self.num_prefix_tokens, head_dim)

    @classmethod
    def usual_blocks(cls, depth: int) -> list[int]:
        return list(range(depth))

    def scaled(self, scale: float, max_tokens: int, stagger: float) -> PiToMe:
        return replace(self, ratio=min(max(1 - (1 - scale) * self.schedule_factor, 0.5), 1.0))


def num_merged(num: int, ratio: float) -> int:
    """How many of `num` tokens (without prefix tokens) merge away to keep a share `ratio`."""
    return max(min(math.floor(num - num * ratio), num // 2), 0)


def multiply_adds(num: Tensor, head_dim: int) -> Tensor:
    """Of all similarities (for the energies) and of those between proposers and partners."""
    num_a = torch.ceil(num / 2)
    return (num * num + num_a * (num - num_a)) * head_dim


def merge_redundant(
    step: Step,
    ratio: float,
    *,
    margin: float,
    size_factor: float,
    protects: bool = False,
    above: Callable[[Tensor], Tensor | float] | None = None,
) -> RaggedTokens:
    """Merge redundant tokens of `step.kept`.

    Args:
        ratio: share of a sequence's tokens, without prefix tokens, to keep; with `above`, a lower bound.
        margin: of the energy. size_factor: see `Reduction`. protects: only the tokens of highest energy may merge.
        above: see `bipartite_soft_matching`; a sequence loses one token per proposal above the threshold.
    """
    tokens, layout, num_prefix = step.kept, step.kept.layout, step.kept.num_prefix_tokens
    if num_merged(tokens.max_tokens - num_prefix, ratio) == 0:
        return tokens  # no sequence has any to merge, in any batch
    if isinstance(layout.longest, int) and layout.longest < num_prefix + 2:
        return tokens  # not even one pair
    dtype = torch.promote_types(step.k.dtype, torch.float32)
    with torch.autocast(step.k.device.type, enabled=False):
        metric = layout.pad(step.k.detach().to(dtype).mean(dim=1))[:, num_prefix:]
        metric = torch.nn.functional.normalize(metric, dim=2)
        valid, num = layout.mask[:, num_prefix:], layout.lengths - num_prefix
        if not layout.full:
            metric = metric.masked_fill(~valid[:, :, None], 0)  # padding rows hold some dropped token
        energies = energy(metric, num, margin=margin)
        order = energies.masked_fill(~valid, -torch.inf).argsort(dim=1, descending=True, stable=True)
        r = (num - num.double() * ratio).floor().to(num.dtype).minimum(num // 2)
        matching = bipartite_soft_matching(
            rows_of(metric, order),
            r,
            num_prefix_tokens=0,
            lengths=num,
            among=2 * r if protects else None,
            above=above,
        )
        left = [
            n - (num_merged(n - num_prefix, ratio) if above is None else 0) for n in (layout.longest, tokens.max_tokens)
        ]
        return repack_matched(
            step,
            behind_prefix(matching, order, num_prefix, limit=left[0]),
            layout.pad(sizes(tokens, dtype)),
            max_tokens=left[1],
            size_factor=size_factor,
            uniform=above is None and layout.uniform and layout.full,
        )


def energy(unit: Tensor, num: Tensor, *, margin: float) -> Tensor:
    """[S, M] how redundant each token is: the mean of ELU(cosine - margin) over all tokens of its sequence.

    Args:
        unit: [S, M, D], rows of norm 1; zeros for padding. num: [S] tokens per sequence. margin: 0 or more.
    """
    # ELU(z) = exp(min(z, 0)) - 1 + z - min(z, 0). The cosine with padding is 0, and exp(min(0, margin)) is 1.
    low = (unit @ unit.transpose(1, 2)).clamp_max_(margin)
    total = (unit * unit.sum(dim=1, keepdim=True)).sum(dim=2) - low.sum(dim=2)
    total = total + math.exp(-margin) * (low.exp_().sum(dim=2) - (unit.shape[1] - num)[:, None])
    return total / num[:, None] - 1


def behind_prefix(matching: Matching, order: Tensor, num_prefix: int, *, limit: int) -> Matching:
    """Turn a matching of reordered tokens into one of the whole sequence, prefix tokens first.

    Args:
        order: [S, M] which token each place of `matching` refers to, prefix tokens not counted.
        limit: the most tokens of a sequence that stay, prefix tokens included.
    """
    prefix = torch.arange(num_prefix, device=order.device).expand(order.shape[0], -1)
    target = torch.where(matching.target >= 0, matching.target + num_prefix, -1)
    return Matching(
        torch.cat([prefix, order.gather(1, matching.order) + num_prefix], dim=1)[:, :limit],
        torch.cat([prefix, torch.empty_like(target).scatter(1, order, target)], dim=1),
        matching.lengths + num_prefix,
    )
