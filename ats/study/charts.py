"""Tables as markdown, and figures in the paper's forms: accuracy over GFLOPs, tokens per block, images by cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tabulate import tabulate

from ats.files import write_picture

COLOURS = ("#1f5fa8", "#d1602a", "#2f8f5b", "#8b4fa0", "#b8902a", "#5f6b76", "#c23a6b")
INK, GRID = "#2b2b2b", "#dddddd"


@contextmanager
def figure(
    num_panels: int, path: Path, *, columns: int = 3, panel: tuple[float, float] = (4.6, 3.7)
) -> Iterator[np.ndarray]:
    """Axes of the panels, in rows of `columns`, each `panel` inches; the picture is written to `path` at the end."""
    from matplotlib.figure import Figure

    columns = min(num_panels, columns)
    rows = -(-num_panels // columns)
    canvas = Figure(figsize=(panel[0] * columns, panel[1] * rows), layout="constrained")
    yield canvas.subplots(rows, columns, squeeze=False).ravel()
    write_picture(path, canvas.savefig, dpi=110)


def _style(ax, *, x: str, y: str, title: str) -> None:
    ax.set_title(title, fontsize=10, loc="left", color=INK)
    ax.set_xlabel(x, fontsize=9, color=INK)
    ax.set_ylabel(y, fontsize=9, color=INK)
    ax.tick_params(labelsize=8, colors=INK)
    ax.grid(color=GRID, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def draw_curve(
    ax, x: Sequence[float], y: Sequence[float], *, colour: int, spreads: Sequence[float] | None = None, **style
) -> None:
    """One variant's accuracies y over its costs x, with standard deviations `spreads`. `style` is errorbar's."""
    order = np.argsort(x)
    costs, means, yerr = (None if values is None else np.asarray(values)[order] for values in (x, y, spreads))
    look = {"color": COLOURS[colour % 7], "marker": "osD^vPX"[colour % 7], "markersize": 5, "linewidth": 1.3}
    ax.errorbar(costs, means, yerr, capsize=2, **look | style)


def finish_curves(ax, *, x: str, title: str, dense: float | None = None, y: str = "top-1 %") -> None:
    """Labels and legend, and a horizontal line at the accuracy `dense` of the dense network."""
    if dense is not None:
        ax.axhline(dense, color=INK, linewidth=0.9, linestyle="--")
        ax.annotate("dense", (1, dense), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8)
    _style(ax, x=x, y=y, title=title)
    ax.legend(fontsize=8, frameon=False, loc="lower right")


def draw_token_histograms(ax, token_counts: Mapping[int, Sequence[int]], *, title: str) -> None:
    """How many sequences kept how many tokens: one histogram per ATS block, the first block at the top."""
    blocks = sorted(token_counts, reverse=True)
    longest = max(np.flatnonzero(token_counts[block]).max(initial=0) for block in blocks) + 1
    for row, block in enumerate(blocks):
        counts = np.zeros(longest)
        kept = np.asarray(token_counts[block])[:longest]
        counts[: len(kept)] = kept
        top = row + 0.9 * counts / max(counts.max(), 1)
        ax.fill_between(np.arange(longest), row, top, step="mid", color=COLOURS[0], alpha=0.75, linewidth=0)
    ax.set_yticks(range(len(blocks)), [f"block {block}" for block in blocks])
    _style(ax, x="tokens kept, CLS counted", y="", title=title)


def draw_costs(ax, costs: np.ndarray, *, x: str, title: str, dense: float | None = None) -> None:
    """How many samples cost how much, with a vertical line at the cost `dense` of the dense network."""
    ax.hist(costs.ravel(), bins=40, color=COLOURS[0], alpha=0.75)
    if dense is not None:
        ax.axvline(dense, color=INK, linewidth=0.9, linestyle="--")
        ax.annotate("dense ", (dense, 0.97), xycoords=("data", "axes fraction"), ha="right", va="top", fontsize=8)
    _style(ax, x=x, y="images", title=title)


def markdown_table(headers: Sequence[str], lines: Sequence[Sequence[object]], *, left: int = 1) -> str:
    """A GitHub table; the first `left` columns are aligned left, the others right."""
    align = ["left" if column < left else "right" for column in range(len(headers))]
    return tabulate(lines, headers=headers, tablefmt="pipe", disable_numparse=True, colalign=align)


def token_statistics(counts: Sequence[int]) -> tuple[int, float, float, str]:
    """Mode, mean, standard deviation and range of the number of tokens kept; counts[n] sequences kept n."""
    weights, values = np.asarray(counts, dtype=np.float64), np.arange(len(counts))
    mean = float((weights * values).sum() / weights.sum())
    std = float(np.sqrt((weights * (values - mean) ** 2).sum() / weights.sum()))
    present = np.flatnonzero(weights)
    return int(weights.argmax()), mean, std, f"{present[0]}-{present[-1]}"


def token_table(token_counts: Mapping[int, Sequence[int]], *, paper: Mapping[int, Sequence] | None = None) -> str:
    """Per ATS block: mode, mean, standard deviation and range of the number of tokens kept, next to the paper's if
    given.
    """
    headers, lines = ["block", "mode", "mean", "standard deviation", "range"], []
    if paper is not None:
        headers[1] += ": paper / measured"
    for block, counts in sorted(token_counts.items()):
        mode, mean, std, span = token_statistics(counts)
        cells = [mode, f"{mean:.1f}", f"{std:.1f}", span]
        if paper is not None:
            cells = [f"{theirs} / {ours}" for theirs, ours in zip(paper.get(block, ("-",) * 4), cells, strict=True)]
        lines.append([block, *cells])
    return markdown_table(headers, lines, left=0)
