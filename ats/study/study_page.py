"""docs/STUDY.md (from the template `study_page.md`), docs/study.json and the figure of the Digits studies."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ats.files import write
from ats.study import charts
from ats.study.compare import FAILS, HOLDS, NOISE, Claim, Claims, mean_and_spread
from ats.study.digits import VARIANTS, DigitsStudy, Row, StudySize
from ats.study.results import token_counts

SAMPLING = ("inverse", "top_k", "random")
STAGES_AND_TUNING = ("inverse", "inverse_tuned", "multi_stage", "multi_stage_tuned")
SCORES = ("multi_stage", "attention_alone", "mean_attention")
COST = "GFLOPs / dense, paper's accounting"


def write_study(rows: Sequence[Row], study: DigitsStudy, *, folder: Path, minutes: float | None) -> str:
    """Write STUDY.md, study.json and images/study.png below `folder`; returns the text of STUDY.md."""
    page, canvases = _Page(rows, study.size, dense=study.dense_gflops()), study.canvases
    claims = Claims(rows, study.size, canvases.digits, canvases.distractors)
    found, rule = claims.all(), claims.better("multi_stage", "paper_rule")
    better = {HOLDS: "official is better", FAILS: "paper is better", NOISE: "within the noise"}[rule.verdict]
    text = Path(__file__).with_suffix(".md").read_text()
    text = text.format(
        **page.tables(),
        summary=_summary(found),
        claims=_claims_table(found),
        claims_by_budget=_budgets_table(found),
        size=study.size,
        group=len(canvases.digits),
        num_digits=len(np.unique(canvases.digits)),
        dense=page.dense,
        budgets=", ".join(str(budget) for budget in study.size.budgets),
        shares=", ".join(f"{study.budget_gflops(budget) / page.dense:.3f}" for budget in study.size.budgets),
        more_training=claims.more_training(),
        rule_difference=f"{rule.overall} points, {better}",
        took=f"\nIt took {minutes:.0f} minutes of CPU time.\n" if minutes else "",
    )
    write(folder / "study.json", json.dumps(page.as_dict(found, minutes), indent=1) + "\n")
    page.draw(folder / "images" / "study.png")
    write(folder / "STUDY.md", text)
    return text


class _Page:
    """Tables, JSON and figure of the rows. Costs are relative to `dense`, in GFLOPs."""

    def __init__(self, rows: Sequence[Row], size: StudySize, *, dense: float) -> None:
        self.rows, self.size, self.dense = rows, size, dense
        self.by_key = {(row.variant.id, row.budget): row for row in rows if row.budget != "K"}
        self.sweep = [row for row in rows if row.budget == "K"]
        self.all_tokens = min(self.sweep, key=lambda row: abs(row.num_tokens[0] - 65))  # K = the number of tokens

    def at_budgets(self, variant: str) -> list[Row]:
        return [self.by_key[variant, budget] for budget in self.size.budgets]

    def tables(self) -> dict[str, object]:
        """Tables by their placeholder in the template."""
        once = [("dense", None), ("dense_tuned", None), ("saving", "saving"), ("saving_tuned", "saving")]
        return {
            "sampling": self.budget_table(SAMPLING),
            "stages": self.budget_table(STAGES_AND_TUNING),
            "score": self.budget_table(SCORES),
            "rule": self.budget_table(("multi_stage", "paper_rule")),
            "saving": self.plain_table([self.by_key[key] for key in once]),
            "sweep": self.plain_table(self.sweep),
            "sweep_k": self.all_tokens.num_tokens[0],
            "tokens": charts.token_table(token_counts(self.all_tokens.measured)),
        }

    def budget_table(self, variants: Sequence[str]) -> str:
        headers = ["variant"]
        for budget in self.size.budgets:
            headers += [f"{budget} patches: top-1 %", "cost / dense"]
        lines = [
            [VARIANTS[variant].name, *(cell for row in self.at_budgets(variant) for cell in self.cells(row))]
            for variant in variants
        ]
        return charts.markdown_table(headers, lines)

    def plain_table(self, rows: Sequence[Row]) -> str:
        lines = []
        for row in rows:
            num_tokens = "/".join(str(k) for k in sorted(set(row.num_tokens) - {None})) or "all"
            as_run = np.mean([seed["gflops"]["mean"] for seed in row.measured])
            lines.append([row.variant.name, num_tokens, *self.cells(row), f"{as_run / self.dense:.3f}"])
        return charts.markdown_table(["variant", "K", "top-1 %", "cost / dense, paper", "as run"], lines)

    def cells(self, row: Row) -> list[str]:
        return [mean_and_spread(row.hits), f"{row.costs.mean() / self.dense:.3f}"]

    def as_dict(self, found: list[Claim], minutes: float | None) -> dict:
        return {
            "settings": asdict(self.size),
            "minutes": minutes,
            "dense_gflops": self.dense,
            "claims": [asdict(claim) | {"verdict": claim.verdict} for claim in found],
            "rows": [
                {
                    "variant": row.variant.name,
                    "budget": row.budget,
                    "num_tokens": row.num_tokens,
                    "top1": [round(100 * float(hits.mean()), 4) for hits in row.hits],
                    "gflops_paper": [round(float(costs.mean()), 7) for costs in row.costs],
                    "gflops_as_run": [round(seed["gflops"]["mean"], 7) for seed in row.measured],
                    "tokens_per_block": [
                        {block: round(mean, 3) for block, mean in seed["tokens_per_block"].items()}
                        for seed in row.measured
                    ],
                }
                for row in self.rows
            ],
        }

    def draw(self, path: Path) -> None:
        panels = {
            "Sampling, not fine-tuned": [self.at_budgets(id) for id in SAMPLING],
            "Stages and fine-tuning": [self.at_budgets(id) for id in STAGES_AND_TUNING],
            "Score and rule, not fine-tuned": [self.at_budgets(id) for id in (*SCORES, "paper_rule")],
            "Sweep of K, not fine-tuned": [self.sweep],
        }
        with charts.figure(6, path) as axes:
            for ax, (title, curves) in zip(axes, panels.items(), strict=False):
                for colour, rows in enumerate(curves):
                    accuracies = [100 * row.hits.mean() for row in rows]
                    spreads = [100 * row.hits.mean(axis=1).std(ddof=min(len(row.hits) - 1, 1)) for row in rows]
                    costs = [row.costs.mean() / self.dense for row in rows]
                    name = rows[0].variant.name
                    charts.draw_curve(ax, costs, accuracies, colour=colour, spreads=spreads, label=name)
                charts.finish_curves(ax, x=COST, title=title, dense=100 * self.by_key["dense", None].hits.mean())
            for row, *at in zip(self.sweep, costs, accuracies, strict=True):
                label = f"K = {row.num_tokens[0]}"
                axes[3].annotate(label, at, xytext=(6, -9), textcoords="offset points", fontsize=7)
            title = f"Tokens per block, blocks 3-11, K = {self.all_tokens.num_tokens[0]}"
            charts.draw_token_histograms(axes[4], token_counts(self.all_tokens.measured), title=title)
            title = "Images by cost, the same network"
            charts.draw_costs(axes[5], self.all_tokens.costs / self.dense, x=COST, title=title)


def _summary(found: list[Claim]) -> str:
    """How many claims got which verdict."""
    count = [sum(claim.verdict == verdict for claim in found) for verdict in (HOLDS, FAILS, NOISE)]
    return f"**{count[0]} of {len(found)} claims hold, {count[1]} do not, {count[2]} are within the noise.**"


def _claims_table(found: list[Claim]) -> str:
    lines = []
    for claim in found:
        unit = "" if claim.unit == "points" else f" {claim.unit}"
        verdict = claim.verdict if claim.verdict == NOISE else f"**{claim.verdict}**"
        lines.append([claim.text, claim.paper, f"{claim.overall}{unit}", verdict])
    return charts.markdown_table(["claim", "in the paper", "here", "verdict"], lines, left=4)


def _budgets_table(found: list[Claim]) -> str:
    """The claims with answers at single budgets, and these answers."""
    lines = [[claim.text, *(str(estimate) for _, estimate in claim.parts)] for claim in found if claim.parts]
    budgets = next([label for label, _ in claim.parts] for claim in found if claim.parts)
    return charts.markdown_table(["claim", *budgets], lines, left=1)
