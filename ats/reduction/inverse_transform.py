"""Adaptive Token Sampling (Fayyaz et al., ECCV 2022), section 3: from significance scores to kept tokens.
Equation numbers are ours, in the order of the text.

    (1)  s_j = sum_h A_h[cls, j] * ||v_j||                significance score     `scores.significance_score`
    (2)  c_i = sum_{j <= i} s_j / sum_j s_j               its CDF
    (3)  y_k, k = 1 .. n                                  fixed sample points
    (4)  kept = { argmin_i |c_i - y_k| : k = 1 .. n }     inverse transform      `nearest_to_points`
    (5)  A^s V                                            kept queries over all tokens: `models/block.py`

n (`num_points`) is K minus the prefix tokens. A token picked by several sample points is kept once, so the number of
kept tokens depends on the image. `official_rule` follows the released code where that is independent of the batch
(DROP_TOKENS False), `paper_rule` the text. Both handle each sequence by itself.

`ats/kernels/` has native versions of the official rule and of CLS scores, used where they can run. Tests compare them
with these functions. Change all of them together.

Degenerate scores never raise and never drop everything:

* a NaN or infinite score, or all scores zero: all tokens count equally, so n of them are kept, evenly spread;
* equal scores: ranked by position, the earliest lowest;
* one candidate: kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ats.lazy import torch
from ats.options import option
from ats.reduction.base import Candidates, register
from ats.reduction.sampler import Sampler
from ats.reduction.scores import usable

if TYPE_CHECKING:
    from torch import Tensor


def official_rule(candidates: Candidates, num_points: int) -> Tensor:
    """[S, M] bool. As in the official code: sort the scores, subtract the lowest from the CDF if nothing has been
    dropped yet (so that token is not kept), and space the sample points evenly from the smallest non-zero CDF value
    to 1.
    """
    valid, scores = candidates.valid, usable(candidates.scores, candidates.valid)
    ranked, order = scores.sort(dim=1, stable=True)  # padding is 0, comes first and adds nothing
    cdf = ranked.cumsum(dim=1)
    # (2), minus its lowest entry, unless that is all there is: keep a single candidate.
    lowest = scores.masked_fill(~valid, torch.inf).amin(dim=1, keepdim=True)
    subtract = candidates.complete[:, None] & (lowest < cdf[:, -1:])
    lowest = torch.where(subtract, lowest, 0)
    cdf = ((cdf - lowest) / (cdf[:, -1:] - lowest)).clamp_min(0)
    # (3)
    first = cdf.masked_fill(cdf <= 0, torch.inf).amin(dim=1, keepdim=True)
    step = (1 - first) / max(num_points - 1, 1)
    # (4)
    picked = nearest_to_points(cdf, first=first, step=step, num_points=num_points)
    return torch.empty_like(picked).scatter(1, order, picked)


def paper_rule(candidates: Candidates, num_points: int) -> Tensor:
    """[S, M] bool. As in the text: no sorting by score, no subtraction, sample points (2k - 1) / 2n.

    A token of score 0 has probability 0 and is never kept: of several equal CDF entries, the first carries the mass and
    takes the points. A score too small to change the CDF counts as 0: below about 6e-8 of the mass in float32, 1e-16 in
    float64.
    """
    scores = usable(candidates.scores, candidates.valid)
    # (2)
    cdf = scores.cumsum(dim=1)
    cdf = cdf / cdf[:, -1:]
    # Move entries that add no mass to the back. Check `scores > 0` too: parallel sums on a GPU can differ by rounding
    # even where nothing was added.
    moved = (scores > 0) & (cdf > torch.nn.functional.pad(cdf[:, :-1], (1, 0)))
    cdf, order = cdf.masked_fill(~moved, torch.inf).sort(dim=1, stable=True)
    # (3)
    step = cdf.new_full((cdf.shape[0], 1), 1 / num_points)
    # (4)
    picked = nearest_to_points(cdf, first=step / 2, step=step, num_points=num_points)
    return torch.empty_like(picked).scatter(1, order, picked)


def nearest_to_points(cdf: Tensor, *, first: Tensor, step: Tensor, num_points: int) -> Tensor:
    """Which CDF entries are nearest to at least one of the points `first + i * step`, i = 0 .. num_points - 1.

    Entry i takes the points between the midpoints to its two neighbours (a point on a midpoint goes to the lower
    entry). So it is picked if and only if more points lie below its upper midpoint than below its lower one. With
    evenly spaced points, one floor gives that number: no search, no sort, no `unique`, fixed shapes.

    Args:
        cdf: [S, M], non-decreasing. Padding is zero, before all points, or infinite, after them: it is never picked.
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


RULES = {"official": official_rule, "paper": paper_rule}


@register("inverse_transform")
@dataclass(frozen=True)
class InverseTransform(Sampler):
    """The paper's sampling: tokens nearest to fixed points of the scores' CDF."""

    section, title = "ATS", "ATS"

    rule: str = option(
        "official",
        "Details of inverse transform sampling: as in the official code with DROP_TOKENS False, or as in the paper.",
        choices=tuple(RULES),
    )

    def choose(self, candidates: Candidates, num_points: int) -> Tensor:
        if self.rule == "official":
            from ats import kernels

            kept = kernels.official_rule(candidates.scores, candidates.lengths, candidates.full_length, num_points)
            if kept is not None:
                return kept
        return RULES[self.rule](candidates, num_points)
