"""Accuracies with their spread, differences with their interval, and what follows for a claim.

Two variants are compared on the same canvases. Canvases of one digit image are not independent, so the digit is the
unit: a difference is averaged over the canvases of each digit, and its standard error is that of the mean over digits.
Where a variant was trained or draws at random, another seed would have given another difference: the standard error of
the mean over seeds is added, with Student's t for so few of them. (It counts the canvases once more, which makes the
interval too wide rather than too narrow.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Student's t, two-sided 95 %, by degrees of freedom.
T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
NORMAL95 = 1.96

HOLDS, FAILS, NOISE = "holds", "does not hold", "within the noise"


@dataclass(frozen=True)
class Estimate:
    """A mean and half the width of its 95 % interval."""

    mean: float
    half_width: float

    @property
    def low(self) -> float:
        """Lower end."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """Upper end."""
        return self.mean + self.half_width

    def verdict(self, *, at_least: float = 0.0) -> str:
        """Whether the true value is above `at_least`: HOLDS if the whole interval is, FAILS if all of it is below."""
        if self.low > at_least:
            return HOLDS
        return FAILS if self.high < at_least else NOISE

    def __str__(self) -> str:
        return f"{self.mean:+.2f} ± {self.half_width:.2f}"


def t95(num: int) -> float:
    """Student's t for the mean of `num` values; infinite for one."""
    return math.inf if num < 2 else T95.get(num - 1, NORMAL95 + 2.6 / (num - 1))


def standard_error(values: np.ndarray) -> float:
    """Of the mean of independent values."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.inf


def contrast(terms: Sequence[tuple[float, np.ndarray]], units: np.ndarray, *, has_seeds: bool) -> Estimate:
    """The weighted sum of several variants' accuracies, in percent.

    Args:
        terms: (weight, hits), e.g. [(1, a), (-1, b)] for the difference; hits are [seeds, canvases].
        units: [canvases] the digit each canvas shows.
        has_seeds: whether the seeds of any variant change more than the canvases.
    """
    values = 100 * sum(weight * hits.astype(np.float64) for weight, hits in terms)
    per_unit = np.array([values[:, units == unit].mean() for unit in np.unique(units)])
    half_width = NORMAL95 * standard_error(per_unit)
    if has_seeds:
        half_width = math.hypot(half_width, t95(len(values)) * standard_error(values.mean(axis=1)))
    return Estimate(float(values.mean()), half_width)


def of_seeds(values: Sequence[float]) -> Estimate:
    """The mean of one value per seed."""
    values = np.asarray(values, dtype=np.float64)
    return Estimate(float(values.mean()), t95(len(values)) * standard_error(values))


def mean_and_spread(hits: np.ndarray) -> str:
    """Accuracy in percent, and its standard deviation over the seeds; hits are [seeds, canvases]."""
    per_seed = 100 * hits.mean(axis=1)
    return f"{per_seed.mean():.2f} ± {per_seed.std(ddof=1):.2f}" if len(per_seed) > 1 else f"{per_seed.mean():.2f}"
