"""The paper's claims as questions to the Digits study; the answers follow from the numbers alone.

What the paper measured is given beside each (ImageNet, DeiT-S; `paper.py`). Claims without a number there are ours or
are known from the paper's text only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ats.study import digits as study
from ats.study.compare import Estimate, contrast, of_seeds
from ats.study.digits import Row, Settings, Variant


@dataclass(frozen=True)
class Claim:
    """A claim and what the data say.

    Attributes:
        text: what is claimed. paper: its evidence there.
        overall: decides; `unit` is what it is in. at_least: the claim is that the value is above this.
        parts: the same at single budgets, by label.
    """

    text: str
    paper: str
    overall: Estimate
    unit: str = "points"
    at_least: float = 0.0
    parts: tuple[tuple[str, Estimate], ...] = ()

    @property
    def verdict(self) -> str:
        """`holds`, `does not hold` or `within the noise`."""
        return self.overall.verdict(at_least=self.at_least)


class Claims:
    """Claims about the rows of a study.

    Args:
        digits: [canvases] the digit each shows. distractors: [seeds, canvases].
    """

    def __init__(self, rows: Sequence[Row], settings: Settings, digits: np.ndarray, distractors: np.ndarray) -> None:
        self.rows = {(row.variant, row.budget): row for row in rows}
        self.settings, self.digits, self.distractors = settings, digits, distractors

    def _contrast(self, terms: Sequence[tuple[float, Row]]) -> Estimate:
        has_seeds = any(row.has_seeds for _, row in terms)
        return contrast([(weight, row.hits) for weight, row in terms], self.digits, has_seeds=has_seeds)

    def _at_budget(self, variant: Variant, budget: int) -> list[tuple[float, Row]]:
        """The variant's accuracy at exactly the budget's cost, by linear interpolation between its own budgets (or
        beyond the last): K is a whole number, and set on other images, so costs miss the budget by a percent or so.
        """
        target = self.rows[study.TOP_K, budget].costs.mean()
        budgets = sorted(self.settings.budgets)
        costs = [self.rows[variant, b].costs.mean() for b in budgets]
        here = budgets.index(budget)
        there = here + 1 if target > costs[here] else here - 1
        there = there if 0 <= there < len(budgets) else 2 * here - there
        share = (target - costs[here]) / (costs[there] - costs[here]) if costs[there] != costs[here] else 0.0
        return [(1 - share, self.rows[variant, budget]), (share, self.rows[variant, budgets[there]])]

    def _lead(self, a: Variant, b: Variant, budget: int, weight: float = 1.0) -> list[tuple[float, Row]]:
        """`weight` times the accuracy of `a` minus that of `b` at a budget, as terms of a contrast."""
        signed = [(weight, a), (-weight, b)]
        return [(sign * share, row) for sign, variant in signed for share, row in self._at_budget(variant, budget)]

    def better(self, text: str, a: Variant, b: Variant, paper: str) -> Claim:
        """`a` is better than `b` at the same cost, on the average of the budgets."""
        budgets = self.settings.budgets
        overall = [term for budget in budgets for term in self._lead(a, b, budget, 1 / len(budgets))]
        parts = tuple((f"{budget} patches", self._contrast(self._lead(a, b, budget))) for budget in budgets)
        return Claim(text, paper, self._contrast(overall), parts=parts)

    def grows(self, text: str, a: Variant, b: Variant, paper: str) -> Claim:
        """The lead of `a` over `b` is larger at the smallest budget than at the largest."""
        small, large = min(self.settings.budgets), max(self.settings.budgets)
        return Claim(text, paper, self._contrast([*self._lead(a, b, small), *self._lead(a, b, large, -1.0)]))

    def _loses_little(self, text: str, row: Row, paper: str, *, at_least: float) -> Claim:
        dense = self.rows[study.DENSE, None]
        text = text.format(saved=f"{1 - row.costs.mean() / dense.costs.mean():.0%}")  # as measured, not as asked for
        return Claim(text, paper, self._contrast([(1, row), (-1, dense)]), at_least=at_least)

    def _tokens_follow_content(self) -> Claim:
        row = self.rows[study.STAGES, max(self.settings.budgets)]
        values = [np.corrcoef(*pair)[0, 1] for pair in zip(row.costs, self.distractors, strict=True)]
        return Claim(
            "The image decides: images with more in them keep more tokens (correlation of an image's cost with the "
            "number of fragments on it, blocks 3-11)",
            "a small bird on sky keeps 51 tokens on average, a crowded scene 123",
            of_seeds(values),
            unit="correlation",
        )

    def _tokens_fall(self) -> Claim:
        row = self.rows[study.STAGES, max(self.settings.budgets)]
        means = [list(seed["tokens_per_block"].values()) for seed in row.measured]
        return Claim(
            "Every block keeps fewer tokens than the block before (smallest decrease from block to block, blocks 3-11; "
            "none can keep more)",
            "means from 162 in block 3 to 62 in block 11",
            of_seeds([min(-np.diff(seed)) for seed in means]),
            unit="tokens",
        )

    def all(self) -> list[Claim]:
        """The claims, the paper's with numbers first."""
        return [
            self.better(
                "Sampling in all blocks from 3 on is better than in block 3 alone, not fine-tuned",
                study.STAGES,
                study.INVERSE,
                "0.0, +0.7, +0.7 points at 2.0, 2.5, 3.0 GFLOPs",
            ),
            self.better(
                "Fine-tuning helps, sampling in block 3 alone",
                study.INVERSE_TUNED,
                study.INVERSE,
                "+2.4, +1.1, +0.8 points at 2.0, 2.5, 3.0 GFLOPs",
            ),
            self.grows(
                "Fine-tuning helps more at a smaller budget, sampling in block 3 alone",
                study.INVERSE_TUNED,
                study.INVERSE,
                "+2.4 at 2.0 GFLOPs, +0.8 at 3.0",
            ),
            self.better(
                "Fine-tuning helps, sampling in all blocks from 3 on",
                study.STAGES_TUNED,
                study.STAGES,
                "+0.5 points at about 3 GFLOPs (79.2 at 3.0, fine-tuned 79.7 at 2.9)",
            ),
            self.better(
                "Inverse transform sampling is better than top-K, block 3, not fine-tuned",
                study.INVERSE,
                study.TOP_K,
                "+3.1, +1.3, +0.6 points at 2.0, 2.5, 3.0 GFLOPs",
            ),
            self.grows(
                "Its lead over top-K grows as the budget shrinks",
                study.INVERSE,
                study.TOP_K,
                "+3.1 at 2.0 GFLOPs, +0.6 at 3.0",
            ),
            self.better(
                "Inverse transform sampling is better than a random choice, block 3, not fine-tuned",
                study.INVERSE,
                study.RANDOM,
                "no number at hand",
            ),
            self.better(
                "The norm of the value belongs in the score (against attention of CLS alone), blocks 3-11",
                study.STAGES,
                study.ATTENTION,
                "in the text; no number at hand",
            ),
            self.better(
                "Attention of CLS, with the norm of the value, is a better score than the mean attention of all "
                "tokens, blocks 3-11",
                study.STAGES,
                study.MEAN_ATTENTION,
                "in the text; no number at hand",
            ),
            self._loses_little(
                "{saved} of the operations can be saved, not fine-tuned, for at most 0.6 points (blocks 5-11)",
                self.rows[study.SAVING, "saving"],
                "-0.6 points for 35 % (79.2 at 3.0 GFLOPs)",
                at_least=-0.6,
            ),
            self._loses_little(
                "{saved} of the operations can be saved, fine-tuned, for at most 0.2 points (blocks 5-11)",
                self.rows[study.SAVING_TUNED, "saving"],
                "-0.1 points for 37 %; -0.1 to -0.2 over four widths",
                at_least=-0.2,
            ),
            self._tokens_follow_content(),
            self._tokens_fall(),
        ]

    def rule(self) -> Claim:
        """Not the paper's: what `ATS.RULE official` does to accuracy, against `paper`."""
        return self.better("", study.STAGES, study.PAPER_RULE, "")

    def more_training(self) -> Estimate:
        """What the training of the fine-tuned variants does to the dense network."""
        return self._contrast([(1, self.rows[study.DENSE_TUNED, None]), (-1, self.rows[study.DENSE, None])])
