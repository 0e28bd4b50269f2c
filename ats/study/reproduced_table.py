"""What `tools/reproduce.py` writes for a table: table.md, results.json, and figure.png in the paper's form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ats.files import write
from ats.study import charts
from ats.study.reproduce import TOKENS_KEPT, Outcome, PaperRow
from ats.study.results import token_counts


def write_table(table: str, outcomes: Sequence[Outcome], folder: Path) -> list[Path]:
    """Write table.md, results.json and, if there is anything to draw, figure.png; returns the paths written."""
    paths = [folder / "table.md", folder / "results.json", folder / "figure.png"]
    write(paths[0], render(table, outcomes))
    write(paths[1], json.dumps(as_dict(table, outcomes), indent=1) + "\n")
    return paths if draw(table, outcomes, paths[2]) else paths[:2]


def render(table: str, outcomes: Sequence[Outcome]) -> str:
    """The table as markdown: the paper's numbers, ours and the difference; tokens per block; and what is missing."""
    has_top5 = any(outcome.row.top5 is not None for outcome in outcomes)
    headers = ["row", "top-1 %: paper", "measured", "difference", "GFLOPs: paper", "measured", "difference", "K"]
    headers += ["top-5 %: paper", "measured"] if has_top5 else []
    lines = []
    for outcome in outcomes:
        row, measured = outcome.row, outcome.measured or {}
        line: list[Any] = [row.name, *_compare(row.top1, measured.get("top1"), ".2f")]
        line += [*_compare(row.gflops, outcome.gflops, ".3g"), "" if outcome.num_tokens is None else outcome.num_tokens]
        lines.append(line + (_compare(row.top5, measured.get("top5"), ".2f")[:2] if has_top5 else []))
    text = f"# {table}\n\n{charts.markdown_table(headers, lines)}\n"
    text += "\nGFLOPs are in the paper's accounting, over all views of a video. -: not known, or not measured.\n"
    for outcome in outcomes:
        if table == "histogram" and outcome.measured is not None:
            tokens = charts.token_table(token_counts([outcome.measured]), paper=TOKENS_KEPT)
            text += f"\n## Tokens kept: {outcome.row.name}\n\n{tokens}\n"
    wanted = [f"* {o.row.name}: {o.missing or o.error}\n" for o in outcomes if o.missing or o.error]
    text += f"\n## Not measured\n\n{''.join(wanted)}" if wanted else ""
    warned = [f"* {outcome.warning}\n" for outcome in outcomes if outcome.warning]
    return text + (f"\n## Warnings\n\n{''.join(warned)}" if warned else "")


def _compare(paper: float | None, measured: float | None, form: str) -> list[str]:
    """Cells for the paper's number, ours and the difference."""
    difference = "-" if paper is None or measured is None else f"{measured - paper:+.2f}"
    return ["-" if paper is None else f"{paper:g}", "-" if measured is None else f"{measured:{form}}", difference]


def as_dict(table: str, outcomes: Sequence[Outcome]) -> dict:
    """The same as plain values, without those per sample, which are in the files of the rows."""
    rows = []
    for outcome in outcomes:
        fields = {field: getattr(outcome, field) for field in ("gflops", "num_tokens", "missing", "error", "warning")}
        measured = outcome.measured and {k: v for k, v in outcome.measured.items() if k not in ("hits", "costs")}
        rows.append({"paper": asdict(outcome.row), "measured": measured} | fields)
    return {"table": table, "rows": rows}


def draw(table: str, outcomes: Sequence[Outcome], path: Path) -> Path | None:
    """Draw accuracy over GFLOPs, the paper's points and ours; for "histogram", tokens per block and images by cost.
    None if there is nothing to draw.
    """
    measured = [outcome for outcome in outcomes if outcome.measured is not None]
    if table != "histogram":
        if not measured and not any(_has_point(outcome.row) for outcome in outcomes):
            return None
        with charts.figure(1, path, panel=(8.0, 5.0)) as [axes]:
            draw_accuracy(axes, table, outcomes)
        return path
    with_ats = [outcome for outcome in measured if outcome.measured["token_counts"]]
    if not with_ats:
        return None
    with charts.figure(2 * len(with_ats), path, columns=2) as axes:
        for (left, right), outcome in zip(axes.reshape(-1, 2), with_ats, strict=True):
            name, dense = outcome.row.name, outcome.measured["gflops"]["dense"]
            charts.draw_token_histograms(left, token_counts([outcome.measured]), title=f"{name}: tokens per block")
            costs = np.array(outcome.measured["costs"])
            charts.draw_costs(right, costs, x="GFLOPs", title=f"{name}: images by cost", dense=dense)
    return path


def _has_point(row: PaperRow) -> bool:
    return row.top1 is not None and row.gflops is not None


def draw_accuracy(ax, table: str, outcomes: Sequence[Outcome]) -> None:
    """Per family the paper's points, and ours hollow, in one colour."""
    for colour, family in enumerate(dict.fromkeys(outcome.row.family for outcome in outcomes)):
        members, name = [o for o in outcomes if o.row.family == family], family or "others (paper)"
        if known := [o.row for o in members if _has_point(o.row)]:
            style: dict[str, Any] = {"label": f"{family}, paper"} if family else {"label": name, "linestyle": ""}
            charts.draw_curve(ax, [row.gflops for row in known], [row.top1 for row in known], colour=colour, **style)
        if found := [o for o in members if o.measured is not None]:
            style = {"label": f"{name}, measured", "linestyle": "--", "markerfacecolor": "white"}
            costs, accuracies = [o.gflops for o in found], [o.measured["top1"] for o in found]
            charts.draw_curve(ax, costs, accuracies, colour=colour, **style)
    charts.finish_curves(ax, x="GFLOPs, paper's accounting", title=table)
