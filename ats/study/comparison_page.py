"""docs/COMPARISON.md, docs/comparison.json and a figure: which way to lose tokens is best at which cost."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ats.files import write
from ats.study import charts
from ats.study.compare import NORMAL95, Estimate, standard_error, t95
from ats.study.comparison import METHODS, Cell, ComparisonSize, Subject

DRAWN = ("ats_drop", "ats_merge", "merge_sample", "evit", "tome", "pitome_prop", "ppt")


@dataclass(frozen=True)
class Compared:
    """What was measured with one subject."""

    subject: Subject
    size: ComparisonSize
    cells: Sequence[Cell]  # off the shelf
    tuned: Sequence[Cell]


def write_comparison(found: Sequence[Compared], *, folder: Path, command: str, machine: dict) -> str:
    """Write COMPARISON.md, comparison.json and images/comparison.png below `folder`; returns the text."""
    text = (Path(__file__).with_suffix(".md")).read_text()
    text = text.format(
        answer="\n".join(_answer(one) for one in found),
        sections="\n\n".join(_section(one) for one in found),
        command=command,
        machine=f"{machine['cpu']} ({machine['instructions']}), PyTorch {machine['torch']}",
        images=_each(found, lambda size: f"{size.calibration_images}"),
        rounds=_each(found, lambda size: f"medians of {size.rounds} rounds"),
        tuned=_about_tuning(found),
    )
    contents = {one.subject.title: [_as_dict(cell) for cell in (*one.cells, *one.tuned)] for one in found}
    write(folder / "comparison.json", json.dumps(contents, indent=1) + "\n")
    _draw(found, folder / "images" / "comparison.png")
    write(folder / "COMPARISON.md", text)
    return text


def _each(found: Sequence[Compared], text: Callable[[ComparisonSize], str]) -> str:
    """What is said of the sizes, once if it is the same of all."""
    said = {one.subject.title: text(one.size) for one in found}
    if len({*said.values()}) == 1:
        return next(iter(said.values()))
    return ", ".join(f"{title}: {words}" for title, words in said.items())


def _about_tuning(found: Sequence[Compared]) -> str:
    if not any(one.tuned for one in found):
        return ""
    size = next(one.size for one in found if one.tuned)
    return (
        f"* **Fine-tuned**: {size.tune_steps} steps from the dense weights with the method at work, {size.num_seeds} "
        "seeds; the budget is\n  then met again.\n"
    )


def difference(a: Cell, b: Cell, clusters: np.ndarray | None) -> Estimate:
    """a - b on the same images, with its 95 % interval; over the seeds too, where one of them was trained.

    Args:
        clusters: [images], see `Subject`; None: every image is one of its own.
    """
    seeds = max(len(a.values), len(b.values))
    values = np.broadcast_to(a.values, (seeds, a.values.shape[1])) - b.values
    per_unit = values.mean(axis=0)
    if clusters is not None:
        per_unit = np.array([per_unit[clusters == one].mean() for one in np.unique(clusters)])
    half_width = NORMAL95 * standard_error(per_unit)
    if seeds > 1:
        half_width = float(np.hypot(half_width, t95(seeds) * standard_error(values.mean(axis=1))))
    return Estimate(float(values.mean()), half_width)


def _at(cells: Sequence[Cell], budget: float) -> list[Cell]:
    """The cells of a budget that meet it, best first."""
    own = [cell for cell in cells if cell.method is not None and cell.budget == budget and cell.in_reach]
    return sorted(own, key=lambda cell: -cell.values.mean())


def _best(cells: Sequence[Cell], kind: str) -> Cell | None:
    return next((cell for cell in cells if getattr(cell.method, kind)), None)


def _answer(one: Compared) -> str:
    """Ours against the best rival, budget by budget."""
    lines, never_behind = [], []
    for label, cells in (("off the shelf", one.cells), ("fine-tuned", one.tuned)):
        if any(cell.method is not None for cell in cells):
            names = [METHODS[id].name for id in _never_behind(cells, one.subject.clusters)]
            never_behind.append(f"Never behind the best, {label}: {', '.join(names) or 'none'}.")
        for budget in sorted({cell.budget for cell in cells if cell.method is not None}, reverse=True):
            own = _at(cells, budget)
            ours, rival = _best(own, "ours"), _best(own, "rival")
            if ours is None or rival is None:
                continue
            lead = difference(ours, rival, one.subject.clusters)
            verdict = {"holds": "ahead", "does not hold": "behind"}.get(lead.verdict(), "equal within the interval")
            scores = (f"{ours.method.name} {ours.values.mean():.2f}", f"{rival.method.name} {rival.values.mean():.2f}")
            lines.append([label, f"{budget:g}", *scores, str(lead), verdict])
    headers = ["", "GFLOPs / dense", "best of ours", "best rival", "difference, 95 % interval", "ours is"]
    table = charts.markdown_table(headers, lines, left=1)
    return f"**{one.subject.title}** ({one.subject.unit})\n\n{table}\n\n" + "\n".join(never_behind) + "\n"


def _never_behind(cells: Sequence[Cell], clusters: np.ndarray | None) -> list[str]:
    """Ids of the methods that meet every budget and are at none surely worse than the best there."""
    columns = [_at(cells, budget) for budget in {cell.budget for cell in cells if cell.method is not None}]
    equal = Counter(
        cell.method.id
        for own in columns
        for cell in own
        if difference(cell, own[0], clusters).verdict() != "does not hold"
    )
    return [id for id, times in equal.items() if times == len(columns)]


def _section(one: Compared) -> str:
    text = f"## {one.subject.title}, off the shelf\n\n{_table(one, one.cells)}\n\n"
    text += f"Milliseconds of an image, batches of 32, one thread; dense {one.cells[0].ms:.3g} ms:\n\n{_times(one)}"
    if one.tuned:
        text += f"\n\n## {one.subject.title}, fine-tuned for {one.size.tune_steps} steps\n\n{_table(one, one.tuned)}"
    return text


def _table(one: Compared, cells: Sequence[Cell]) -> str:
    budgets = sorted({cell.budget for cell in cells if cell.method is not None}, reverse=True)
    best = {budget: (_at(cells, budget) or [None])[0] for budget in budgets}
    by_key = {(cell.method.id, cell.budget): cell for cell in cells if cell.method is not None}
    lines = []
    for id in dict.fromkeys(id for id, _ in by_key):
        row = [METHODS[id].name]
        for budget in budgets:
            cell = by_key[id, budget]
            if not cell.in_reach:
                row.append(f"({cell.values.mean():.2f} at {cell.cost:.2f})")
                continue
            text = f"{cell.values.mean():.2f}"
            row.append(
                f"**{text}**"
                if difference(cell, best[budget], one.subject.clusters).verdict() != "does not hold"
                else text
            )
        lines.append(row)
    dense = f"dense: {cells[0].values.mean():.2f}"
    headers = [f"{one.subject.unit}; {dense}", *(f"{budget:g} of the GFLOPs" for budget in budgets)]
    return charts.markdown_table(headers, lines)


def _times(one: Compared) -> str:
    budgets = sorted({cell.budget for cell in one.cells if cell.method is not None}, reverse=True)
    by_key = {(cell.method.id, cell.budget): cell for cell in one.cells if cell.method is not None}
    lines = [
        [METHODS[id].name, *(f"{by_key[id, budget].ms:.3g}" for budget in budgets)]
        for id in dict.fromkeys(id for id, _ in by_key)
    ]
    return charts.markdown_table(["", *(f"{budget:g}" for budget in budgets)], lines)


def _as_dict(cell: Cell) -> dict:
    return {
        "method": "dense" if cell.method is None else cell.method.name,
        "budget": cell.budget,
        "mean": [round(float(seed.mean()), 4) for seed in cell.values],
        "gflops_over_dense": round(cell.cost, 4),
        "stages": cell.stages,
        "ms": None if cell.ms is None else round(cell.ms, 4),
    }


def _draw(found: Sequence[Compared], path: Path) -> None:
    with charts.figure(2 * len(found), path, columns=2, panel=(6.0, 4.2)) as axes:
        for place, one in enumerate(found):
            for ax, x, label in (
                (axes[2 * place], lambda cell: cell.cost, "GFLOPs / dense, as run"),
                (axes[2 * place + 1], lambda cell: cell.ms, "milliseconds of an image, one thread"),
            ):
                for colour, id in enumerate(DRAWN):
                    own = [cell for cell in one.cells if cell.method is not None and cell.method.id == id]
                    own = [cell for cell in own if cell.in_reach]
                    if own:
                        means = [cell.values.mean() for cell in own]
                        charts.draw_curve(ax, list(map(x, own)), means, colour=colour, label=METHODS[id].name)
                charts.finish_curves(
                    ax, x=label, title=f"{one.subject.title}, off the shelf", dense=one.cells[0].values.mean(),
                    y=one.subject.unit,
                )  # fmt: skip
