"""docs/STUDY.md, docs/study.json and the figure of the Digits studies, from their rows alone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ats.study import digits as study
from ats.study.compare import FAILS, HOLDS, NOISE, mean_and_spread
from ats.study.digits import DigitsStudy, Row, Settings, Variant
from ats.study.digits_claims import Claim, Claims
from ats.study.report import (
    Curve,
    draw_costs,
    draw_curves,
    draw_token_histograms,
    figure,
    markdown_table,
    token_table,
)

SYMBOLS = {HOLDS: "**holds**", FAILS: "**does not hold**", NOISE: "within the noise"}

HEAD = """# The paper's studies on Digits

Written by `make study` (`python tools/study.py`); every number and every verdict is computed from the measurements in
[study.json](study.json). This is a network of 0.61 M parameters on images of 56 x 56 pixels, not ImageNet: it says
what the implementation does and how the method behaves here, not whether the paper's numbers are right. Budgets are
named by patches: "10 patches" is what a network costs that keeps exactly 10 patches from block 3 on.

![The studies](images/study.png)
"""

PROTOCOL = """## How

* **Network**: the shipped dense DeiT of configs/Digits (12 blocks, width 64, 65 tokens) as it is,
  `configs/Digits/weights/deit_dense.safetensors`, unless a row says fine-tuned.
* **Seeds**: {num_seeds} groups of {group} canvases: in each group {canvases} of each of {num_digits} digits of the
  validation split, with placement, slant and clutter of their own. Seed s is group s, the seed of the random sampler
  and the seed of the fine-tuning. "±" behind an accuracy is the standard deviation over the seeds.
* **Cost**: GFLOPs in the paper's accounting, as a fraction of the dense network's {dense:.4f}. The budgets
  of {budgets} patches are {shares} of dense. K of inverse transform sampling
  was set on {calibration} training images to cost the same. The paper's budgets are 0.43, 0.54 and 0.65 of dense;
  there these images lose hardly anything (sweep of K), so that nothing could be told apart. The budgets were chosen
  after a look at some of these validation canvases.
* **Fine-tuning**: {tune_steps} steps of 64 training images with the recipe of configs/Digits/DeiT_ATS.yaml, sampling
  in the blocks named at the middle budget, {num_seeds} trainings each. The paper's takes 30 epochs of ImageNet. The
  same steps move the dense network by {more_training} points.
* **Differences** are between variants on the same canvases, at the same cost: K is a whole number and was
  set on other images, so costs miss the budget a little, which is corrected by linear interpolation between a
  variant's own budgets (the tables below have costs and accuracies as measured). That correction was added after a
  look at the first results, in which inverse transform sampling was behind top-K too. The 95 % interval takes the
  digit, not the canvas, as the unit, and the seeds into account where a variant was trained or draws at random
  (`ats/study/compare.py`).
* **Verdicts**: a claim holds if its whole interval is above its threshold (0 if none is named), does not hold if all of
  it is below, and is within the noise otherwise. Where several budgets bear on a claim, their average decides. No
  verdict is corrected for the number of claims.
"""


def write_report(rows: Sequence[Row], digits_study: DigitsStudy, *, folder: Path, minutes: float | None) -> str:
    """Write STUDY.md, study.json and images/study.png below `folder`; returns the text of STUDY.md."""
    settings, canvases = digits_study.settings, digits_study.canvases
    claims = Claims(rows, settings, canvases.digits, canvases.distractors)
    found = claims.all()
    report = _Report(rows, settings, dense=digits_study.dense_gflops())
    text = report.text(claims, found, digits_study, minutes=minutes)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "study.json").write_text(json.dumps(report.as_dict(found, minutes), indent=1) + "\n")
    report.draw(folder / "images" / "study.png")
    (folder / "STUDY.md").write_text(text)
    return text


class _Report:
    def __init__(self, rows: Sequence[Row], settings: Settings, *, dense: float) -> None:
        self.rows, self.settings, self.dense = rows, settings, dense
        self.by_key = {(row.variant, row.budget): row for row in rows if row.budget != "K"}
        self.sweep = [row for row in rows if row.budget == "K"]

    def text(self, claims: Claims, found: list[Claim], digits_study: DigitsStudy, *, minutes: float | None) -> str:
        settings, canvases = self.settings, digits_study.canvases
        names = ", ".join(str(budget) for budget in settings.budgets)
        protocol = PROTOCOL.format(
            **{field: getattr(settings, field) for field in ("num_seeds", "canvases", "tune_steps")},
            group=len(canvases.digits),
            num_digits=len(np.unique(canvases.digits)),
            dense=self.dense,
            budgets=names,
            shares=", ".join(f"{digits_study.budget_gflops(b) / self.dense:.3f}" for b in settings.budgets),
            calibration=settings.calibration_images,
            more_training=claims.more_training(),
        )
        took = f"\nIt took {minutes:.0f} minutes of computing time.\n" if minutes else ""
        parts = [HEAD, "## What holds here\n", self.summary(found), self.claims_table(found), protocol + took]
        parts += self.tables(claims)
        return "\n".join(parts)

    def summary(self, found: list[Claim]) -> str:
        """One paragraph per verdict."""
        text = ""
        for verdict, intro in ((HOLDS, "Holds"), (FAILS, "Does not hold"), (NOISE, "Within the noise")):
            names = [f"{_short(claim)} ({_number(claim)})" for claim in found if claim.verdict == verdict]
            text += f"* **{intro}** ({len(names)} of {len(found)}): {'; '.join(names) or 'none'}.\n"
        return text

    @staticmethod
    def claims_table(found: list[Claim]) -> str:
        lines = []
        for claim in found:
            parts = "; ".join(f"{label}: {estimate}" for label, estimate in claim.parts)
            here = _number(claim) + (f" ({parts})" if parts else "")
            lines.append([claim.text, claim.paper, here, SYMBOLS[claim.verdict]])
        return markdown_table(["claim", "in the paper", "here, with 95 % interval", "verdict"], lines) + "\n"

    def tables(self, claims: Claims) -> list[str]:
        rule = claims.rule()
        all_tokens = min(self.sweep, key=lambda row: abs(row.num_tokens[0] - 65))
        sampling, stages = (study.INVERSE, study.TOP_K, study.RANDOM), (study.INVERSE, study.INVERSE_TUNED)
        kept = all_tokens.num_tokens[0]
        return [
            "## Sampling: block 3, not fine-tuned\n",
            self.budget_table(sampling),
            "Paper (ImageNet; 2.0 / 2.5 / 3.0 GFLOPs): inverse transform 72.7 / 76.9 / 78.5, top-K 69.6 / 75.6 / 77.9."
            "\n",
            "## Stages and fine-tuning\n",
            self.budget_table((*stages, study.STAGES, study.STAGES_TUNED)),
            "Paper: stage 3 alone 72.7 / 76.9 / 78.5, fine-tuned 75.1 / 78.0 / 79.3; multi-stage 72.7 / 77.6 / 79.2.\n",
            "## Score\n",
            self.budget_table((study.STAGES, study.ATTENTION, study.MEAN_ATTENTION)),
            "## `ATS.RULE`: official code against the paper's text\n",
            self.budget_table((study.STAGES, study.PAPER_RULE)),
            f"Official minus paper, average of the budgets: {rule.overall} points, "
            f"{_leads(rule, 'official', 'paper')}.\n",
            "## Dense, and what the paper saves\n",
            self.plain_table(
                [
                    self.by_key[key]
                    for key in (
                        (study.DENSE, None),
                        (study.DENSE_TUNED, None),
                        (study.SAVING, "saving"),
                        (study.SAVING_TUNED, "saving"),
                    )
                ]
            ),
            "The shipped weights were fine-tuned for three epochs, once (README); the interval of their row in the "
            "claims knows of no other training.\n",
            "## Sweep of K: blocks 3-11, not fine-tuned\n",
            self.plain_table(self.sweep),
            f"## Tokens kept: blocks 3-11, K = {kept}\n",
            token_table(_sum_counts(all_tokens)) + "\n",
        ]

    def budget_table(self, variants: Iterable[Variant]) -> str:
        headers = ["variant"]
        for budget in self.settings.budgets:
            headers += [f"{budget} patches: top-1 %", "cost / dense"]
        lines = []
        for variant in variants:
            line = [variant.name]
            for budget in self.settings.budgets:
                row = self.by_key[variant, budget]
                line += [mean_and_spread(row.hits), f"{row.costs.mean() / self.dense:.3f}"]
            lines.append(line)
        return markdown_table(headers, lines, right=range(1, len(headers))) + "\n"

    def plain_table(self, rows: Iterable[Row]) -> str:
        lines = [
            [
                row.variant.name,
                "/".join(str(k) for k in sorted(set(row.num_tokens) - {None})) or "all",
                mean_and_spread(row.hits),
                f"{row.costs.mean() / self.dense:.3f}",
                f"{_as_run(row) / self.dense:.3f}",
            ]
            for row in rows
        ]
        headers = ["variant", "K", "top-1 %", "cost / dense, paper", "as run"]
        return markdown_table(headers, lines, right=range(1, 5)) + "\n"

    def as_dict(self, found: list[Claim], minutes: float | None) -> dict:
        return {
            "settings": asdict(self.settings),
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
        dense = {"dense": 100 * self.by_key[study.DENSE, None].hits.mean()}
        x = "GFLOPs / dense, paper's accounting"

        def curves(*variants: Variant) -> list[Curve]:
            return [
                self.curve(variant.name, [self.by_key[variant, budget] for budget in self.settings.budgets])
                for variant in variants
            ]

        def draw(axes) -> None:
            draw_curves(
                axes[0],
                curves(study.INVERSE, study.TOP_K, study.RANDOM),
                x=x,
                title="Sampling, not fine-tuned",
                lines=dense,
            )
            stages = curves(study.INVERSE, study.INVERSE_TUNED, study.STAGES, study.STAGES_TUNED)
            draw_curves(axes[1], stages, x=x, title="Stages and fine-tuning", lines=dense)
            parts = curves(study.STAGES, study.ATTENTION, study.MEAN_ATTENTION, study.PAPER_RULE)
            draw_curves(axes[2], parts, x=x, title="Score and rule, not fine-tuned", lines=dense)
            draw_curves(
                axes[3],
                [self.curve(study.STAGES.name, self.sweep)],
                x=x,
                title="Sweep of K, not fine-tuned",
                lines=dense,
            )
            for row in self.sweep:
                at = (row.costs.mean() / self.dense, 100 * row.hits.mean())
                label = f"K = {row.num_tokens[0]}"
                axes[3].annotate(label, at, xytext=(6, -9), textcoords="offset points", fontsize=7)
            kept = min(self.sweep, key=lambda row: abs(row.num_tokens[0] - 65))
            title = f"Tokens per block, blocks 3-11, K = {kept.num_tokens[0]}"
            draw_token_histograms(axes[4], _sum_counts(kept), title=title)
            draw_costs(axes[5], kept.costs / self.dense, x=x, title="Images by cost, the same network")

        figure(6, path, draw)

    def curve(self, name: str, rows: Sequence[Row]) -> Curve:
        spreads = [100 * row.hits.mean(axis=1).std(ddof=1) if len(row.hits) > 1 else 0.0 for row in rows]
        costs = [row.costs.mean() / self.dense for row in rows]
        return Curve(name, costs, [100 * row.hits.mean() for row in rows], spreads)


def _number(claim: Claim) -> str:
    return f"{claim.overall} {claim.unit}" if claim.unit != "points" else f"{claim.overall}"


def _short(claim: Claim) -> str:
    return (
        claim.text[0].lower() + claim.text[1:]
        if not claim.text.startswith("Its")
        else claim.text.replace("Its lead", "the lead of inverse transform sampling")
    )


def _leads(claim: Claim, first: str, second: str) -> str:
    names = {HOLDS: f"{first} is better", FAILS: f"{second} is better", NOISE: "within the noise"}
    return names[claim.verdict]


def _as_run(row: Row) -> float:
    return float(np.mean([seed["gflops"]["mean"] for seed in row.measured]))


def _sum_counts(row: Row) -> dict[int, list[int]]:
    total: dict[int, list[int]] = {}
    for seed in row.measured:
        for block, counts in seed["token_counts"].items():
            old = total.get(int(block), [])
            size = max(len(old), len(counts))
            padded = (values + [0] * (size - len(values)) for values in (old, list(counts)))
            total[int(block)] = [a + b for a, b in zip(*padded, strict=True)]
    return total
