"""Merge early, sample late: similar tokens merge in the first blocks, where scores say little yet (ToMe); behind them
tokens are sampled by their scores (ATS), and what is dropped merges into its nearest kept token.

One number, R, sets the cost: the tokens that merge away in each early block. The number of sample points follows from
what is left: POINTS for each token. docs/COMPARISON.md compares it with its two halves and with others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ats.options import FROM_0, POSITIVE, PROBABILITY, option
from ats.reduction.base import Candidates, Reduction, Step, register
from ats.reduction.inverse_transform import InverseTransform
from ats.reduction.tome import ToMe

if TYPE_CHECKING:
    from torch import Tensor

    from ats.tokens import RaggedTokens


@register("merge_sample")
@dataclass(frozen=True)
class MergeSample(Reduction):
    """ToMe in the first blocks, ATS with merging behind them."""

    title = "merge, then ATS"
    amount = "r"

    r: int = option(
        8,
        "Of ATS.SAMPLER merge_sample: tokens that merge away in each of the early ATS.BLOCKS (at most half of those "
        "present); or a list with one entry per block of the network.",
        within=FROM_0,
        types=(int, list),
        per_block=True,
        give="the number of tokens to merge away, 0 or more",
    )
    switch: float = option(
        0.5,
        "Of ATS.SAMPLER merge_sample: share of the network's blocks, from the first, that merge; those behind sample.",
        within=PROBABILITY,
    )
    points: float = option(
        1.25,
        "Of ATS.SAMPLER merge_sample: sample points for each token that is left when sampling begins; K / tokens.",
        within=POSITIVE,
    )
    size_bias: float = option(
        0.75,
        "Of ATS.SAMPLER merge_sample: factor of log(size) on the logits of keys in the blocks that sample; it is 1 in "
        "those that merge.",
        within=PROBABILITY,
    )

    needs_cls = True

    @property
    def is_early(self) -> bool:
        """Whether this block merges instead of sampling."""
        return self.block < round(self.switch * self.depth)

    def part(self, max_tokens: int) -> ToMe | InverseTransform:
        """What this block does where at most `max_tokens` can come in."""
        network = {"block": self.block, "num_prefix_tokens": self.num_prefix_tokens, "has_cls": self.has_cls}
        if self.is_early:
            return ToMe(r=self.r, **network)
        k = max(round(self.points * max_tokens), self.num_prefix_tokens + 2)
        how = {"dropped": "merge", "merge_weight": "size_score", "size_bias": self.size_bias}
        return InverseTransform(num_tokens=k, min_tokens=0, **how, **network)

    @property
    def after_attention(self) -> bool:
        return self.is_early

    @property
    def selects(self) -> bool:
        return not self.is_early

    @property
    def size_factor(self) -> float:
        return 1.0 if self.is_early else self.size_bias

    def select(self, candidates: Candidates) -> Tensor:
        return self.part(candidates.max_tokens + self.num_prefix_tokens).select(candidates)

    def merge(self, step: Step) -> RaggedTokens:
        return self.part(step.tokens.max_tokens).merge(step)

    def limit(self, max_tokens: int) -> int:
        return self.part(max_tokens).limit(max_tokens)

    def multiply_adds(self, num_in: Tensor, num_out: Tensor, *, head_dim: int, num_heads: int) -> Tensor | int:
        return self.part(0).multiply_adds(num_in, num_out, head_dim=head_dim, num_heads=num_heads)

    @classmethod
    def variants(cls) -> list[dict[str, object]]:
        return [{"switch": switch, "points": points} for switch in (1 / 3, 0.5, 0.75) for points in (1.0, 1.25, 2.0)]

    @classmethod
    def usual_blocks(cls, depth: int) -> list[int]:
        return list(range(depth))

    def scaled(self, scale: float, max_tokens: int, stagger: float) -> MergeSample:
        """Up to 1 fewer tokens merge; above, there are more sample points for each token."""
        merging = self.part(max_tokens).scaled(scale, max_tokens, stagger) if self.is_early else ToMe(r=0)
        return replace(self, r=merging.r, points=self.points * max(scale, 1.0))
