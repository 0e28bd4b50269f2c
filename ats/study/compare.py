"""Accuracies with their spread, differences with their interval, and the verdicts on the claims of `digits.yaml`.

Two variants are compared on the same canvases. Canvases of one digit image are not independent, so the digit is the
unit: a difference is averaged over the canvases of each digit, and its standard error is that of the mean over digits.
If a variant was trained or draws at random, another seed would give another difference. Then the standard error of the
mean over seeds is added, with Student's t because there are so few of them. (This counts the canvases twice, which
makes the interval too wide rather than too narrow.)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ats.study.digits import CLAIMS, Row, StudySize

# Student's t, two-sided 95 %, by degrees of freedom.
T95 = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78, 5: 2.57, 6: 2.45, 7: 2.36, 8: 2.31, 9: 2.26}
NORMAL95 = 1.96

Terms = list[tuple[float, Row]]  # a weighted sum of accuracies
HOLDS, FAILS, NOISE = "holds", "does not hold", "within the noise"


@dataclass(frozen=True)
class Estimate:
    """A mean and half the width of its 95 % interval."""

    mean: float
    half_width: float

    def verdict(self, *, at_least: float = 0.0) -> str:
        """Whether the true value is above `at_least`: HOLDS if the whole interval is, FAILS if all of it is below."""
        if self.mean - self.half_width > at_least:
            return HOLDS
        return FAILS if self.mean + self.half_width < at_least else NOISE

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
        units: [canvases] the digit on each. has_seeds: the seeds of some variant change more than the canvases.
    """
    values: Any = 100 * sum(weight * hits.astype(np.float64) for weight, hits in terms)
    per_unit = np.array([values[:, units == unit].mean() for unit in np.unique(units)])
    half_width = NORMAL95 * standard_error(per_unit)
    if has_seeds:
        half_width = math.hypot(half_width, t95(len(values)) * standard_error(values.mean(axis=1)))
    return Estimate(float(values.mean()), half_width)


def of_seeds(values: Sequence[float]) -> Estimate:
    """The mean of one value per seed."""
    seeds = np.asarray(values, dtype=np.float64)
    return Estimate(float(seeds.mean()), t95(len(seeds)) * standard_error(seeds))


def mean_and_spread(hits: np.ndarray) -> str:
    """Accuracy in percent, and its standard deviation over the seeds; hits are [seeds, canvases]."""
    per_seed = 100 * hits.mean(axis=1)
    return f"{per_seed.mean():.2f} ± {per_seed.std(ddof=1):.2f}" if len(per_seed) > 1 else f"{per_seed.mean():.2f}"


@dataclass(frozen=True)
class Claim:
    """A claim and what the data say."""

    text: str
    paper: str  # its evidence in the paper
    overall: Estimate  # decides: the claim is that the true value is above `at_least`
    unit: str = "points"
    at_least: float = 0.0
    parts: tuple[tuple[str, Estimate], ...] = ()  # the same at single budgets, by label

    @property
    def verdict(self) -> str:
        """`holds`, `does not hold` or `within the noise`."""
        return self.overall.verdict(at_least=self.at_least)


class Claims:
    """Answers claims about the variants of a study, from the measurements alone. Variants are named by their ids."""

    def __init__(self, rows: Sequence[Row], size: StudySize, digits: np.ndarray, distractors: np.ndarray) -> None:
        self.rows = {(row.variant.id, row.budget): row for row in rows}
        self.budgets = sorted(size.budgets, reverse=True)
        self.digits = digits  # [canvases] the digit on each
        self.distractors = distractors  # [seeds, canvases] fragments beside it

    def all(self) -> list[Claim]:
        """Every claim, in order."""
        answers = []
        for claim in CLAIMS:
            test, *args = claim["test"]
            answers.append(getattr(self, test)(*args, text=claim["text"], paper=claim["paper"]))
        return answers

    def better(self, a: str, b: str, *, text: str = "", paper: str = "") -> Claim:
        """At the same cost `a` is better than `b`, averaged over the budgets."""
        overall = [term for budget in self.budgets for term in self._lead(a, b, budget, 1 / len(self.budgets))]
        parts = [(f"{budget} patches", self._contrast(self._lead(a, b, budget))) for budget in self.budgets]
        return Claim(text, paper, self._contrast(overall), parts=tuple(parts))

    def lead_grows(self, a: str, b: str, *, text: str, paper: str) -> Claim:
        """The lead of `a` over `b` is larger at the smallest budget than at the largest."""
        large, small = self.budgets[0], self.budgets[-1]
        return Claim(text, paper, self._contrast([*self._lead(a, b, small), *self._lead(a, b, large, -1.0)]))

    def loses_at_most(self, variant: str, points: float, *, text: str, paper: str) -> Claim:
        """At the paper's cost `variant` is at most `points` worse than dense; `{saved}` in the text is filled in."""
        row, dense = self.rows[variant, "saving"], self.rows["dense", None]
        text = text.format(saved=f"{1 - row.costs.mean() / dense.costs.mean():.0%}")
        return Claim(text, paper, self._contrast([(1, row), (-1, dense)]), at_least=-points)

    def tokens_follow_content(self, variant: str, *, text: str, paper: str) -> Claim:
        """The cost of an image rises with the number of fragments on it: their correlation."""
        costs = self.rows[variant, self.budgets[0]].costs
        values = [np.corrcoef(*pair)[0, 1] for pair in zip(costs, self.distractors, strict=True)]
        return Claim(text, paper, of_seeds(values), unit="correlation")

    def tokens_fall(self, variant: str, *, text: str, paper: str) -> Claim:
        """Every block keeps fewer tokens than the block before: the smallest decrease."""
        row = self.rows[variant, self.budgets[0]]
        means = [list(seed["tokens_per_block"].values()) for seed in row.measured]
        return Claim(text, paper, of_seeds([min(-np.diff(seed)) for seed in means]), unit="tokens")

    def more_training(self) -> Estimate:
        """How the training of the fine-tuned variants changes the accuracy of the dense network."""
        return self._contrast([(1, self.rows["dense_tuned", None]), (-1, self.rows["dense", None])])

    def _contrast(self, terms: Terms) -> Estimate:
        has_seeds = any(row.variant.has_seeds for _, row in terms)
        return contrast([(weight, row.hits) for weight, row in terms], self.digits, has_seeds=has_seeds)

    def _lead(self, a: str, b: str, budget: int, weight: float = 1.0) -> Terms:
        """`weight` times the accuracy of `a` minus that of `b` at a budget."""
        signed = [(weight, a), (-weight, b)]
        return [(sign * share, row) for sign, variant in signed for share, row in self._at_budget(variant, budget)]

    def _at_budget(self, variant: str, budget: int) -> Terms:
        """The accuracy of `variant` at exactly the cost of the budget, interpolated linearly between its own costs, or
        extrapolated beyond the last. K is an integer and set on other images, so costs miss the budget by about a
        percent.
        """
        target, budgets = self.rows["top_k", budget].costs.mean(), self.budgets[::-1]
        costs = [self.rows[variant, b].costs.mean() for b in budgets]
        here = budgets.index(budget)
        there = here + 1 if target > costs[here] else here - 1
        there = there if 0 <= there < len(costs) else 2 * here - there
        share = (target - costs[here]) / (costs[there] - costs[here]) if costs[there] != costs[here] else 0.0
        return [(1 - share, self.rows[variant, budget]), (share, self.rows[variant, budgets[there]])]
