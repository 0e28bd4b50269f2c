"""Adaptive Token Sampling (Fayyaz et al., ECCV 2022) on one page, as pure functions of one block's numbers.

    s_j = sum_h A_h[cls, j] * ||v_j||                   significance score   `significance_score`
    c_i = sum_{j <= i} s_j / sum_j s_j                  its CDF              `inverse_transform`
    kept = { argmin_i |c_i - y_k| : k = 1..K }          inverse transform    `nearest_to_points`

A token picked by several sample points y_k is kept once, so the number of kept tokens K' <= K follows the image. The
kept tokens then query all tokens of the block's input (A^s V): that is `ats_block.py`. Everything here looks at
one sequence at a time, never at the rest of the batch.

Shapes: S sequences, H heads, M longest number of candidate tokens, T tokens of all sequences together. A candidate is a
token that may be dropped, i.e. not a prefix token (CLS, distillation). `scores [S, M]` are padded with zeros at the
end; `valid [S, M]` marks candidates.

On a CPU this is some twenty operations on a few hundred numbers, so it costs what calling them costs: each one that can
be left out is.

Degenerate scores never raise and never drop everything:
* a NaN or infinite score, or all scores zero: nothing tells the tokens apart, all count the same (so K of them are
  kept, spread evenly);
* equal scores: ranked by position, the earliest lowest;
* one candidate: kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ats import kernels
from ats.caching import cached

if TYPE_CHECKING:
    from ats.tokens import RaggedTokens

RULES = ("official", "paper")
SCORES = ("cls_attention_value_norm", "cls_attention", "mean_attention")


def significance_score(attention: Tensor, value_norm: Tensor | None) -> Tensor:
    """The scores without their normalisation, which cancels in the CDF.

    Args:
        attention: [S, H, M] attention of CLS (or of all tokens on average) to each candidate.
        value_norm: [S, M] norm of each candidate's value over all heads; None leaves it out.

    Returns:
        [S, M] scores.
    """
    score = attention.sum(dim=1)
    return score if value_norm is None else score * value_norm


def usable(scores: Tensor, valid: Tensor) -> Tensor:
    """Scores in float32 or better; `valid`, i.e. ones, where a sequence's scores are not finite or have no mass."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    total = scores.sum(dim=1, keepdim=True)
    return torch.where((total > 0) & (total < torch.inf), scores, valid)


def nearest_to_points(cdf: Tensor, *, first: Tensor, step: Tensor, num_points: int) -> Tensor:
    """Which entries of a CDF are the nearest to at least one of the points `first + i * step`, i = 0 .. num_points - 1.

    Entry i takes the points between the midpoints to its two neighbours (a point on a midpoint goes to the lower
    entry), so it is picked if and only if the number of points below its upper midpoint exceeds that below its lower
    one. With evenly spaced points that number is one floor: no search, no sort, no `unique`, and fixed shapes.

    Args:
        cdf: [S, M], non-decreasing. Entries of padding are zeros in front of all points, or infinite behind them:
            neither is picked.
        first, step: [S, 1].

    Returns:
        [S, M] bool.
    """
    middle = (cdf[:, :-1] + cdf[:, 1:]) / 2
    below = ((middle - first) / step.clamp_min(torch.finfo(cdf.dtype).tiny)).floor().add(1).clamp(0, num_points)
    # The first entry also takes every point below it, the last every point above it.
    none = below.new_zeros(cdf.shape[0], 1)
    below = torch.cat([none, below, none + num_points], dim=1)
    return below[:, 1:] > below[:, :-1]


class Candidates:
    """The tokens one block may drop, S sequences padded to M.

    Attributes:
        scores: [S, M] significance scores, 0 where not valid.
        lengths: [S] int64 candidates of each sequence, which come first in its row.
        slots: where a sequence has as many candidates as this, nothing of it has been dropped yet.
        num_positions: length of the sequence the network began with.
        valid: [S, M] bool, True where there is a candidate.
        position: [S, M] index of the token in the sequence the network began with, ascending.
        fills_slots: [S] bool, `lengths == slots`.

    Args:
        position: gives the attribute. Like the other two it is made when a sampler asks for it.
    """

    def __init__(
        self, scores: Tensor, *, lengths: Tensor, slots: int, num_positions: int, position: Callable[[], Tensor]
    ) -> None:
        self.scores, self.lengths, self.slots, self.num_positions = scores, lengths, slots, num_positions
        self._position = position

    @cached
    def valid(self) -> Tensor:
        return torch.arange(self.scores.shape[1], device=self.lengths.device) < self.lengths[:, None]

    @cached
    def position(self) -> Tensor:
        return self._position()

    @cached
    def fills_slots(self) -> Tensor:
        return self.lengths == self.slots


def share_scores(candidates: Candidates, group: int) -> Candidates:
    """One set of candidates for each `group` of consecutive sequences (the frames of a clip) that hold the same tokens.

    Each sequence's scores are normalised before they are averaged, so every frame has the same say.

    Returns:
        Candidates of S / group sequences.
    """
    scores = usable(candidates.scores, candidates.valid)
    return Candidates(
        (scores / scores.sum(dim=1, keepdim=True)).unflatten(0, (-1, group)).mean(dim=1),
        lengths=candidates.lengths[::group].contiguous(),
        slots=candidates.slots,
        num_positions=candidates.num_positions,
        position=lambda: candidates.position[::group],
    )


# A sampler: (candidates, number of sample points, options of the block) -> [S, M] bool, True where kept.
Sampler = Callable[[Candidates, int, "BlockSampler"], Tensor]
SAMPLERS: dict[str, Sampler] = {}


def register_sampler(name: str) -> Callable[[Sampler], Sampler]:
    """Make a sampler available as `ATS.SAMPLER name`."""

    def register(sampler: Sampler) -> Sampler:
        SAMPLERS[name] = sampler
        return sampler

    return register


class TokenReducer(Protocol):
    """What one block does to have fewer tokens where that is no mask over them: merge, fuse (`reducers.py`)."""

    block: int

    def reduce(self, tokens: RaggedTokens, q: Tensor, k: Tensor, *, scale: float, bias: Tensor | None) -> RaggedTokens:
        """The tokens that go on, of those behind the attention and its residual.

        Args:
            tokens: sequences of one length. q, k: [T, H, D], of the block's attention.
            scale, bias: of its logits, bias [S, 1 or H, 1 or N, N].
        """

    def multiply_adds(self, num_tokens: Tensor, head_dim: int, num_heads: int) -> Tensor:
        """What `reduce` costs, [S] for sequences of `num_tokens` [S]."""


# Classes of reducers. `plan(block=, depth=, num_prefix_tokens=, options=, spell=)` makes the one of a block; `spell`
# turns the name of an option into what the user typed (`plan.py`).
REDUCERS: dict[str, type[TokenReducer]] = {}


def register_reducer(name: str) -> Callable[[type[TokenReducer]], type[TokenReducer]]:
    """Make a token reducer available as `ATS.SAMPLER name`."""

    def register(reducer: type[TokenReducer]) -> type[TokenReducer]:
        REDUCERS[name] = reducer
        return reducer

    return register


@register_sampler("inverse_transform")
def inverse_transform(candidates: Candidates, num_points: int, options: BlockSampler) -> Tensor:
    """Inverse transform sampling with fixed sample points, by `options.rule`.

    "official" is the official code with DROP_TOKENS False: scores sorted ascending; the lowest one subtracted from the
    CDF where nothing was dropped yet, so that it is not kept; points evenly from the smallest non-zero CDF value to 1.
    "paper" is the text: no sorting by score, no subtraction, points (2i + 1) / 2K. A token of score 0 has the
    probability 0 and is never kept: of equal entries of the CDF the first, which carries the mass, takes the points.
    So a score too small to move the CDF counts as 0: below some 6e-8 of the mass in float32, 1e-16 in float64.
    """
    if options.rule == "official":
        keep = kernels.official_rule(candidates.scores, candidates.lengths, candidates.slots, num_points)
        if keep is not None:
            return keep
    valid, scores = candidates.valid, usable(candidates.scores, candidates.valid)
    if options.rule == "paper":
        cdf = scores.cumsum(dim=1)
        cdf = cdf / cdf[:, -1:]
        # `scores > 0` as well: sums made in parallel, on a GPU, can differ by rounding where nothing was added.
        moved = (scores > 0) & (cdf > F.pad(cdf[:, :-1], (1, 0)))
        cdf, order = cdf.masked_fill(~moved, torch.inf).sort(dim=1, stable=True)  # as they lie, the others behind
        step = cdf.new_full((cdf.shape[0], 1), 1 / num_points)
        picked = nearest_to_points(cdf, first=step / 2, step=step, num_points=num_points)
        return torch.empty_like(picked).scatter(1, order, picked)

    ranked, order = scores.sort(dim=1, stable=True)  # padding, being 0, to the front, where it adds nothing
    cdf = ranked.cumsum(dim=1)
    lowest = scores.masked_fill(~valid, torch.inf).amin(dim=1, keepdim=True)
    subtract = candidates.fills_slots[:, None] & (lowest < cdf[:, -1:])  # a single candidate is its own lowest: keep it
    lowest = torch.where(subtract, lowest, 0)
    cdf = ((cdf - lowest) / (cdf[:, -1:] - lowest)).clamp_min(0)
    first = cdf.masked_fill(cdf <= 0, torch.inf).amin(dim=1, keepdim=True)
    step = (1 - first) / max(num_points - 1, 1)
    picked = nearest_to_points(cdf, first=first, step=step, num_points=num_points)
    return torch.empty_like(picked).scatter(1, order, picked)


@register_sampler("topk")
def top_k(candidates: Candidates, num_points: int, options: BlockSampler) -> Tensor:
    """The K highest scores (all candidates where there are fewer); the earlier token wins a tie."""
    rank = _descending_rank(usable(candidates.scores, candidates.valid).masked_fill(~candidates.valid, -1))
    return (rank < num_points) & candidates.valid


@register_sampler("random")
def random_k(candidates: Candidates, num_points: int, options: BlockSampler) -> Tensor:
    """K candidates chosen uniformly, by seed, block and original position alone: the batch makes no difference."""
    generator = torch.Generator().manual_seed(options.seed * 1009 + options.block)
    priority = torch.rand(candidates.num_positions, generator=generator, dtype=torch.float64).to(
        candidates.position.device
    )
    drawn = priority[candidates.position.clamp(max=candidates.num_positions - 1)]  # padding has no position
    rank = _descending_rank(drawn.masked_fill(~candidates.valid, -1))
    return (rank < num_points) & candidates.valid


def _descending_rank(values: Tensor) -> Tensor:
    order = values.sort(dim=1, descending=True, stable=True).indices
    rank = torch.arange(values.shape[1], device=values.device).expand_as(order)
    return torch.empty_like(order).scatter(1, order, rank)


@dataclass(frozen=True)
class BlockSampler:
    """What one ATS block does: how many tokens at most, and which.

    Attributes:
        block: index of the block in the network.
        num_tokens: K, prefix tokens counted: a number above 1, or a ratio up to 1 of the token slots.
        sampler: name in SAMPLERS. score: name in SCORES. rule: name in RULES.
        min_tokens: lower bound of K. seed: of the random sampler.
        share_frames: the frames of a clip keep the same patches, chosen by their mean score.
    """

    block: int
    num_tokens: int | float
    sampler: str = "inverse_transform"
    score: str = "cls_attention_value_norm"
    rule: str = "official"
    min_tokens: int = 8
    seed: int = 0
    share_frames: bool = False

    def budget(self, slots: int) -> int:
        """K of this block where the sequences have `slots` token slots; the next block has min(K, slots).

        Slots follow from the configuration alone, never from how many tokens an image kept.
        """
        num_tokens = self.num_tokens if self.num_tokens > 1 else self.num_tokens * slots
        return round(max(num_tokens, self.min_tokens))

    def __call__(self, candidates: Candidates, *, slots: int, num_prefix_tokens: int) -> Tensor:
        """[S, M] bool, True where a candidate is kept: at most K - prefix tokens in a sequence, at least one if it has
        any.
        """
        num_points = max(self.budget(slots) - num_prefix_tokens, 1)
        return SAMPLERS[self.sampler](candidates, num_points, self)
