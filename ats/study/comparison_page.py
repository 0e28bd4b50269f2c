"""docs/COMPARISON.md, docs/comparison.json and a figure: which way to lose tokens is best at which cost."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ats.files import write
from ats.study import charts
from ats.study.compare import FAILS, HOLDS, NORMAL95, Estimate, standard_error, t95
from ats.study.comparison import CLAIMS, METHODS, Cell
from ats.study.subjects import ComparisonSize, Subject

DRAWN = ("ats_drop", "ats_merge", "merge_sample", "evit", "tome", "pitome_prop", "ppt")


@dataclass(frozen=True)
class Compared:
    """What was measured with one subject."""

    subject: Subject
    size: ComparisonSize
    cells: Sequence[Cell]  # off the shelf
    tuned: Sequence[Cell]

    @property
    def views(self) -> list[View]:
        """Everything that was measured."""
        views = [
            View(", ".join(filter(None, ("off the shelf", name))), unit, [_only(cell, i) for cell in self.cells])
            for i, (name, unit) in enumerate(self.subject.units.items())
        ]
        return views + [View("fine-tuned", views[0].unit, list(self.tuned))] * bool(self.tuned)


class View(NamedTuple):
    """One quantity measured for all cells; the first cell is the dense network's."""

    heading: str
    unit: str
    cells: list[Cell]

    @property
    def budgets(self) -> list[float]:
        """Descending."""
        return sorted({cell.budget for cell in self.cells if cell.method is not None}, reverse=True)

    def at(self, budget: float) -> list[Cell]:
        """The cells of a budget that meet it, best first."""
        own = [cell for cell in self.cells if cell.method is not None and cell.budget == budget and cell.in_reach]
        return sorted(own, key=lambda cell: -cell.values.mean())


def _only(cell: Cell, index: int) -> Cell:
    """The cell with one of its quantities."""
    return replace(cell, measured=cell.measured[index : index + 1])


def write_comparison(found: Sequence[Compared], *, folder: Path, command: str, machine: dict) -> str:
    """Write COMPARISON.md, comparison.json and images/comparison.png below `folder`; returns the text."""
    text = (Path(__file__).with_suffix(".md")).read_text()
    text = text.format(
        answer="\n".join(_answer(one) for one in found),
        claims=_claims(found),
        sections="\n\n".join(_section(one) for one in found),
        command=command,
        machine=f"{machine['cpu']} ({machine['instructions']}), PyTorch {machine['torch']}",
        evaluated=_each(found, lambda size: f"{size.images}"),
        images=_each(found, lambda size: f"{size.calibration_images}"),
        rounds=_each(found, lambda size: f"{size.rounds}"),
        tuned=_about_tuning(found),
    )
    contents = {one.subject.title: [_as_dict(cell) for cell in (*one.cells, *one.tuned)] for one in found}
    write(folder / "comparison.json", json.dumps(contents, indent=1) + "\n")
    _draw(found, folder / "images" / "comparison.png")
    write(folder / "COMPARISON.md", text)
    return text


def _each(found: Sequence[Compared], text: Callable[[ComparisonSize], str]) -> str:
    """The text about each size, once if all are the same."""
    said = {one.subject.title: text(one.size) for one in found}
    if len({*said.values()}) == 1:
        return next(iter(said.values()))
    return ", ".join(f"{title}: {words}" for title, words in said.items())


def _about_tuning(found: Sequence[Compared]) -> str:
    if not any(one.tuned for one in found):
        return ""
    size = next(one.size for one in found if one.tuned)
    return (
        f"* **Fine-tuned**: {size.tune_steps} steps from the dense weights with the method in place, {size.num_seeds} "
        "seeds. The amount is\n  then searched again.\n"
    )


def difference(a: Cell, b: Cell, clusters: np.ndarray | None) -> Estimate:
    """a - b on the same images, with its 95 % interval; over the seeds too, where one of them was trained.

    Args:
        clusters: [images], see `Subject`; None: every image is its own cluster.
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


def _best(cells: Sequence[Cell], kind: str) -> Cell | None:
    return next((cell for cell in cells if getattr(cell.method, kind)), None)


def _answer(one: Compared) -> str:
    """Ours against the best rival, budget by budget."""
    lines, never_behind = [], []
    for view in one.views:
        names = [METHODS[id].name for id in _never_behind(view, one.subject.clusters)]
        never_behind.append(f"Never behind the best, {view.heading}: {'; '.join(names) or 'none'}.")
        for budget in view.budgets:
            own = view.at(budget)
            ours, rival = _best(own, "ours"), _best(own, "rival")
            if ours is None or rival is None:
                continue
            lead = difference(ours, rival, one.subject.clusters)
            verdict = {HOLDS: "ahead", FAILS: "behind"}.get(lead.verdict(), "within the noise")
            scores = (f"{ours.method.name} {ours.values.mean():.2f}", f"{rival.method.name} {rival.values.mean():.2f}")
            lines.append([view.heading, f"{budget:g}", *scores, str(lead), verdict])
    headers = ["", "GFLOPs / dense", "best of ours", "best rival", "difference, 95 % interval", "ours is"]
    table = charts.markdown_table(headers, lines, left=1)
    return f"**{one.subject.title}** ({_unit(one)})\n\n{table}\n\n" + "\n".join(never_behind) + "\n"


def _unit(one: Compared) -> str:
    """The unit of a subject's main number."""
    return next(iter(one.subject.units.values()))


def _never_behind(view: View, clusters: np.ndarray | None) -> list[str]:
    """Ids of the methods that meet every budget and are nowhere surely worse than the best there."""
    columns = [view.at(budget) for budget in view.budgets]
    equal = Counter(
        cell.method.id for own in columns for cell in own if difference(cell, own[0], clusters).verdict() != FAILS
    )
    return [id for id, times in equal.items() if times == len(columns)]


def _claims(found: Sequence[Compared]) -> str:
    """What each subject says of each claim, by its main number."""
    lines = [[claim["text"], *(_claim(one, claim) for one in found)] for claim in CLAIMS]
    return charts.markdown_table(["", *(one.subject.title for one in found)], lines, left=1 + len(found))


def _claim(one: Compared, claim: dict) -> str:
    cells = one.tuned if claim.get("tuned") else [_only(cell, 0) for cell in one.cells]
    by_key = {(cell.method.id if cell.method else "dense", cell.budget): cell for cell in cells}
    pairs = [
        (own, by_key.get((claim["b"], 1.0 if claim["b"] == "dense" else budget)))
        for (id, budget), own in by_key.items()
        if id == claim["a"] and budget == claim.get("budget", budget)
    ]
    pairs = [(a, b) for a, b in pairs if b is not None and a.in_reach and b.in_reach]
    if not pairs:
        return "not measured"
    a, b = (
        replace(own[0], measured=np.mean([cell.measured for cell in own], axis=0)) for own in zip(*pairs, strict=True)
    )
    lead = difference(a, b, one.subject.clusters)
    return f"{lead.verdict(at_least=claim.get('at_least', 0))}: {lead}"


def _section(one: Compared) -> str:
    text = ""
    for place, view in enumerate(one.views):
        steps = f" for {one.size.tune_steps} steps" * (view.heading == "fine-tuned")
        text += f"## {one.subject.title}, {view.heading}{steps}\n\n{_table(one, view)}\n\n"
        if place == 0:
            text += f"Milliseconds per image, batches of 32, one thread; dense: {one.cells[0].ms:.3g}.\n\n"
            text += f"{_times(one)}\n\n"
    return text.rstrip()


def _table(one: Compared, view: View) -> str:
    best = {budget: next(iter(view.at(budget)), None) for budget in view.budgets}
    by_key = {(cell.method.id, cell.budget): cell for cell in view.cells if cell.method is not None}
    lines = []
    for id in dict.fromkeys(id for id, _ in by_key):
        row = [METHODS[id].name]
        for budget in view.budgets:
            cell = by_key[id, budget]
            if not cell.in_reach:
                row.append(f"({cell.values.mean():.2f} at {cell.cost:.2f})")
                continue
            behind = difference(cell, best[budget], one.subject.clusters).verdict() == FAILS
            text = f"{cell.values.mean():.2f}" if behind else f"**{cell.values.mean():.2f}**"
            row.append(f"{text} at {cell.cost:.2f}" if cell.cost < 0.96 * budget else text)
        lines.append(row)
    dense = f"dense: {view.cells[0].values.mean():.2f}"
    return charts.markdown_table([f"{view.unit}; {dense}", *(f"{own:g} of the GFLOPs" for own in view.budgets)], lines)


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
        "mean": [[round(float(seed.mean()), 4) for seed in seeds] for seeds in cell.measured],
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
                    y=_unit(one),
                )  # fmt: skip
