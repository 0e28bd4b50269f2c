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
        "image_size": row.image_size,
        "dtype": row.dtype,
        "params_m": row.params_m,
        "setting": row.setting,
        "top1": row.top1,
        "top1_gflops": row.top1_gflops,
        "gflops": _spread(row.gflops),
        "gflops_paper": _spread(row.gflops_paper),
        "gflops_dense": row.gflops_dense,
        "gflops_per_block": {block: statistics.fmean(own) for block, own in row.block_gflops.items()},
        "gflops_paper_per_block": {block: statistics.fmean(own) for block, own in row.block_gflops_paper.items()},
        "tokens_per_block": {block: _spread(counts) for block, counts in row.tokens.items()},
        "token_ratio": row.token_ratio,
        "latency_ms": _spread([1e3 * value for value in row.seconds]),
        "samples_per_second": row.batch_size / statistics.median(row.seconds),
        "speedup": _spread(row.ratios),
        "flop_ratio": row.flop_ratio,
        "efficiency": _spread(row.efficiencies),
        "peak_mb": row.peak_mb,
        "saved_for_backward_mb": row.saved_mb,
        "activations_mb": row.activations_mb,
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


def blocks_table(rows: list[Measured], *, tablefmt: str = "github") -> str:
    """Tokens kept by each block, mean and standard deviation, and its mean GFLOPs, as run and in the paper's
    accounting; of each variant at its first batch size. "others": GFLOPs outside the blocks.
    """
    lines: list[dict[str, str]] = []
    first = {row.variant: row for row in reversed(rows)}
    for name in dict.fromkeys(row.variant for row in rows):
        row = first[name]
        spreads = {block: _spread(counts) for block, counts in row.tokens.items()}
        kept = {f"{block}": f"{own['mean']:.0f} ({own['std']:.0f})" for block, own in spreads.items()}
        costs = {
            "GFLOPs": (row.gflops, row.block_gflops),
            "GFLOPs, paper": (row.gflops_paper, row.block_gflops_paper),
        }
        if kept:
            empty = {f"{block}": "" for block in row.block_gflops}
            lines.append({"variant": name, "per block": "tokens kept", **empty, **kept, "others": ""})
        for heading, (whole, blocks) in costs.items():
            means = {f"{block}": statistics.fmean(own) for block, own in blocks.items()}
            means["others"] = statistics.fmean(whole) - sum(means.values())
            cells = {block: f"{value:.3g}" for block, value in means.items()}
            lines.append({"variant": name, "per block": heading, **cells})
    return tabulate(lines, headers="keys", tablefmt=tablefmt, disable_numparse=True)


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


def all_tables(rows: list[Measured]) -> str:
    """Every table that there are numbers for."""
    tables = (variants_table(rows), table(rows), blocks_table(rows), parts_table(rows))
    return "\n\n".join(text for text in tables if text)


def write(output: Path, rows: list[Measured], tables: str, *, command: Sequence[str], title: str, counts: str) -> None:
    """results.json, table.md, speed.png and, of several image sizes, size.png in the folder `output`.

    Args:
        counts: where token counts come from, see `counts.describe_counts`.
    """
    output.mkdir(parents=True, exist_ok=True)
    dicts = [as_dict(row) for row in rows]
    about = {"machine": machine(), "command": " ".join(command), "token_counts": counts, "rows": dicts}
    (output / "results.json").write_text(json.dumps(about, indent=1) + "\n")
    (output / "table.md").write_text(f"{counts}\n\n{tables}\n")
    kinds = dict.fromkeys((row.image_size, row.dtype) for row in rows)
    entries = [
        {
            "title": f"{size} pixels, {dtype}",
            "at": size,
            "rows": [row for row in dicts if (row["image_size"], row["dtype"]) == (size, dtype)],
        }
        for size, dtype in kinds
    ]
    plots.by_batch(entries, output / "speed.png", title=title)
    if len({size for size, _ in kinds}) > 1:
        plots.by_size(plots.one_line(entries), output / "size.png", title=title, label="side of the image in pixels")


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
