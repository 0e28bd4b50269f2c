"""The suites that docs/BENCHMARKS.md shows. `tools/benchmark.py --suite NAME` measures what suites/NAME.yaml lists.

A measurement is a flat mapping. Names in capitals are config keys, names of `BenchmarkSettings` say how to measure, and
the others are those of `Measurement`. `sweep: {NAME: [VALUE, ...]}` makes one measurement per value, which also fills
the {} of the title. Other entries beside `measurements` are YAML anchors.

A measurement that fails leaves its traceback in the suite's JSON; the others still run. `minutes` beside `measurements`
is how long the suite may take: measurements not begun by then are named and count as failed.
"""

from __future__ import annotations

import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import yaml

from ats.benchmark import tables
from ats.benchmark.engines import ENGINES, versions
from ats.benchmark.peers import Peers, measure_peers
from ats.benchmark.synthetic_counts import describe_counts
from ats.benchmark.timing import BenchmarkSettings, Measured, measure
from ats.benchmark.variants import read_batch
from ats.config import CfgNode, load_config
from ats.errors import UserError, suggest
from ats.files import write
from ats.reduction import Candidates
from ats.reduction.inverse_transform import InverseTransform, official_rule
from ats.tokens import RaggedTokens

SUITES = Path(__file__).parent / "suites"
ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "BENCHMARKS.md"
FOLDER = ROOT / "docs" / "benchmarks"


class Goal(NamedTuple):
    """A bound on a measured number."""

    variant: str
    quantity: str  # "efficiency", "share of sampling", "activations / dense", or "NAME time / time" of another variant
    relation: str  # ">=" or "<="
    bound: float  # of "activations / dense": on top of the token ratio
    batch_size: int = 0  # 0: all


@dataclass(frozen=True)
class Measurement:
    """Variants of a network against its dense self, engines against each other, or the sampler alone."""

    title: str
    settings: BenchmarkSettings
    overrides: list  # KEY, VALUE, ...
    goals: list[Goal]
    cfg: str = ""  # file below configs/
    batch_sizes: Sequence[int] = ()
    image_size: int | None = None  # None: the config's
    family: str = ""  # the plot it goes into: batch, image, clip or tokens
    at: float = 0  # its place on that plot's axis
    engines: Sequence[str] = ()  # compare these instead of variants (`peers`); "all": every one
    sampler: dict | None = None  # arguments of `sampler_rows`: time the sampler alone


def load_suite(name: str) -> list[Measurement]:
    """The measurements of a suite. UserError if there is no such suite."""
    names = sorted(path.stem for path in SUITES.glob("*.yaml"))
    if name not in names:
        raise UserError(f"--suite {name}: choose from {', '.join(names)}.{suggest(name, names)}")
    return [
        _measurement(entry | {key: value, "at": value, "title": entry["title"].format(value)})
        for entry in _read(name)["measurements"]
        for key, values in entry.pop("sweep", {"at": [0]}).items()
        for value in values
    ]


def _read(name: str) -> dict:
    return yaml.safe_load((SUITES / f"{name}.yaml").read_text())


def _measurement(entry: dict) -> Measurement:
    how = {setting.name for setting in fields(BenchmarkSettings)} & entry.keys()
    settings = BenchmarkSettings(**{key: entry.pop(key) for key in how})
    overrides = [word for key in list(entry) if key.isupper() for word in (key, entry.pop(key))]
    goals = [Goal(*goal) for goal in entry.pop("goals", ())]
    return Measurement(**entry, settings=settings, overrides=overrides, goals=goals)


def run_suite(name: str, *, folder: Path = FOLDER, document: Path = DOCUMENT) -> None:
    """Run a suite; write <folder>/<name>.json, its plots, and section `name` of `document`. The JSON and the section
    are written after every measurement, so nothing measured is lost.

    Raises:
        UserError: no such suite, or gpu without a GPU; at the end, if a measurement failed.
    """
    measurements = load_suite(name)
    if name == "gpu" and not torch.cuda.is_available():
        raise UserError("--suite gpu: PyTorch sees no GPU. Try --suite cpu, or --suite quick to check that it runs.")
    command, machine = f"python tools/benchmark.py --suite {name}", tables.machine()
    head = f"`{command}` on " + ", ".join(f"{key} {value}" for key, value in machine.items())
    head += f"\n\n{describe_counts('')}"
    text, results = [], []
    begin, minutes = time.perf_counter(), _read(name).get("minutes", float("inf"))
    for item in measurements:
        start = time.perf_counter()
        spent = (start - begin) / 60
        print(f"\n### {item.title} (begun after {spent:.1f} minutes)\n", flush=True)
        run = _run_sampler if item.sampler is not None else _run_peers if item.engines else _run_measurement
        entry, shown = run(item) if spent < minutes else _out_of_time(minutes)
        entry = {"title": item.title, "seconds": time.perf_counter() - start} | entry
        shown += [f"**Failed:** {where}: {error.splitlines()[-1]}" for where, error in entry["errors"].items()]
        print("\n\n".join(shown), flush=True)
        text += [f"### {item.title}", *shown]
        results.append(entry)
        about = {"command": command, "machine": machine, "measurements": results}
        write(folder / f"{name}.json", json.dumps(about, indent=1) + "\n")
        tables.replace_section(document, name, "\n\n".join([head, *text]))
    summary = [f"Took {sum(entry['seconds'] for entry in results) / 60:.1f} minutes."]
    goals = [{"measurement": entry["title"]} | goal for entry in results for goal in entry["goals"]]
    goals = [goal | {"met": "yes" if goal["met"] else "no"} for goal in goals]
    summary += [tables.plain_table(goals)] if goals else []
    summary += [f"![{file}]({folder.name}/{file})" for file in tables.plot_suite(results, folder, name)]
    print("\n\n".join(summary))
    tables.replace_section(document, name, "\n\n".join([head, *summary, *text]))
    print(f"\nWritten: {folder / name}.json, {document}")
    failed = [f"{entry['title']}, {where}" for entry in results for where in entry["errors"]]
    if failed:
        raise UserError(f"Failed: {'; '.join(failed)}. Their tracebacks are in {folder / name}.json under errors.")


def _run_measurement(item: Measurement) -> tuple[dict, list[str]]:
    """Its entry in the results, and its tables. Each batch size is measured separately."""
    settings, found, errors = item.settings, list[Measured](), dict[str, str]()
    for size in item.batch_sizes:
        with _attempt(errors, f"batch {size}"):
            cfg = _config_of(item)
            found += measure(cfg, {size: read_batch(cfg, size, item.image_size)}, settings)
    rows = [row.as_dict() for row in found]
    counts = describe_counts("", scale=settings.token_scale, mean_std=settings.mean_std)
    entry = {
        **{name: getattr(item, name) for name in ("family", "at", "cfg", "overrides", "image_size")},
        **{name: getattr(settings, name) for name in ("threads", "compile", "train")},
        "dtype": f"torch.{settings.dtype}",
        "dense": settings.dense_keys,
        "token_counts": counts,
        "rows": rows,
        "errors": errors,
        "goals": [goal for row in found for goal in judge(item.goals, row, found)],
    }
    if not rows:
        return entry, []
    counts = "" if counts == describe_counts("") else counts  # the head of the section has the usual ones
    return entry, [text for text in (counts, tables.table(rows), tables.parts_table(rows)) if text]


def _out_of_time(minutes: float) -> tuple[dict, list[str]]:
    errors = {"not begun": f"The suite's {minutes:g} minutes were over."}
    return {"family": "", "goals": [], "errors": errors}, []


def _run_peers(item: Measurement) -> tuple[dict, list[str]]:
    """The same for engines."""
    found, errors, engines = list[Peers](), dict[str, str](), tuple(ENGINES) if item.engines == "all" else item.engines
    for size in item.batch_sizes:
        with _attempt(errors, f"batch {size}"):
            cfg = _config_of(item)
            found += measure_peers(cfg, {size: read_batch(cfg, size, item.image_size)}, item.settings, engines)
    about = {name: getattr(item, name) for name in ("cfg", "overrides", "image_size")}
    entry = {"kind": "peers", "family": "", **about, "versions": versions(), "peers": [own.as_dict() for own in found]}
    usual = f" {describe_counts('')}"  # the head of the section has it
    return entry | {"goals": [], "errors": errors}, [own.text().replace(usual, "") for own in found]


def _config_of(item: Measurement) -> CfgNode:
    return load_config(str(ROOT / "configs" / item.cfg), ["ATS.ENABLE", True, *item.overrides])


def _run_sampler(item: Measurement) -> tuple[dict, list[str]]:
    table, errors = list[dict](), dict[str, str]()
    with _attempt(errors, "sampler"):
        table += sampler_rows(**(item.sampler or {}))
    entry = {"kind": "sampler", "family": "sampler", "table": table, "goals": [], "errors": errors}
    return entry, [tables.plain_table(table)] if table else []


@contextmanager
def _attempt(errors: dict[str, str], where: str) -> Iterator[None]:
    """Keep the traceback of what fails under `where`, and free the memory."""
    try:
        yield
    except Exception:  # out of memory, a kernel that does not build: the rest of the suite still counts
        errors[where] = traceback.format_exc()
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def sampler_rows(
    sizes: Sequence[int], *, num_sequences: int, device: torch.device | str, min_seconds: float = 0.2
) -> list[dict[str, float]]:
    """Inverse transform sampling alone, from scores to packed tokens: median milliseconds with K = half of the tokens.

    A row per number of patches in `sizes`: patches, sequences, ms of sampling, of the plain version (GPU only), and of
    packing [T, 64]. Each number is timed for `min_seconds`.
    """

    from torch.utils.benchmark import Timer  # here, because it looks for a C++ compiler and warns if there is none

    def milliseconds(run: Callable[[], object]) -> float:
        with torch.inference_mode():
            timer = Timer("run()", globals={"run": run}, num_threads=torch.get_num_threads())
            return timer.blocked_autorange(min_run_time=min_seconds).median * 1e3

    rows = []
    for size in sizes:
        generator = torch.Generator().manual_seed(size)
        scores = (torch.rand(num_sequences, size, generator=generator) ** 4).to(device)
        candidates = Candidates(  # of sequences with nothing dropped
            scores,
            lengths=torch.full((num_sequences,), size, device=device),
            max_tokens=size,
            num_positions=size + 1,
            position=partial(torch.arange(1, size + 1, device=device).expand, num_sequences, -1),
        )
        sample = partial(InverseTransform().choose, candidates, size // 2)
        tokens = RaggedTokens.from_dense(torch.zeros(num_sequences, size + 1, 64, device=device), 1)
        keep = torch.cat([torch.ones_like(scores[:, :1], dtype=torch.bool), sample()], dim=1)
        row = {"patches": size, "sequences": num_sequences, "sampling ms": milliseconds(sample)}
        if scores.is_cuda:
            row["plain ms"] = milliseconds(partial(official_rule, candidates, size // 2))
        rows.append(row | {"packing ms": milliseconds(partial(tokens.keep, keep, max_tokens=size // 2))})
    return rows


def judge(goals: Sequence[Goal], row: Measured, rows: Sequence[Measured]) -> list[dict]:
    """The goals set for this row, each with the number measured. `rows`: all variants, for goals that compare them."""
    beside = {other.variant: other for other in rows if other.batch_size == row.batch_size}
    judged = []
    for variant, quantity, relation, bound, batch_size in goals:
        if variant != row.variant or batch_size not in (0, row.batch_size):
            continue
        if quantity == "share of sampling":
            value = row.parts["scoring and sampling"]
        elif quantity == "efficiency":
            value = statistics.median(row.efficiencies)
        elif quantity == "activations / dense":
            value, bound = row.activations_mb / beside["dense"].activations_mb, row.token_ratio + bound
        else:
            other = beside[quantity.removesuffix(" time / time")]
            value = statistics.median(a / b for a, b in zip(other.seconds, row.seconds, strict=True))
        met = value <= bound if relation == "<=" else value >= bound
        about = {"variant": variant, "batch": row.batch_size, "quantity": quantity}
        judged.append(about | {"goal": f"{relation} {bound:.3g}", "measured": value, "met": met})
    return judged
