"""What `tools/reproduce.py` writes of a table: markdown, JSON, and the figure in the paper's form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ats.study.paper import TOKENS, PaperRow
from ats.study.report import (
    Curve,
    draw_costs,
    draw_curves,
    draw_token_histograms,
    figure,
    markdown_table,
    token_statistics,
)
from ats.study.reproduce import Outcome, kept_counts, sample_costs


def render(table: str, outcomes: Sequence[Outcome]) -> str:
    """The table as markdown: paper beside measured with the difference, tokens per block, and what is missing."""
    has_top5 = any(outcome.row.top5 is not None for outcome in outcomes)
    headers = ["row", "top-1 %: paper", "measured", "difference", "GFLOPs: paper", "measured", "difference", "K"]
    headers += ["top-5 %: paper", "measured"] if has_top5 else []
    lines = []
    for outcome in outcomes:
        row, measured = outcome.row, outcome.measured
        line = [row.name, *_compare(row.top1, measured and measured["top1"], 2)]
        line += _compare(row.gflops, outcome.gflops, 3)
        line.append("" if outcome.num_tokens is None else outcome.num_tokens)
        if has_top5:
            line += _compare(row.top5, measured and measured["top5"], 2)[:2]
        lines.append(line)
    text = f"# {table}\n\n{markdown_table(headers, lines, right=range(1, len(headers)))}\n"
    text += "\nGFLOPs are in the paper's accounting, over all views of a video. -: not at hand, or not measured.\n"
    if table == "histogram":
        text += "".join(_token_table(outcome) for outcome in outcomes if outcome.measured is not None)
    wanted = [f"* {o.row.name}: {o.missing or o.error}\n" for o in outcomes if o.missing or o.error]
    text += f"\n## Not measured\n\n{''.join(wanted)}" if wanted else ""
    warned = [f"* {outcome.warning}\n" for outcome in outcomes if outcome.warning]
    return text + (f"\n## Warnings\n\n{''.join(warned)}" if warned else "")


def _compare(paper: float | None, measured: float | None, digits: int) -> list[str]:
    shown = "-" if measured is None else f"{measured:.{digits}f}" if digits == 2 else f"{measured:.{digits}g}"
    if paper is None or measured is None:
        return ["-" if paper is None else f"{paper:g}", shown, "-"]
    return [f"{paper:g}", shown, f"{measured - paper:+.2f}"]


def _token_table(outcome: Outcome) -> str:
    lines = []
    for block, counts in kept_counts(outcome).items():
        mode, mean, std, span = token_statistics(counts)
        here = (mode, f"{mean:.1f}", f"{std:.1f}", span)
        pairs = zip(TOKENS.get(block, ("-",) * 4), here, strict=True)
        lines.append([block, *(f"{paper} / {measured}" for paper, measured in pairs)])
    headers = ["block", "mode: paper / measured", "mean", "standard deviation", "range"]
    return f"\n## Tokens kept: {outcome.row.name}\n\n{markdown_table(headers, lines, right=range(5))}\n"


def as_dict(table: str, outcomes: Sequence[Outcome]) -> dict:
    """The same for a program; per-sample values are left to the files of the rows."""
    rows = []
    for outcome in outcomes:
        measured = outcome.measured and {k: v for k, v in outcome.measured.items() if k not in ("hits", "costs")}
        rows.append(
            {
                "paper": asdict(outcome.row),
                "measured": measured,
                "gflops": outcome.gflops,
                "num_tokens": outcome.num_tokens,
                "missing": outcome.missing,
                "error": outcome.error,
                "warning": outcome.warning,
            }
        )
    return {"table": table, "rows": rows}


def draw(table: str, outcomes: Sequence[Outcome], path: Path) -> Path | None:
    """The figure: accuracy over GFLOPs, the paper's points and those measured; for the histograms, tokens per block and
    images by cost. None if there is nothing to draw.
    """
    measured = [outcome for outcome in outcomes if outcome.measured is not None]
    if table != "histogram":
        if not any(_has_point(outcome.row) for outcome in outcomes) and not measured:
            return None
        return figure(1, path, lambda axes: _draw_accuracy(axes[0], table, outcomes), panel=(8.0, 5.0))
    with_ats = [outcome for outcome in measured if outcome.measured["token_counts"]]
    if not with_ats:
        return None

    def fill(axes) -> None:
        for number, outcome in enumerate(with_ats):
            draw_token_histograms(axes[2 * number], kept_counts(outcome), title=f"{outcome.row.name}: tokens per block")
            draw_costs(
                axes[2 * number + 1],
                sample_costs(outcome).numpy(),
                x="GFLOPs",
                title=f"{outcome.row.name}: images by cost",
                dense=outcome.measured["gflops"]["dense"],
            )

    return figure(2 * len(with_ats), path, fill, columns=2)


def _has_point(row: PaperRow) -> bool:
    return row.top1 is not None and row.gflops is not None


def _draw_accuracy(axes, table: str, outcomes: Sequence[Outcome]) -> None:
    families: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        families.setdefault(outcome.row.family or "others (paper)", []).append(outcome)
    curves = []
    for name, members in families.items():
        known = [outcome.row for outcome in members if _has_point(outcome.row)]
        if known:
            joined = any(outcome.row.family for outcome in members)
            label = f"{name}, paper" if joined else name
            costs, accuracies = [row.gflops for row in known], [row.top1 for row in known]
            curves.append(Curve(label, costs, accuracies, joined=joined, group=name))
        found = [outcome for outcome in members if outcome.measured is not None]
        if found:
            costs, accuracies = [o.gflops for o in found], [o.measured["top1"] for o in found]
            curves.append(Curve(f"{name}, measured", costs, accuracies, hollow=True, group=name))
    draw_curves(axes, curves, x="GFLOPs, paper's accounting", title=table)


def write(table: str, outcomes: Sequence[Outcome], folder: Path) -> list[Path]:
    """Write table.md, results.json and figure.png; returns the paths written."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "table.md", folder / "results.json"]
    paths[0].write_text(render(table, outcomes))
    paths[1].write_text(json.dumps(as_dict(table, outcomes), indent=1) + "\n")
    picture = draw(table, outcomes, folder / "figure.png")
    return [*paths, *([picture] if picture else [])]
