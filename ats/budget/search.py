"""How much each block keeps, for a mean budget: a search over one scale, then over the blocks. All it knows of a
network is `measure`.

The amount is the reduction's `amount`: K for sampling, r for ToMe, the keep rate for EViT. `Reduction.scaled` computes
it from the scale s. For sampling with B blocks, n_b tokens to choose from and weight w_b (1 unless refined):

    K_b(s) = max(lowest_b, floor(s * w_b * n_b + (b + 1/2) / B)),   b = 0 .. B-1

At s = 1, K = n, the paper's setting; above it there are more sample points than tokens, so more tokens are picked. The
last term makes blocks step one after the other instead of all at once: the mean cost moves in steps B times finer,
which matters where K is a few tens.

Cost is almost monotone in s (a few images keep one token fewer with one more point); bisection keeps the best point it
measured.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ats.reduction import Reduction
from ats.reduction.sampler import MAX_SCALE

MAX_STEPS = 60

Setting = tuple[Reduction, ...]  # of each block that loses tokens


@dataclass(frozen=True)
class Knobs:
    """What can be turned."""

    reductions: Setting
    max_tokens: tuple[int, ...]  # per block, the tokens (cells) to choose from if nothing was dropped, with prefix
    together: bool = False  # all blocks step at once: those that choose from the same number get the same amount

    def at(self, scale: float, weights: Sequence[float] | None = None) -> Setting:
        """The reductions at a scale."""
        num_blocks = len(self.reductions)
        weights = weights or [1.0] * num_blocks
        stagger = [0.5 if self.together else (b + 0.5) / num_blocks for b in range(num_blocks)]
        return tuple(
            reduction.scaled(scale * w, n, rest)
            for reduction, n, w, rest in zip(self.reductions, self.max_tokens, weights, stagger, strict=True)
        )

    @property
    def least(self) -> Setting:
        """The fewest tokens everywhere."""
        return self.at(0.0)

    @property
    def most(self) -> Setting:
        """Hardly any token is dropped."""
        return self.at(MAX_SCALE)


def amounts(setting: Setting) -> tuple[int | float, ...]:
    """The amount of each reduction."""
    return tuple(getattr(reduction, reduction.amount) for reduction in setting)


def are_neighbours(low: Setting, high: Setting) -> bool:
    """Whether at most one whole amount differs, by one, and nothing else."""
    if any(replace(a, **{a.amount: getattr(b, b.amount)}) != b for a, b in zip(low, high, strict=True)):
        return False
    steps = [b - a for a, b in zip(amounts(low), amounts(high), strict=True)]
    return all(isinstance(step, int) for step in steps) and sum(map(abs, steps)) <= 1


@dataclass(frozen=True)
class Trial:
    """What a setting has been measured to do."""

    setting: Setting
    cost: float  # mean over the images, in the budget's unit
    changes: tuple[float, ...] = ()  # each image's distance from the dense network's logits, if that was asked for

    def surely_nearer_than(self, other: Trial) -> bool:
        """Whether the logits change less, by two standard errors of the mean difference over the images.

        Without the margin the search picks what happens to suit these images, and others come out worse.
        """
        differences = [a - b for a, b in zip(self.changes, other.changes, strict=True)]
        mean = statistics.fmean(differences)
        error = statistics.stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 0.0
        return mean < -2 * error


Measure = Callable[[Setting], Trial]


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
        measure: a cached function; costs at the ends of the bracket are on either side of the target.
        bracket: scales to search between; by default all.
        tolerance: relative error of the cost at which to stop. If no setting comes that near, the nearest is returned.

    Returns:
        The scale and what was measured there.
    """
    weights = list(weights or [1.0] * len(knobs.reductions))
    low, high = bracket or (min(1 / (w * n) for w, n in zip(weights, knobs.max_tokens, strict=True)), MAX_SCALE)
    best: tuple[float, Trial] | None = None
    for _ in range(MAX_STEPS):
        scale = math.sqrt(low * high)
        trial = measure(knobs.at(scale, weights))
        if best is None or abs(trial.cost - target) < abs(best[1].cost - target):
            best = scale, trial
        if abs(trial.cost - target) <= tolerance * target or high / low < 1 + 1e-9:
            break
        if trial.cost < target:
            low = scale
        else:
            high = scale
        if are_neighbours(knobs.at(low, weights), knobs.at(high, weights)):  # one of them may not be measured yet
            for end in (low, high):
                trial = measure(knobs.at(end, weights))
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

    Multiply or divide a block's weight by `step`, search again for the scale that meets the budget, and keep the result
    if it is surely nearer to the dense network. A round tries every block; a round that finds nothing shrinks the step.

    Args:
        start: what `bisect` found.

    Returns:
        The best trial no further above the budget than the tolerance (or the start): never worse than the start, and at
        most one step of one block below the budget.
    """
    scale, best = start
    weights = [1.0] * len(knobs.reductions)
    allowed = max(target * (1 + tolerance), best.cost)
    for _ in range(rounds):
        improved = False
        for b in range(len(weights)):
            for factor in (step, 1 / step):
                turned = [w * factor if i == b else w for i, w in enumerate(weights)]
                # With the factor undone for all, no block keeps more (fewer) than before: the target lies between.
                low, high = sorted((scale, scale / factor))
                found, trial = bisect(measure, knobs, target, weights=turned, bracket=(low, high), tolerance=tolerance)
                if trial.cost <= allowed and trial.surely_nearer_than(best):
                    scale, best, weights, improved = found, trial, turned, True
                    break
        if not improved:
            step = math.sqrt(step)
    return best
