"""K of every ATS block for a mean budget: a search over one scale, then over the blocks. Networks are costs here.

K of ATS block b at the scale s, with B blocks, n_b token slots and the weight w_b (1 unless refined):

    K_b(s) = max(lowest_b, floor(s * w_b * n_b + (b + 1/2) / B)),   b = 0 .. B-1

At s = 1 that is K = n, the paper's setting; above it there are more sample points than tokens, so more tokens are
picked. The last term lets the blocks step one after the other instead of all at once: steps of the mean cost are B
times finer, which matters where K is a few tens.

The mean cost does not fall as s grows, but for a few images that keep a token less with one point more; the search
bears that, because it goes by what it has measured.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

MAX_SCALE = 64.0  # sample points per token; beyond, hardly another token is picked
MAX_STEPS = 60

NumTokens = tuple[int, ...]


@dataclass(frozen=True)
class Knobs:
    """What can be turned.

    Attributes:
        slots: of each ATS block, the tokens (cells) it chooses from where nothing was dropped.
        lowest: of each ATS block, the least K.
    """

    slots: tuple[int, ...]
    lowest: tuple[int, ...]

    def num_tokens(self, scale: float, weights: Sequence[float] | None = None) -> NumTokens:
        """K of each block at a scale."""
        weights = weights or [1.0] * len(self.slots)
        stagger = [(b + 0.5) / len(self.slots) for b in range(len(self.slots))]
        return tuple(
            max(lowest, math.floor(scale * w * n + rest))
            for n, lowest, w, rest in zip(self.slots, self.lowest, weights, stagger, strict=True)
        )

    @property
    def least(self) -> NumTokens:
        """The lowest K everywhere."""
        return self.lowest

    @property
    def most(self) -> NumTokens:
        """So many sample points that hardly a token is left out."""
        return self.num_tokens(MAX_SCALE)


@dataclass(frozen=True)
class Trial:
    """What a choice of K has been measured to do.

    Attributes:
        num_tokens: K of each ATS block. cost: mean over the images, in the budget's unit.
        changes: how far each image's logits are from the dense network's; empty where that was not asked for.
    """

    num_tokens: NumTokens
    cost: float
    changes: tuple[float, ...] = ()

    def surely_nearer_than(self, other: Trial) -> bool:
        """Whether the logits change less, by two standard errors of the mean difference over the images.

        Without the margin a search over many K picks what happens to suit these images, and others come out worse.
        """
        differences = [a - b for a, b in zip(self.changes, other.changes, strict=True)]
        mean = statistics.fmean(differences)
        error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
        return mean < -2 * error


Measure = Callable[[NumTokens], Trial]


def remembered(measure: Measure) -> Measure:
    """`measure`, which is asked for the same K once only."""
    trials: dict[NumTokens, Trial] = {}

    def once(num_tokens: NumTokens) -> Trial:
        if num_tokens not in trials:
            trials[num_tokens] = measure(num_tokens)
        return trials[num_tokens]

    return once


def bisect(
    measure: Measure,
    knobs: Knobs,
    target: float,
    *,
    weights: Sequence[float] | None = None,
    bracket: tuple[float, float] | None = None,
    tolerance: float = 0.002,
) -> tuple[float, Trial]:
    """The scale whose cost is `target`, by bisection of its logarithm.

    Args:
        measure: a remembered one; costs at the ends of the bracket are on either side of the target.
        bracket: scales to search between; by default all.
        tolerance: relative error of the cost at which to stop. Where no K comes as near, the nearest that was seen.

    Returns:
        The scale and what was measured there.
    """
    weights = list(weights or [1.0] * len(knobs.slots))
    low, high = bracket or (min(1 / (w * n) for w, n in zip(weights, knobs.slots, strict=True)), MAX_SCALE)
    best: tuple[float, Trial] | None = None
    for _ in range(MAX_STEPS):
        scale = math.sqrt(low * high)
        trial = measure(knobs.num_tokens(scale, weights))
        if best is None or abs(trial.cost - target) < abs(best[1].cost - target):
            best = scale, trial
        if abs(trial.cost - target) <= tolerance * target or high / low < 1 + 1e-9:
            break
        if trial.cost < target:
            low = scale
        else:
            high = scale
        between = sum(knobs.num_tokens(high, weights)) - sum(knobs.num_tokens(low, weights))
        if between <= 1:  # neighbours, and at most one of them has not been measured
            for end in (low, high):
                trial = measure(knobs.num_tokens(end, weights))
                if abs(trial.cost - target) < abs(best[1].cost - target):
                    best = end, trial
            break
    assert best is not None
    return best


def refine(
    measure: Measure,
    knobs: Knobs,
    start: tuple[float, Trial],
    target: float,
    *,
    rounds: int = 2,
    step: float = 1.5,
    tolerance: float = 0.002,
) -> Trial:
    """Give blocks more or fewer tokens, one after the other at the same cost, wherever that changes the logits less.

    A block's weight is multiplied or divided by `step`, the scale found again that meets the budget, and the result
    kept if it is surely nearer to the dense network. A round tries every block; one that finds nothing makes the step
    smaller.

    Args:
        start: what `bisect` found.

    Returns:
        The best trial that is not above the budget by more than the tolerance (or the start): never worse than the
        start, and below the budget by a step of one K at most.
    """
    scale, best = start
    weights = [1.0] * len(knobs.slots)
    allowed = max(target * (1 + tolerance), best.cost)
    for _ in range(rounds):
        improved = False
        for b in range(len(weights)):
            for factor in (step, 1 / step):
                turned = [w * factor if i == b else w for i, w in enumerate(weights)]
                # Undoing the factor for all blocks leaves none above (below) what it was: the target lies between.
                bracket = tuple(sorted((scale, scale / factor)))
                found, trial = bisect(measure, knobs, target, weights=turned, bracket=bracket, tolerance=tolerance)
                if trial.cost <= allowed and trial.surely_nearer_than(best):
                    scale, best, weights, improved = found, trial, turned, True
                    break
        if not improved:
            step = math.sqrt(step)
    return best
