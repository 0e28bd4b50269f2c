"""Benchmark results as tables and JSON."""

from __future__ import annotations

import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from tabulate import tabulate

from ats.benchmark import plots
from ats.benchmark.parts import PARTS
from ats.benchmark.timing import Measured


def machine() -> dict[str, str | int]:
    """What ran: processor or GPU, threads, versions."""
    import timm

    about: dict[str, str | int] = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count() or 1,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
    if torch.cuda.is_available():
        about["gpu"] = torch.cuda.get_device_name()
    return about


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def as_dict(row: Measured) -> dict:
    """A row of results.json: every number of the table and what it is made from."""
    return {
        "variant": row.variant,
        "batch_size": row.batch_size,
        "params_m": row.params_m,
        "setting": row.setting,
        "top1": row.top1,
        "top1_gflops": row.top1_gflops,
        "gflops": _spread(row.gflops),
        "gflops_paper": _spread(row.gflops_paper),
        "gflops_dense": row.gflops_dense,
        "tokens_per_block": {block: _spread(counts) for block, counts in row.tokens.items()},
        "latency_ms": _spread([1e3 * value for value in row.seconds]),
        "samples_per_second": row.batch_size / statistics.median(row.seconds),
        "speedup": _spread(row.ratios),
        "flop_ratio": row.flop_ratio,
        "efficiency": _spread(row.efficiencies),
        "peak_mb": row.peak_mb,
        "saved_for_backward_mb": row.saved_mb,
        "parts": row.parts,
        "linear_efficiency": row.linear_efficiency,
        "host_waits": row.host_waits,
    }


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation and percentiles."""
    numbers = torch.tensor(values, dtype=torch.float64)
    low, middle, high = torch.quantile(numbers, torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)).tolist()
    return {
        "mean": numbers.mean().item(),
        "std": numbers.std(correction=0).item(),
        "p5": low,
        "p50": middle,
        "p95": high,
    }


def table(rows: list[Measured], *, tablefmt: str = "github") -> str:
    """One line per variant and batch size."""
    lines = []
    for row in rows:
        latency, speedup = _spread([1e3 * value for value in row.seconds]), _spread(row.ratios)
        memory = row.saved_mb if row.saved_mb is not None else row.peak_mb
        lines.append(
            {
                "variant": row.variant,
                "batch": row.batch_size,
                **({} if row.top1 is None else {"top-1 %": f"{row.top1:.2f}"}),
                "GFLOPs": f"{statistics.fmean(row.gflops):.3g}",
                "paper": f"{statistics.fmean(row.gflops_paper):.3g}",
                "ms p50": f"{latency['p50']:.4g}",
                "ms p95": f"{latency['p95']:.4g}",
                "samples/s": f"{row.batch_size / statistics.median(row.seconds):.3g}",
                "dense time / time": f"{speedup['p50']:.2f} ({speedup['p5']:.2f} - {speedup['p95']:.2f})",
                "dense FLOPs / FLOPs": f"{row.flop_ratio:.2f}",
                "efficiency": f"{row.efficiency:.3f}",
                **({} if row.linear_efficiency is None else {"linear alone": f"{row.linear_efficiency:.3f}"}),
                **({} if memory is None else {"MB": f"{memory:.4g}"}),
            }
        )
    return tabulate(lines, headers="keys", tablefmt=tablefmt, disable_numparse=True)


def variants_table(rows: list[Measured], *, tablefmt: str = "github") -> str:
    """One line per variant: what its samplers are set to, and top-1 with the GFLOPs of the images it was taken on;
    empty if all there is is ATS as it is configured.
    """
    first = {row.variant: row for row in reversed(rows)}
    if set(first) <= {"dense", "ats"} and all(row.top1 is None for row in rows):
        return ""
    lines = []
    for name in dict.fromkeys(row.variant for row in rows):
        row = first[name]
        cells = {} if row.top1 is None else {"top-1 %": f"{row.top1:.2f}", "mean GFLOPs": f"{row.top1_gflops:.4g}"}
        lines.append({"variant": name, **cells, "setting": row.setting})
    return tabulate(lines, headers="keys", tablefmt=tablefmt, disable_numparse=True)


def tokens_table(rows: list[Measured], *, tablefmt: str = "github") -> str:
    """Tokens kept by each block, mean and standard deviation; empty if no variant samples."""
    lines, blocks = [], sorted({block for row in rows for block in row.tokens})
    for row in rows:
        if row.tokens and row.variant not in {line["variant"] for line in lines}:
            spreads = {block: _spread(counts) for block, counts in row.tokens.items()}
            cells = {b: f"{spreads[b]['mean']:.0f} ({spreads[b]['std']:.0f})" if b in spreads else "" for b in blocks}
            lines.append({"variant": row.variant, **{f"block {b}": cell for b, cell in cells.items()}})
    return tabulate(lines, headers="keys", tablefmt=tablefmt, disable_numparse=True) if lines else ""


def parts_table(rows: list[Measured], *, tablefmt: str = "github") -> str:
    """Share of the time by part, per cent, of the parts that some variant has; empty where it was not measured."""
    rows = [row for row in rows if row.parts]
    parts = [part for part in PARTS if any(row.parts[part] for row in rows)]
    lines = [
        {"variant": row.variant, "batch": row.batch_size, **{part: f"{100 * row.parts[part]:.1f}" for part in parts}}
        for row in rows
    ]
    return tabulate(lines, headers="keys", tablefmt=tablefmt, disable_numparse=True) if lines else ""


def extra_table(table: Sequence[dict], *, tablefmt: str = "github") -> str:
    """Rows of names and numbers as they are."""
    return tabulate(table, headers="keys", tablefmt=tablefmt, floatfmt=".3g")


def write(output: Path, rows: list[Measured], tables: str, *, command: Sequence[str], title: str) -> None:
    """results.json, table.md and speed.png in the folder `output`."""
    output.mkdir(parents=True, exist_ok=True)
    entry = {"title": title, "rows": [as_dict(row) for row in rows]}
    about = {"machine": machine(), "command": " ".join(command), "rows": entry["rows"]}
    (output / "results.json").write_text(json.dumps(about, indent=1) + "\n")
    (output / "table.md").write_text(tables + "\n")
    plots.by_batch([entry], output / "speed.png", title=title)


def replace_section(document: Path, name: str, text: str) -> None:
    """Put `text` between the lines `<!-- name -->` and `<!-- /name -->` of a markdown file; at its end if it has none.

    What people wrote around it stays.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    content = document.read_text() if document.exists() else "# Benchmarks\n"
    if begin not in content or end not in content:
        content = f"{content.rstrip()}\n\n{begin}\n{end}\n"
    before, rest = content.split(begin, 1)
    after = rest.split(end, 1)[1]
    document.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}")
