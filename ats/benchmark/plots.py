"""Plots of benchmark results, from the entries of a results file: `{"title", "at", "rows"}` with rows of
`report.as_dict`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def by_batch(entries: Sequence[dict], path: Path, *, title: str) -> None:
    """Over batch size: how much faster than dense every variant is (dashed: what its FLOPs promise), and its
    efficiency.
    """
    figure, (left, right) = _panels(2, title)
    lines = [(entry["title"], name) for entry in entries for name in _variants(entry)]
    for index, (heading, name) in enumerate(lines):
        rows = [
            row for entry in entries if entry["title"] == heading for row in entry["rows"] if row["variant"] == name
        ]
        label = f"{heading}: {name}" if len(entries) > 1 else name
        sizes, colour = [row["batch_size"] for row in rows], f"C{index}"
        left.plot(sizes, [row["flop_ratio"] for row in rows], "--", color=colour, alpha=0.6)
        _points(left, sizes, [row["speedup"] for row in rows], colour, label)
        _points(right, sizes, [row["efficiency"] for row in rows], colour, label)
    for axes, label in ((left, "dense time / time (dashed: FLOPs)"), (right, "efficiency")):
        axes.axhline(1, color="0.6", linewidth=0.8)
        axes.set(xlabel="batch size", ylabel=label, xscale="log")
        axes.set_ylim(bottom=0)
        _ticks(axes, {row["batch_size"] for entry in entries for row in entry["rows"]})
    left.legend(frameon=False, fontsize=8)
    _save(figure, path)


def by_size(entries: Sequence[dict], path: Path, *, title: str, label: str) -> None:
    """GFLOPs and milliseconds per sample of every variant over `at`: pixels, or frames. An entry has each once."""
    figure, panels = _panels(2, title)
    quantities = (
        ("GFLOPs per sample", lambda row: row["gflops"]["mean"]),
        ("ms per sample", lambda row: row["latency_ms"]["p50"] / row["batch_size"]),
    )
    places = [entry["at"] for entry in entries]
    for axes, (unit, value) in zip(panels, quantities, strict=True):
        for index, name in enumerate(dict.fromkeys(row["variant"] for entry in entries for row in entry["rows"])):
            numbers = [value(row) for entry in entries for row in entry["rows"] if row["variant"] == name]
            axes.plot(places, numbers, marker="o", color=f"C{index}", label=name)
        axes.set(xlabel=label, ylabel=unit, xscale="log", yscale="log")
        _ticks(axes, set(places))
    panels[0].legend(frameon=False)
    _save(figure, path)


def one_line(entries: Sequence[dict]) -> list[dict]:
    """Of entries by size: those of the first row's dtype, at the largest batch that all of them have."""
    dtype = entries[0]["rows"][0]["dtype"]
    entries = [entry for entry in entries if entry["rows"][0]["dtype"] == dtype]
    batch_size = max(set.intersection(*({row["batch_size"] for row in entry["rows"]} for entry in entries)))
    return [entry | {"rows": [row for row in entry["rows"] if row["batch_size"] == batch_size]} for entry in entries]


def by_tokens(entries: Sequence[dict], path: Path, *, title: str) -> None:
    """Samples per second over the mean number of tokens that an ATS block keeps; dashed: as many as the FLOPs say."""
    figure, (axes,) = _panels(1, title)
    found = []
    for entry in entries:
        dense, ats = (next(row for row in entry["rows"] if row["variant"] == name) for name in ("dense", "ats"))
        blocks = ats["tokens_per_block"].values()
        tokens = sum(block["mean"] for block in blocks) / len(blocks)
        found.append((tokens, ats["speedup"]["p50"], ats["flop_ratio"], dense["samples_per_second"]))
    found.sort()
    tokens, speedups, promised, dense = zip(*found, strict=True)
    reference = sorted(dense)[len(dense) // 2]  # ratios were taken round by round; one dense speed gives them a unit
    axes.plot(tokens, [reference * ratio for ratio in promised], "--", color="C1", alpha=0.6, label="ats: FLOPs")
    axes.plot(tokens, [reference * ratio for ratio in speedups], marker="o", color="C1", label="ats")
    axes.axhline(reference, color="C0", label="dense")
    axes.set(xlabel="tokens kept, mean over ATS blocks", ylabel="samples/s")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    _save(figure, path)


def sampler_cost(table: Sequence[dict], path: Path, *, title: str) -> None:
    """The sampler's milliseconds over the number of patches, beside N log N through its last point."""
    import math

    figure, (axes,) = _panels(1, title)
    sizes = [row["patches"] for row in table]
    for index, name in enumerate(key for key in table[0] if key.endswith(" ms")):
        axes.plot(sizes, [row[name] for row in table], marker="o", color=f"C{index}", label=name.removesuffix(" ms"))
    unit = table[-1]["sampling ms"] / (sizes[-1] * math.log(sizes[-1]))
    axes.plot(sizes, [unit * n * math.log(n) for n in sizes], "--", color="0.6", label="N log N")
    axes.set(xlabel="patches N", ylabel=f"ms for {table[0]['sequences']} sequences", xscale="log", yscale="log")
    _ticks(axes, set(sizes))
    axes.legend(frameon=False)
    _save(figure, path)


def plot_suite(results: Sequence[dict], folder: Path, name: str) -> list[str]:
    """Every plot that the entries of a suite allow; returns the files' names in `folder`."""
    families: dict[str, list[dict]] = {}
    for entry in results:
        if entry.get("rows"):
            families.setdefault(entry.get("family", ""), []).append(entry)
    sampler = [entry for entry in results if entry.get("table") and "sampling ms" in entry["table"][0]]
    plots = {
        "batch": lambda e, path: by_batch(e, path, title="By batch size"),
        "image": lambda e, path: by_size(e, path, title="By image size", label="side of the image in pixels"),
        "clip": lambda e, path: by_size(e, path, title="By clip length", label="frames"),
        "tokens": lambda e, path: by_tokens(e, path, title="By tokens kept"),
    }
    written = []
    for family, draw in plots.items():
        if family in families:
            written.append(f"{name}_{family}.png")
            draw(families[family], folder / written[-1])
    if sampler:
        written.append(f"{name}_sampler.png")
        sampler_cost(sampler[0]["table"], folder / written[-1], title="The sampler alone")
    return written


def _variants(entry: dict) -> list[str]:
    return [name for name in dict.fromkeys(row["variant"] for row in entry["rows"]) if name != "dense"]


def _points(axes: Axes, places: list[float], spreads: list[dict], colour: str, label: str) -> None:
    """Medians with bars from the 5th to the 95th percentile."""
    middle = [s["p50"] for s in spreads]
    bars = [[s["p50"] - s["p5"] for s in spreads], [s["p95"] - s["p50"] for s in spreads]]
    axes.errorbar(places, middle, yerr=bars, color=colour, marker="o", capsize=3, label=label)


def _ticks(axes: Axes, places: set[float]) -> None:
    axes.set_xticks(sorted(places))
    axes.set_xticks([], minor=True)
    axes.get_xaxis().set_major_formatter("{x:.0f}")


def _panels(number: int, title: str) -> tuple[Figure, Sequence[Axes]]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, number, figsize=(5.5 * number, 4), squeeze=False)
    figure.suptitle(title)
    return figure, panels[0]


def _save(figure: Figure, path: Path) -> None:
    from matplotlib import pyplot as plt

    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
