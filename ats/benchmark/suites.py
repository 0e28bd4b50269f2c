"""The measurements that docs/BENCHMARKS.md shows, each suite by one command: `tools/benchmark.py --suite NAME`.

A measurement that fails leaves its traceback in the suite's JSON and the others alone.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from ats.benchmark import plots, report
from ats.benchmark.counts import describe_counts
from ats.benchmark.loading import benchmark_loading, data_limit
from ats.benchmark.sampler import sampler_rows
from ats.benchmark.suite_items import SUITES, Extra, Goal, Measurement
from ats.benchmark.timing import Measured, measure
from ats.config import get_cfg, load_config
from ats.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "BENCHMARKS.md"
FOLDER = ROOT / "docs" / "benchmarks"
ReadBatch = Callable[[CfgNode, int, int | None], Tensor]


def run_suite(name: str, read_batch: ReadBatch, *, folder: Path = FOLDER, document: Path = DOCUMENT) -> None:
    """Run a suite; write <folder>/<name>.json, its plots, and the section `name` of `document`, after every
    measurement, so that nothing measured is lost.

    Raises:
        UserError: the suite gpu without a GPU; at the end, if a measurement failed.
    """
    if name == "gpu" and not torch.cuda.is_available():
        raise UserError("--suite gpu: PyTorch sees no GPU. Try --suite cpu, or --suite quick to see that it would run.")
    command, machine = f"python tools/benchmark.py --suite {name}", report.machine()
    head = f"`{command}` on " + ", ".join(f"{key} {value}" for key, value in machine.items())
    head += f"\n\n{describe_counts('')}"
    text, results = [], []
    folder.mkdir(parents=True, exist_ok=True)
    for item in SUITES[name]():
        print(f"\n### {item.title}\n", flush=True)
        entry, tables = _run_extra(item) if isinstance(item, Extra) else _run_measurement(item, read_batch)
        tables += [f"**Failed:** {where}: {error.splitlines()[-1]}" for where, error in entry["errors"].items()]
        print("\n\n".join(tables), flush=True)
        text += [f"### {item.title}", *tables]
        results.append(entry)
        about = {"command": command, "machine": machine, "measurements": results}
        (folder / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n")
        report.replace_section(document, name, "\n\n".join([head, *text]))
    summary = [f"Took {sum(entry['seconds'] for entry in results) / 60:.1f} minutes.", _goals_table(results)]
    summary += [_data_line(results)]
    summary += [f"![{file}]({folder.name}/{file})" for file in plots.plot_suite(results, folder, name)]
    summary = [line for line in summary if line]
    print("\n\n".join(summary))
    report.replace_section(document, name, "\n\n".join([head, *summary, *text]))
    print(f"\nWritten: {folder / name}.json, {document}")
    failed = [f"{entry['title']}, {where}" for entry in results for where in entry["errors"]]
    if failed:
        raise UserError(f"Failed: {'; '.join(failed)}. Their tracebacks are in {folder / name}.json under errors.")


def _run_measurement(item: Measurement, read_batch: ReadBatch) -> tuple[dict, list[str]]:
    """Its entry in the results, and its tables. Every batch size is measured by itself."""
    start, settings = time.perf_counter(), item.settings
    rows: list[Measured] = []
    errors: dict[str, str] = {}
    for size in item.batch_sizes:
        try:
            cfg = load_config(str(ROOT / "configs" / item.cfg), ["ATS.ENABLE", True, *item.overrides])
            rows += measure(cfg, {size: read_batch(cfg, size, item.image_size)}, settings)
        except Exception:  # out of memory, a kernel that does not build, a library that cannot: the rest still counts
            errors[f"batch {size}"] = traceback.format_exc()
        _tidy()
    entry = {
        "title": item.title,
        "family": item.family,
        "at": item.at,
        "cfg": item.cfg,
        "overrides": list(item.overrides),
        "image_size": item.image_size,
        "threads": settings.threads,
        "dtype": str(settings.dtype or torch.float32),
        "compile": settings.compile,
        "train": settings.train,
        "token_counts": describe_counts("", scale=settings.token_scale, mean_std=settings.mean_std),
        "dense": list(settings.dense_keys),
        "seconds": time.perf_counter() - start,
        "rows": [report.as_dict(row) for row in rows],
        "errors": errors,
    }
    entry["goals"] = [goal | {"title": item.title} for row in rows for goal in _judge(item, row, rows)]
    return entry, _tables(entry, rows) if rows else []


def _tables(entry: dict, rows: list[Measured]) -> list[str]:
    """What the document shows of a measurement; where its token counts come from if not from where others' do."""
    counts = entry["token_counts"] if entry["token_counts"] != describe_counts("") else ""
    return [text for text in (counts, report.table(rows), report.parts_table(rows)) if text]


def _run_extra(item: Extra) -> tuple[dict, list[str]]:
    start = time.perf_counter()
    table, errors = [], {}
    try:
        table = _EXTRAS[item.kind](**item.arguments)
    except Exception:
        errors[item.kind] = traceback.format_exc()
    entry = {"title": item.title, "kind": item.kind, "seconds": time.perf_counter() - start, "table": table}
    rows = {row.get("split"): row for row in table}
    entry["goals"] = [
        {"variant": goal.variant, "batch": ""}
        | _judged(goal, rows[goal.variant][goal.quantity])
        | {"title": item.title}
        for goal in item.goals
        if goal.variant in rows
    ]
    return entry | {"errors": errors}, [report.extra_table(table)] if table else []


def _loader_rows(rounds: int) -> list[dict]:
    return benchmark_loading("", get_cfg(), rounds=rounds)


def _sampler_rows(device: str, sizes: tuple[int, ...], num_sequences: int) -> list[dict]:
    return sampler_rows(sizes, num_sequences=num_sequences, device=torch.device(device))


_EXTRAS: dict[str, Callable[..., list[dict]]] = {"loader": _loader_rows, "sampler": _sampler_rows}


def _tidy() -> None:
    """Give back what the last measurement held."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _judge(item: Measurement, row: Measured, rows: list[Measured]) -> list[dict]:
    """The goals that `item` sets this row, with what was measured."""
    judged = []
    for goal in item.goals:
        if goal.variant != row.variant or (goal.batch_size or row.batch_size) != row.batch_size:
            continue
        bound = goal.bound
        if goal.quantity == "share of sampling":
            value = row.parts["scoring and sampling"]
        elif goal.quantity == "efficiency":
            value = row.efficiency
        elif goal.quantity == "activations / dense":
            dense = next(r for r in rows if (r.variant, r.batch_size) == ("dense", row.batch_size))
            value, bound = row.activations_mb / dense.activations_mb, row.token_ratio + goal.bound
        else:
            name = goal.quantity.removesuffix(" time / time")
            other = next(r for r in rows if (r.variant, r.batch_size) == (name, row.batch_size))
            value = statistics.median(a / b for a, b in zip(other.seconds, row.seconds, strict=True))
        judged.append({"variant": row.variant, "batch": row.batch_size} | _judged(replace(goal, bound=bound), value))
    return judged


def _judged(goal: Goal, value: float) -> dict:
    return {
        "quantity": goal.quantity,
        "goal": f"{'<=' if goal.at_most else '>='} {goal.bound:.3g}",
        "measured": value,
        "met": value <= goal.bound if goal.at_most else value >= goal.bound,
    }


def _goals_table(results: list[dict]) -> str:
    goals = [goal for entry in results for goal in entry.get("goals", ())]
    lines = [{"measurement": goal["title"]} | {k: v for k, v in goal.items() if k != "title"} for goal in goals]
    return report.extra_table([line | {"met": "yes" if line["met"] else "no"} for line in lines]) if lines else ""


def _data_line(results: list[dict]) -> str:
    """Whether the evaluation of images would wait for data or for the fastest network measured; empty if a side is
    missing.
    """
    loaders = [entry["table"][-1] for entry in results if entry.get("kind") == "loader" and entry["table"]]
    speeds = [
        row["samples_per_second"]
        for entry in results
        if entry.get("family") == "batch" and not entry["train"]
        for row in entry["rows"]
    ]
    return data_limit(loaders[0]["loader images/s"], max(speeds)) if loaders and speeds else ""
