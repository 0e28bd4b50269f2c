"""Markdown tables and figures, in the paper's forms: accuracy over GFLOPs, histograms of tokens per block, images by
cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tabulate import tabulate

COLOURS = ("#1f5fa8", "#d1602a", "#2f8f5b", "#8b4fa0", "#b8902a", "#5f6b76")
INK, GRID = "#2b2b2b", "#dddddd"


def markdown_table(headers: Sequence[str], lines: Sequence[Sequence[object]], *, right: Sequence[int] = ()) -> str:
    """A table in GitHub's form; the columns `right` are aligned there."""
    align = ["right" if column in right else "left" for column in range(len(headers))]
    return tabulate(lines, headers=headers, tablefmt="pipe", disable_numparse=True, colalign=align)


class Curve(NamedTuple):
    """Points of one variant: costs, accuracies, and the accuracies' spread if known.

    `joined`: by a line. `hollow`: markers, and the line is dashed. Curves of one `group` have one colour; "": its own.
    """

    name: str
    costs: Sequence[float]
    accuracies: Sequence[float]
    spreads: Sequence[float] = ()
    joined: bool = True
    hollow: bool = False
    group: str = ""


def _styled(ax, *, x: str, y: str, title: str) -> None:
    ax.set_title(title, fontsize=10, loc="left", color=INK)
    ax.set_xlabel(x, fontsize=9, color=INK)
    ax.set_ylabel(y, fontsize=9, color=INK)
    ax.tick_params(labelsize=8, colors=INK)
    ax.grid(color=GRID, linewidth=0.6)
    ax.set_axisbelow(True)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)


def draw_curves(ax, curves: Sequence[Curve], *, x: str, title: str, lines: Mapping[str, float] | None = None) -> None:
    """Accuracy over cost; `lines` are horizontal, by name, e.g. the dense network's accuracy."""
    groups = list(dict.fromkeys(curve.group or curve.name for curve in curves))
    for curve in curves:
        number = groups.index(curve.group or curve.name)
        order = np.argsort(curve.costs)
        costs, accuracies = np.asarray(curve.costs)[order], np.asarray(curve.accuracies)[order]
        spreads = np.asarray(curve.spreads)[order] if len(curve.spreads) else None
        style = {"color": COLOURS[number % len(COLOURS)], "marker": "osD^vP"[number % 6], "markersize": 5}
        style |= {"linestyle": "--" if curve.hollow else "-" if curve.joined else "", "linewidth": 1.3}
        style |= {"markerfacecolor": "white"} if curve.hollow else {}
        ax.errorbar(costs, accuracies, yerr=spreads, capsize=2, label=curve.name, **style)
    for name, value in (lines or {}).items():
        ax.axhline(value, color=INK, linewidth=0.9, linestyle="--")
        ax.annotate(name, (1, value), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    _styled(ax, x=x, y="top-1 %", title=title)
    ax.legend(fontsize=8, frameon=False, loc="lower right")


def draw_token_histograms(ax, token_counts: Mapping[int, Sequence[int]], *, title: str) -> None:
    """How many sequences kept how many tokens, for every ATS block one above the other, the first at the top."""
    blocks = sorted(token_counts)
    longest = max(max((i for i, n in enumerate(token_counts[block]) if n), default=0) for block in blocks)
    for row, block in enumerate(reversed(blocks)):
        counts = np.zeros(longest + 1)
        kept = np.asarray(token_counts[block])[: longest + 1]
        counts[: len(kept)] = kept
        height = 0.9 * counts / max(counts.max(), 1)
        ax.fill_between(
            np.arange(longest + 1), row, row + height, step="mid", color=COLOURS[0], alpha=0.75, linewidth=0
        )
    ax.set_yticks(range(len(blocks)), [f"block {block}" for block in reversed(blocks)])
    _styled(ax, x="tokens kept, CLS counted", y="", title=title)


def draw_costs(ax, costs: np.ndarray, *, x: str, title: str, dense: float | None = None) -> None:
    """How many samples cost how much."""
    ax.hist(costs.ravel(), bins=40, color=COLOURS[0], alpha=0.75)
    if dense is not None:
        ax.axvline(dense, color=INK, linewidth=0.9, linestyle="--")
        ax.annotate("dense ", (dense, 0.97), xycoords=("data", "axes fraction"), ha="right", va="top", fontsize=8)
    _styled(ax, x=x, y="images", title=title)


def token_statistics(counts: Sequence[int]) -> tuple[int, float, float, str]:
    """Mode, mean, standard deviation and range of the number of tokens kept; counts[n] sequences kept n."""
    weights, values = np.asarray(counts, dtype=np.float64), np.arange(len(counts))
    mean = float((weights * values).sum() / weights.sum())
    std = float(np.sqrt((weights * (values - mean) ** 2).sum() / weights.sum()))
    present = np.flatnonzero(weights)
    return int(weights.argmax()), mean, std, f"{present[0]}-{present[-1]}"


def token_table(token_counts: Mapping[int, Sequence[int]]) -> str:
    """Per ATS block: mode, mean, standard deviation and range of the number of tokens kept."""
    lines = []
    for block, counts in sorted(token_counts.items()):
        mode, mean, std, span = token_statistics(counts)
        lines.append([block, mode, f"{mean:.1f}", f"{std:.1f}", span])
    return markdown_table(["block", "mode", "mean", "standard deviation", "range"], lines, right=range(5))


def figure(
    num_panels: int,
    path: Path,
    draw: Callable[[np.ndarray], None],
    *,
    columns: int = 3,
    panel: tuple[float, float] = (4.6, 3.7),
) -> Path:
    """Panels in rows of `columns`, each `panel` inches: `draw(axes)` fills them, the picture goes to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(num_panels, columns)
    rows = -(-num_panels // columns)
    size = (panel[0] * columns, panel[1] * rows)
    canvas, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    draw(axes.ravel())
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=110)
    plt.close(canvas)
    return path
