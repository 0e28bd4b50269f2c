"""Merge early, sample late. The first blocks, where scores say little yet, merge redundant tokens. Later blocks sample
by score (ATS) and merge each dropped token into the nearest kept one.

Merging is adaptive, too. Tokens are ranked and paired by energy, as in PiToMe, and a pair merges if the cosine of its
keys is above the block's threshold: an image with much background loses more tokens than a crowded one.
`ats.calibrate` finds the thresholds that keep `ratio` of the tokens on average. Without thresholds, every image keeps
that share. docs/COMPARISON.md compares this reduction with its two halves and with others.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ats.options import POSITIVE, PROBABILITY, SHARE, option
from ats.reduction.base import Candidates, Reduction, Step, register
from ats.reduction.inverse_transform import InverseTransform
from ats.reduction.pitome import merge_redundant, multiply_adds, num_merged

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from ats.tokens import RaggedTokens

MARGIN = 0.75  # of the energy in block 0; it falls linearly, as in PiToMe
EQUAL = 0.9999  # larger cosines differ by round-off only; no threshold may lie among them


@register("merge_sample")
@dataclass(frozen=True)
class MergeSample(Reduction):
    """Merge redundant tokens in the first blocks; ATS with merging in the later ones."""

    title = "merge, then ATS"
    amount = "ratio"

    ratio: float = option(
        0.9,
        "Of ATS.SAMPLER merge_sample: share of the present tokens, prefix tokens excluded, that each merging block "
        "keeps, with THRESHOLD on average; or a list with one entry per block of the network.",
        within=SHARE,
        types=(float, list),
        per_block=True,
        give="a share in (0, 1]",
    )
    threshold: float = option(
        0.0,
        "Of ATS.SAMPLER merge_sample: merge tokens whose keys have a cosine above this; how many depends on the image. "
        "A list with one entry per block of the network, found by calibration. 0: the same share for every image.",
        within=PROBABILITY,
        types=(float, list),
        per_block=True,
        give="a cosine from 0 to 1",
    )
    switch: float = option(
        0.75,
        "Of ATS.SAMPLER merge_sample: share of the network's blocks, from the first, that merge; later blocks sample.",
        within=PROBABILITY,
    )
    points: float = option(
        2.0,
        "Of ATS.SAMPLER merge_sample: sample points per token left when sampling begins; K / tokens.",
        within=POSITIVE,
    )
    size_bias: float = option(
        0.75,
        "Of ATS.SAMPLER merge_sample: factor on log(size), which is added to the keys' logits, in blocks that sample; "
        "it is 1 in blocks that merge.",
        within=PROBABILITY,
    )

    @property
    def num_merging(self) -> int:
        """Blocks of the network that merge instead of sampling."""
        return round(self.switch * self.depth)

    @property
    def is_early(self) -> bool:
        """Whether this block merges."""
        return self.block < self.num_merging

    @property
    def needs_cls(self) -> bool:
        return self.num_merging < self.depth

    def sampling(self, max_tokens: int) -> InverseTransform:
        """The sampler of a late block, if at most `max_tokens` can come in."""
        num_early = sum(block < self.num_merging for block in self.stage) if self.threshold else 0
        left = self.num_prefix_tokens + (max_tokens - self.num_prefix_tokens) * self.ratio**num_early
        return InverseTransform(
            num_tokens=max(round(self.points * left), self.num_prefix_tokens + 2),
            min_tokens=0,
            dropped="merge",
            merge_weight="size_score",
            size_bias=self.size_bias,
            block=self.block,
            num_prefix_tokens=self.num_prefix_tokens,
            has_cls=self.has_cls,
        )

    @property
    def after_attention(self) -> bool:  # type: ignore[override]
        return self.is_early

    @property
    def selects(self) -> bool:
        return not self.is_early

    @property
    def size_factor(self) -> float:
        return 1.0 if self.is_early else self.size_bias

    def select(self, candidates: Candidates) -> Tensor:
        return self.sampling(candidates.max_tokens + self.num_prefix_tokens).select(candidates)

    def merge(self, step: Step) -> RaggedTokens:
        if not self.is_early:
            return self.sampling(step.tokens.max_tokens).merge(step)
        margin, above = MARGIN * (1 - self.block / self.depth), self.above(step)
        ratio = self.ratio if above is None else 0.5  # no more than half can merge
        return merge_redundant(step, ratio, margin=margin, size_factor=self.size_factor, above=above)

    def above(self, step: Step) -> Callable[[Tensor], float] | None:
        """A function from a batch's cosines of proposals [S, A] to the threshold; None: merge by `ratio` alone."""
        return (lambda cosines: self.threshold) if self.threshold else None

    def limit(self, max_tokens: int) -> int:
        if not self.is_early:
            return self.sampling(max_tokens).limit(max_tokens)
        return max_tokens - (0 if self.threshold else num_merged(max_tokens - self.num_prefix_tokens, self.ratio))

    def multiply_adds(self, num_in: Tensor, num_out: Tensor, *, head_dim: int, num_heads: int) -> Tensor | int:
        if not self.is_early:
            return self.sampling(0).multiply_adds(num_in, num_out, head_dim=head_dim, num_heads=num_heads)
        return multiply_adds(num_in - self.num_prefix_tokens, head_dim)

    @classmethod
    def variants(cls) -> list[dict[str, Any]]:
        return [{"switch": switch, "points": points} for switch in (0.5, 0.75, 1.0) for points in (1.25, 2.0)]

    @classmethod
    def usual_blocks(cls, depth: int) -> list[int]:
        return list(range(depth))

    def scaled(self, scale: float, max_tokens: int, stagger: float) -> MergeSample:
        """A scale above 1 gives more sample points per token."""
        ratio = min(max(scale, 0.5), 1.0)
        return replace(self, ratio=ratio, threshold=0.0, points=self.points * max(scale, 1.0))

    def learning(self, found: dict[int, list[float]]) -> MergeSample:
        return _Learning(**self.__dict__, found=found) if self.is_early else self

    def learned(self, found: dict[int, list[float]]) -> MergeSample:
        if not found:
            return self
        own = found.get(self.block, [1.0])
        return replace(self, threshold=max(round(sum(own) / len(own), 4), 1e-4))


@dataclass(frozen=True)
class _Learning(MergeSample):
    """Finds this block's threshold from a batch: the one that keeps `ratio` of the tokens over all its images."""

    found: dict[int, list[float]] = field(default_factory=dict, compare=False)

    def limit(self, max_tokens: int) -> int:
        return max_tokens

    def above(self, step: Step) -> Callable[[Tensor], float]:
        lengths = step.kept.layout.lengths - self.num_prefix_tokens

        def learn(cosines: Tensor) -> float:
            cosines = cosines[cosines.isfinite()].sort(descending=True).values
            num = min(int((lengths * (1 - self.ratio)).sum()), len(cosines))
            limit = min(cosines[num].item(), EQUAL) if 0 < num < len(cosines) else float(num == 0)
            self.found.setdefault(self.block, []).append(limit)
            return limit

        return learn
