"""Reductions that choose up to K tokens by their significance scores."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from ats.lazy import torch
from ats.options import AMOUNT, FROM_0, PROBABILITY, option
from ats.reduction.base import SCORES, Candidates, Naming, Reduction, Step
from ats.reduction.merging import fuse_dropped, group_sums, nearest_kept, size_bias, sizes, weighted_mean
from ats.reduction.scores import usable

if TYPE_CHECKING:
    from torch import Tensor

    from ats.tokens import RaggedTokens

logger = logging.getLogger(__name__)

DROPPED = ("drop", "merge", "fuse")
MERGE_WEIGHTS = ("size", "size_score")
LEAST_SCORE = 1e-6  # lowest weight, relative to the highest score: a group of zero weight would have no mean
MAX_SCALE = 64.0  # sample points per token; more pick hardly any more tokens


@dataclass(frozen=True)
class Sampler(Reduction):
    """Keep at most K tokens of a sequence, chosen by score. Subclasses define `choose`."""

    section: ClassVar[str] = "ATS"
    amount: ClassVar[str] = "num_tokens"

    num_tokens: int | float = option(
        1.0,
        "K, the most tokens a block keeps, prefix tokens included: a number (above 1; rounded) or a ratio (up to 1) of "
        "the most tokens that the block can get, so ratios compound; one value for all blocks, or a list with one "
        "entry per block of the network. Per image, per frame (XViT, TimeSformer) or per clip (TimeSformer with "
        "joint_space_time, MViT). In MViT and CvT, K counts CLS and the cells that keys are pooled to: a kept cell "
        "keeps all the tokens it covers.",
        within=AMOUNT,
        types=(int, float, list),
        per_block=True,
        give="a ratio in (0, 1] or a number of tokens above 1",
    )
    score: str = option(
        SCORES[0],
        "Significance score of a token: attention of CLS x norm of the token's value (the paper), attention of CLS "
        "alone, or the mean attention it gets from all tokens (the only choice for networks without CLS).",
        choices=SCORES,
    )
    min_tokens: int = option(
        8, "Lower bound of K; smaller values are raised to it. At least the prefix tokens + 2.", within=FROM_0
    )
    dropped: str = option(
        "drop",
        "What to do with tokens that are not kept. drop: drop them (the paper). merge: average each one into the kept "
        "token with the nearest key. fuse: average them into one more token.",
        choices=DROPPED,
    )
    merge_weight: str = option(
        "size",
        "Weights for ATS.DROPPED merge and fuse: size (how many tokens one stands for) or size_score (size x "
        "significance score).",
        choices=MERGE_WEIGHTS,
    )
    prop_attn: bool = option(
        True,
        "Proportional attention: once tokens are merged, ATS.SIZE_BIAS * log(size) is added to the logits of a key.",
    )
    size_bias: float = option(1.0, "Factor on log(size) in ATS.PROP_ATTN.", within=PROBABILITY)
    share_frames: bool = option(
        False,
        "Video: all frames of a segment (XViT) or clip (TimeSformer) keep the same patches, by their mean score; "
        "False: each frame keeps its own.",
        networks=("XViT", "TimeSformer"),
    )

    def choose(self, candidates: Candidates, num_points: int) -> Tensor:
        """[S, M] bool, at most `num_points` (K minus the prefix tokens) candidates per sequence; see
        `Reduction.select`.
        """
        raise NotImplementedError

    def select(self, candidates: Candidates) -> Tensor:
        return self.choose(candidates, self.num_points(candidates.max_tokens + self.num_prefix_tokens))

    @property
    def merges(self) -> bool:
        return self.dropped != "drop" or type(self).merge is not Sampler.merge

    @property
    def merging_option(self) -> str:
        return "sampler" if self.dropped == "drop" else "dropped"

    @property
    def makes_fused(self) -> bool:  # type: ignore[override]
        return self.dropped == "fuse"

    @property
    def size_factor(self) -> float:
        return self.size_bias if self.prop_attn else 0.0

    def merge(self, step: Step) -> RaggedTokens:
        """Merge dropped tokens into kept ones, or fuse them into a new one (`dropped`). Either way, sizes add up."""
        tokens, dtype = step.tokens, torch.promote_types(step.tokens.x.dtype, torch.float32)
        size = weight = sizes(tokens, dtype)
        if self.merge_weight == "size_score":
            weight = size * self._scores(step).to(dtype)
        if self.dropped == "fuse":
            kept = fuse_dropped(step, weight, limit=self.limit(tokens.max_tokens))
        else:
            step.taken_by = nearest_kept(step)
            x, total = weighted_mean(tokens.x, weight, step.taken_by, step.index)
            if weight is not size:
                total = group_sums(size, step.taken_by, step.kept.layout.total)
            kept = replace(step.kept, x=x, size=total)
        kept.key_bias = size_bias(kept.size, self.size_factor)
        return kept

    def _scores(self, step: Step) -> Tensor:
        """[T] scores of the block's input as positive weights; 1 for prefix tokens."""
        candidates, layout = step.candidates, step.tokens.layout
        scores = usable(candidates.scores, candidates.valid)
        scores = torch.maximum(scores, LEAST_SCORE * scores.amax(dim=1, keepdim=True))
        scores = torch.nn.functional.pad(scores, (self.num_prefix_tokens, 0), value=1)
        frames = step.tokens.frames_per_clip if self.share_frames else 1
        return layout.unpad(scores.repeat_interleave(frames, dim=0) if frames > 1 else scores)

    def multiply_adds(self, num_in: Tensor, num_out: Tensor, *, head_dim: int, num_heads: int) -> Tensor | int:
        """Of the cosines between all tokens and the kept ones."""
        return num_in * num_out * head_dim * num_heads if self.dropped == "merge" else 0

    def num_points(self, max_tokens: int) -> int:
        """K minus the prefix tokens, at least 1."""
        return max(self.budget(max_tokens) - self.num_prefix_tokens, 1)

    def budget(self, max_tokens: int) -> int:
        """K if at most `max_tokens` can come in; the next block can get at most min(K, max_tokens)."""
        num_tokens = self.num_tokens if self.num_tokens > 1 else self.num_tokens * max_tokens
        return round(max(num_tokens, self.least))

    def limit(self, max_tokens: int) -> int:
        return min(self.budget(max_tokens) + self.makes_fused, max_tokens)

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
    def check(cls, planned: Sequence[Any], naming: Naming) -> None:
        super().check(planned, naming)
        _say_what_changes(planned, naming)


def _say_what_changes(planned: Sequence[Sampler], naming: Naming) -> None:
    """Log one warning for all blocks whose K differs from the number of tokens that was given."""
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
