"""Reductions that choose up to K tokens by their significance scores."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from ats.options import AMOUNT, FROM_0, option
from ats.reduction.base import SCORES, Candidates, Naming, Reduction

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

MAX_SCALE = 64.0  # sample points per token; beyond this, hardly another token is picked


@dataclass(frozen=True)
class Sampler(Reduction):
    """At most K tokens of a sequence, chosen by score. Subclasses define `choose`."""

    section: ClassVar[str] = "ATS"
    amount: ClassVar[str] = "num_tokens"

    num_tokens: int | float = option(
        1.0,
        "K, the most tokens a block keeps, prefix tokens counted: a number (above 1; rounded) or a ratio (up to 1) of "
        "the most tokens that the block can get, so ratios compound; one value for all blocks, or a list with one "
        "entry per block of the network. Per image, per frame (XViT, TimeSformer) or per clip (TimeSformer with "
        "joint_space_time, MViT). In MViT and CvT K counts the cells that keys are pooled to, and CLS: a kept cell "
        "keeps all the tokens it stands for.",
        within=AMOUNT,
        types=(int, float, list),
        per_block=True,
        give="a ratio in (0, 1] or a number of tokens above 1",
    )
    score: str = option(
        SCORES[0],
        "Significance score of a token: attention of CLS x norm of its value (the paper), attention of CLS alone, or "
        "the mean attention it receives from all tokens (the only one for networks without CLS).",
        choices=SCORES,
    )
    min_tokens: int = option(
        8, "Lower bound of K; smaller values are raised to it. At least the prefix tokens + 2.", within=FROM_0
    )
    share_frames: bool = option(
        False,
        "Video: all frames of a segment (XViT) or clip (TimeSformer) keep the same patches, by their mean score; "
        "False: every frame its own.",
        networks=("XViT", "TimeSformer"),
    )

    def choose(self, candidates: Candidates, num_points: int) -> Tensor:
        """[S, M] bool, at most `num_points` (K less the prefix tokens) of a sequence's candidates; see
        `Reduction.select`.
        """
        raise NotImplementedError

    def select(self, candidates: Candidates) -> Tensor:
        return self.choose(candidates, self.num_points(candidates.max_tokens + self.num_prefix_tokens))

    def num_points(self, max_tokens: int) -> int:
        """K less the prefix tokens, at least 1."""
        return max(self.budget(max_tokens) - self.num_prefix_tokens, 1)

    def budget(self, max_tokens: int) -> int:
        """K where at most `max_tokens` can come in; the next block can get min(K, max_tokens)."""
        num_tokens = self.num_tokens if self.num_tokens > 1 else self.num_tokens * max_tokens
        return round(max(num_tokens, self.least))

    def limit(self, max_tokens: int) -> int:
        return min(self.budget(max_tokens), max_tokens)

    @property
    def least(self) -> int:
        """Lower bound of K."""
        return max(self.min_tokens, self.num_prefix_tokens + 2)

    def scaled(self, scale: float, max_tokens: int, stagger: float) -> Sampler:
        return replace(self, num_tokens=max(self.least, math.floor(scale * max_tokens + stagger)))

    @property
    def setting(self) -> tuple[str, object]:
        return "K", self.num_tokens

    @classmethod
    def check(cls, planned: Sequence[Sampler], naming: Naming) -> None:
        super().check(planned, naming)
        _say_what_changes(planned, naming)


def _say_what_changes(planned: Sequence[Sampler], naming: Naming) -> None:
    """One warning for all blocks whose K is not the number of tokens that was given."""
    changed: dict[int | float, list[Sampler]] = {}
    for sampler in planned:
        if sampler.num_tokens > 1 and sampler.num_tokens != sampler.budget(max_tokens=0):
            changed.setdefault(sampler.num_tokens, []).append(sampler)
    parts = []
    for k, samplers in changed.items():
        first = samplers[0]
        why = (
            f"{naming('min_tokens')} {first.least}"
            if first.least == first.min_tokens
            else f"{first.num_prefix_tokens} prefix tokens and two more"
        )
        reason = f"below {why}" if k < first.least else "not a whole number"
        where = f"blocks {_ranges([s.block for s in samplers])} use" if samplers[1:] else f"block {first.block} uses"
        parts.append(f"{naming('num_tokens')} {k} is {reason}: {where} {first.budget(max_tokens=0)}")
    if parts:
        logger.warning("%s.", "; ".join(parts))


def _ranges(blocks: list[int]) -> str:
    """Ascending blocks as "1, 3-5"."""
    starts = [block for block in blocks if block - 1 not in blocks]
    ends = [block for block in blocks if block + 1 not in blocks]
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))
