"""Benchmark results as tables, plots and files. Entries are `{"title", "at", "rows"}`, rows `Measured.as_dict()`."""

from __future__ import annotations

import json
import math
import os
import platform
import re
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from tabulate import tabulate

from ats import files
from ats.benchmark.breakdown import PARTS
from ats.errors import rounded

if TYPE_CHECKING:
    from matplotlib.axes import Axes


LEGEND = """\
GFLOPs: multiply-adds of one sample, as run; "paper": as the paper counts them.
efficiency: (dense time / time) / (dense FLOPs / FLOPs). At 1, time falls as much as FLOPs do.
dense time / time: median of the ratios within a round. linear alone: efficiency of the linear layers by themselves.
MB: peak memory with the weights; in training, what is kept for the backward pass.
Parts of a network: per cent of its time. In brackets: 5th to 95th percentile; of tokens, the standard deviation."""


def machine() -> dict[str, str | int]:
    """Processor, the widest instructions that PyTorch uses, GPU if there is one, and versions."""
    import timm

    cpuinfo = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*: (.+)", cpuinfo.read_text(), re.M) if cpuinfo.is_file() else []
    about: dict[str, str | int] = {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count() or 1,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    if torch.cuda.is_available():
        about["gpu"] = torch.cuda.get_device_name()
    return about


def _markdown(lines: Sequence[Mapping[str, object]]) -> str:
    return tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)


def plain_table(lines: Sequence[dict]) -> str:
    """A table of names and numbers as they are."""
    return tabulate(lines, headers="keys", tablefmt="github", floatfmt=".3g")


def table(rows: Sequence[dict]) -> str:
    """One line per variant and batch size."""
    lines = []
    for row in rows:
        latency, speedup, linear = row["latency_ms"], row["speedup"], row["linear_efficiency"]
        memory = row["peak_mb"] if row["saved_for_backward_mb"] is None else row["saved_for_backward_mb"]
        lines.append(
            {
                "variant": row["variant"],
                "batch": row["batch_size"],
                **({} if row["top1"] is None else {"top-1 %": f"{row['top1']:.2f}"}),
                "GFLOPs": rounded(row["gflops"]["mean"], 3),
                "paper": rounded(row["gflops_paper"]["mean"], 3),
                "ms p50": rounded(latency["p50"]),
                "ms p95": rounded(latency["p95"]),
                "samples/s": rounded(row["samples_per_second"], 3),
                "dense time / time": f"{speedup['p50']:.2f} ({speedup['p5']:.2f} - {speedup['p95']:.2f})",
                "dense FLOPs / FLOPs": f"{row['flop_ratio']:.2f}",
                "efficiency": f"{row['efficiency']['p50']:.3f}",
                **({} if linear is None else {"linear alone": f"{linear:.3f}"}),
                **({} if memory is None else {"MB": rounded(memory)}),
            }
        )
    return _markdown(lines)


def _first_rows(rows: Sequence[dict]) -> list[dict]:
    """Each variant's row at the first batch size and image size."""
    names = [row["variant"] for row in rows]
    return [rows[names.index(name)] for name in dict.fromkeys(names)]


def variants_table(rows: Sequence[dict]) -> str:
    """One line per variant: its settings, and top-1 with the mean GFLOPs of the same images. Empty without top-1 if
    there is only dense and ats.
    """
    if {row["variant"] for row in rows} <= {"dense", "ats"} and all(row["top1"] is None for row in rows):
        return ""
    lines = []
    for row in _first_rows(rows):
        top1 = row["top1"]
        found = {} if top1 is None else {"top-1 %": f"{top1:.2f}", "mean GFLOPs": rounded(row["top1_gflops"])}
        lines.append({"variant": row["variant"], **found, "setting": row["setting"]})
    return _markdown(lines)


def blocks_table(rows: Sequence[dict]) -> str:
    """Per block of each variant at its first batch size: tokens kept, mean (standard deviation); mean GFLOPs in both
    accountings, with those outside the blocks as "others".
    """
    lines: list[dict[str, str]] = []
    for row in _first_rows(rows):
        name = row["variant"]
        kept = {f"{block}": f"{own['mean']:.0f} ({own['std']:.0f})" for block, own in row["tokens_per_block"].items()}
        if kept:
            empty = {f"{block}": "" for block in row["gflops_per_block"]}
            lines.append({"variant": name, "per block": "tokens kept", **empty, **kept, "others": ""})
        for heading, key in (("GFLOPs", "gflops"), ("GFLOPs, paper", "gflops_paper")):
            blocks = row[f"{key}_per_block"]
            costs = blocks | {"others": row[key]["mean"] - sum(blocks.values())}
            cells = {f"{block}": rounded(value, 3) for block, value in costs.items()}
            lines.append({"variant": name, "per block": heading, **cells})
    return _markdown(lines)


def parts_table(rows: Sequence[dict]) -> str:
    """Share of the time by part, per cent. Parts that no variant has are left out; empty if nothing was measured."""
    rows = [row for row in rows if row["parts"]]
    parts = [part for part in PARTS if any(row["parts"][part] for row in rows)]
    shares = [{part: f"{100 * row['parts'][part]:.1f}" for part in parts} for row in rows]
    names = [{"variant": row["variant"], "batch": row["batch_size"]} for row in rows]
    return _markdown([name | share for name, share in zip(names, shares, strict=True)])


def all_tables(rows: Sequence[dict]) -> str:
    """Every table that there are numbers for."""
    tables = (variants_table(rows), table(rows), blocks_table(rows), parts_table(rows))
    return "\n\n".join(text for text in tables if text)


def write(
    output: Path, entries: Sequence[dict], tables: str, *, command: Sequence[str], title: str, counts: str
) -> None:
    """Write results.json, table.md, speed.png and, if there are several image sizes, size.png to the folder `output`.
    `counts` says where token counts come from, see `describe_counts`.
    """
    rows = [row for entry in entries for row in entry["rows"]]
    about = {"machine": machine(), "command": " ".join(command), "token_counts": counts, "rows": rows}
    files.write(output / "results.json", json.dumps(about, indent=1) + "\n")
    files.write(output / "table.md", f"{counts}\n\n{tables}\n")
    plot_by_batch(entries, output / "speed.png", title=title)
    if len({entry["at"] for entry in entries}) > 1:
        plot_by_size(entries, output / "size.png", title=title, label="side of the image in pixels")


def replace_section(document: Path, name: str, text: str) -> None:
    """Put `text` between the lines `<!-- name -->` and `<!-- /name -->` of a markdown file, or at its end."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    content = document.read_text() if document.exists() else "# Benchmarks\n"
    if begin not in content or end not in content:
        content = f"{content.rstrip()}\n\n{begin}\n{end}\n"
    before, rest = content.split(begin, 1)
    after = rest.split(end, 1)[1]
    files.write(document, f"{before}{begin}\n{text.strip()}\n{end}{after}")


def plot_by_batch(entries: Sequence[dict], path: Path, *, title: str = "By batch size") -> None:
    """Speed relative to dense (dashed: by FLOPs) and efficiency of every variant, over batch size."""
    lines: dict[str, list[dict]] = {}
    for entry in entries:
        for row in entry["rows"]:
            if row["variant"] != "dense":
                label = f"{entry['title']}: {row['variant']}" if len(entries) > 1 else row["variant"]
                lines.setdefault(label, []).append(row)
    sizes = {row["batch_size"] for entry in entries for row in entry["rows"]}
    names = ("dense time / time (dashed: FLOPs)", "efficiency")
    with _figure(path, title, "batch size", names, ticks=sizes, xscale="log") as panels:
        for index, (label, rows) in enumerate(lines.items()):
            places, colour = [row["batch_size"] for row in rows], f"C{index}"
            panels[0].plot(places, [row["flop_ratio"] for row in rows], "--", color=colour, alpha=0.6)
            for axes, key in zip(panels, ("speedup", "efficiency"), strict=True):
                low, middle, high = (np.array([row[key][name] for row in rows]) for name in ("p5", "p50", "p95"))
                bars = (middle - low, high - middle)
                axes.errorbar(places, middle, yerr=bars, color=colour, marker="o", capsize=3, label=label)
        for axes in panels:
            axes.axhline(1, color="0.6", linewidth=0.8)
            axes.set_ylim(bottom=0)


def plot_by_size(entries: Sequence[dict], path: Path, *, title: str, label: str) -> None:
    """GFLOPs and milliseconds per sample of every variant over `at`: pixels or frames, each in one entry.

    Only entries with the first one's dtype, at the largest batch size that they all have.
    """
    entries = [entry for entry in entries if entry["rows"][0]["dtype"] == entries[0]["rows"][0]["dtype"]]
    batch_size = max(set.intersection(*({row["batch_size"] for row in entry["rows"]} for entry in entries)))
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for entry in entries:
        for row in entry["rows"]:
            if row["batch_size"] == batch_size:
                point = (entry["at"], row["gflops"]["mean"], row["latency_ms"]["p50"] / batch_size)
                lines.setdefault(row["variant"], []).append(point)
    names, ticks = ("GFLOPs per sample", "ms per sample"), {entry["at"] for entry in entries}
    with _figure(path, title, label, names, ticks=ticks, xscale="log", yscale="log") as panels:
        for name, points in lines.items():
            places, *quantities = zip(*points, strict=True)
            for axes, values in zip(panels, quantities, strict=True):
                axes.plot(places, values, marker="o", label=name)


def plot_by_tokens(entries: Sequence[dict], path: Path) -> None:
    """Samples per second over the mean number of tokens that an ATS block keeps; dashed: what the FLOPs promise."""
    points, dense_speeds = [], []
    for entry in entries:
        dense, ats = (next(row for row in entry["rows"] if row["variant"] == name) for name in ("dense", "ats"))
        tokens = statistics.fmean(block["mean"] for block in ats["tokens_per_block"].values())
        points.append((tokens, ats["flop_ratio"], ats["speedup"]["p50"]))
        dense_speeds.append(dense["samples_per_second"])
    kept, promised, speedups = zip(*sorted(points), strict=True)
    reference = statistics.median_high(dense_speeds)  # ratios are per round; one dense speed gives them a unit
    with _figure(path, "By tokens kept", "tokens kept, mean over ATS blocks", ["samples/s"]) as (axes,):
        axes.plot(kept, [reference * ratio for ratio in promised], "--", color="C1", alpha=0.6, label="ats: FLOPs")
        axes.plot(kept, [reference * ratio for ratio in speedups], marker="o", color="C1", label="ats")
        axes.axhline(reference, color="C0", label="dense")
        axes.set_ylim(bottom=0)


def plot_sampler_cost(entries: Sequence[dict], path: Path) -> None:
    """The sampler's milliseconds over the number of patches, beside N log N through its last point."""
    table = entries[-1]["table"]
    sizes, name = [row["patches"] for row in table], f"ms for {table[0]['sequences']} sequences"
    scales = {"xscale": "log", "yscale": "log"}
    with _figure(path, "The sampler alone", "patches N", [name], ticks=set(sizes), **scales) as (axes,):
        for key in (key for key in table[0] if key.endswith(" ms")):
            axes.plot(sizes, [row[key] for row in table], marker="o", label=key.removesuffix(" ms"))
        unit = table[-1]["sampling ms"] / (sizes[-1] * math.log(sizes[-1]))
        axes.plot(sizes, [unit * n * math.log(n) for n in sizes], "--", color="0.6", label="N log N")


# Family of a measurement -> its plot.
PLOTS = {
    "batch": plot_by_batch,
    "image": partial(plot_by_size, title="By image size", label="side of the image in pixels"),
    "clip": partial(plot_by_size, title="By clip length", label="frames"),
    "tokens": plot_by_tokens,
    "sampler": plot_sampler_cost,
}


def plot_suite(results: Sequence[dict], folder: Path, name: str) -> list[str]:
    """Every plot that the entries of a suite allow; returns the names of the files in `folder`."""
    written = []
    for family, plot in PLOTS.items():
        entries = [entry for entry in results if entry["family"] == family and entry.get("rows", entry.get("table"))]
        if entries:
            written.append(f"{name}_{family}.png")
            plot(entries, folder / written[-1])
    return written


@contextmanager
def _figure(
    path: Path, title: str, xlabel: str, ylabels: Sequence[str], *, ticks: Iterable[float] = (), **scales: str
) -> Iterator[Sequence[Axes]]:
    """The panels of a new figure, which is saved to `path` at the end; the first gets the legend."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(ylabels), 4))
    figure.suptitle(title)
    panels = figure.subplots(1, len(ylabels), squeeze=False)[0]
    for axes, ylabel in zip(panels, ylabels, strict=True):
        axes.set(xlabel=xlabel, ylabel=ylabel, **scales)
        if ticks:
            axes.set_xticks(sorted(ticks))
            axes.set_xticks([], minor=True)
            axes.get_xaxis().set_major_formatter("{x:.0f}")
    yield panels
    panels[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    files.write_picture(path, figure.savefig, dpi=110)
