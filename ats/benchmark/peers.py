"""ATS against the fastest dense engine of the machine: the engines run the dense network and ATS, interleaved.

The engines are PyTorch, PyTorch compiled (dense only), ONNX Runtime and OpenVINO. In the last two ATS is an exported
file: static, with a fixed number of rows, and for one image adaptive, with as many rows as tokens. All are judged by
the FLOPs of the same tokens; the rows that a static file computes and ignores count against it.

    efficiency          = dense time in the same engine / time / (dense FLOPs / FLOPs)
    absolute efficiency = time of the fastest dense engine / time / (dense FLOPs / FLOPs)
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from fvcore.common.config import CfgNode
from tabulate import tabulate
from torch import Tensor, nn

from ats.benchmark.engines import BOTH, ENGINES, Pass, obstacle, write_adaptive, write_onnx
from ats.benchmark.synthetic_counts import describe_counts, synthetic_counts
from ats.benchmark.timing import BenchmarkSettings
from ats.benchmark.variants import build_variant
from ats.errors import UserError, rounded
from ats.flops import gflops
from ats.interleave import interleave

CPU = torch.device("cpu")


@dataclass
class Peer:
    """A network in an engine."""

    network: str  # "dense", "ats", "ats static" or "ats adaptive"
    engine: str  # name in ENGINES
    difference: float  # largest difference from PyTorch's float32 logits, over the largest logit
    seconds: list[float] = field(default_factory=list)  # of a pass, per round

    @property
    def median(self) -> float:
        """Seconds of a pass."""
        return statistics.median(self.seconds)

    def speedup(self, dense: Peer) -> float:
        """Time of `dense` / time, the median over rounds."""
        return statistics.median(a / b for a, b in zip(dense.seconds, self.seconds, strict=True))


@dataclass
class Peers:
    """All networks and engines at one batch size and precision."""

    batch_size: int
    dtype: str
    threads: int
    counts: str  # where token counts come from
    flop_ratio: float  # dense FLOPs / FLOPs of ATS
    rows: list[Peer]
    left_out: list[str]  # what could not be measured, and why

    @property
    def fastest_dense(self) -> Peer:
        """The dense network in its fastest engine."""
        return min((row for row in self.rows if row.network == "dense"), key=lambda row: row.median)

    def judged(self) -> list[dict]:
        """Per row: ms, time and FLOP ratio, both efficiencies; None where dense failed in the engine."""
        dense, lines = {row.engine: row for row in self.rows if row.network == "dense"}, []
        for row in self.rows:
            work = 1.0 if row.network == "dense" else self.flop_ratio
            speedup = row.speedup(dense[row.engine]) if row.engine in dense else None
            line = {"network": row.network, "engine": row.engine, "ms": 1e3 * row.median}
            line |= {"dense time / time": speedup, "dense FLOPs / FLOPs": work}
            line |= {"efficiency": None if speedup is None else speedup / work}
            line |= {"absolute efficiency": row.speedup(self.fastest_dense) / work}
            lines.append(line | {"logits off by": row.difference})
        return lines

    def summary(self) -> str:
        """The fastest dense engine, and the best that ATS gains over it."""
        dense, reduced = self.fastest_dense, [row for row in self.rows if row.network != "dense"]
        text = f"Fastest dense: {dense.engine}, {_cell('ms', 1e3 * dense.median)} ms."
        if not reduced:
            return f"{text} ATS could not be measured."
        best = min(reduced, key=lambda row: row.median)
        speedup = best.speedup(dense)
        text += f" Best ATS: {best.network} in {best.engine}, {_cell('ms', 1e3 * best.median)} ms:"
        text += f" {speedup:.2f} times as fast"
        absolute = speedup / self.flop_ratio
        return f"{text} for {self.flop_ratio:.2f} times fewer FLOPs, absolute efficiency {absolute:.2f}."

    def text(self) -> str:
        """As markdown."""
        lines = [{name: _cell(name, value) for name, value in line.items()} for line in self.judged()]
        table = tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        head = f"Batch {self.batch_size}, {self.dtype}, {threads}. {self.counts}"
        notes = "\n".join(f"* Left out: {reason}." for reason in self.left_out)
        return "\n\n".join(part for part in (head, table, self.summary(), notes) if part)

    def as_dict(self) -> dict:
        """For results.json."""
        return asdict(self) | {"judged": self.judged(), "summary": self.summary()}


def _cell(name: str, value: str | float | None) -> str:
    if not isinstance(value, float):
        return value or ""
    if name == "ms":
        return rounded(value)
    return f"{value:.0e}" if name == "logits off by" else f"{value:.2f}"


def measure_peers(
    cfg: CfgNode, batches: dict[int, Tensor], settings: BenchmarkSettings, engines: Sequence[str] = tuple(ENGINES)
) -> Iterator[Peers]:
    """Measure `cfg` (ATS.ENABLE True) and its dense network in the machine's engines, on the CPU.

    Args:
        batches: images [B, 3, H, W] or clips [B, 3, T, H, W], by size.
        settings: only dtype, rounds, max_seconds, threads, token_scale and mean_std are used.
        engines: names in ENGINES.

    Yields:
        One table per batch size, as soon as it is done.

    Raises:
        UserError: no engine computes in this precision.
    """
    if settings.dtype not in BOTH:
        raise UserError(f"--peers --dtype {settings.dtype}: choose from {', '.join(BOTH)}.")
    before = torch.get_num_threads()
    threads = settings.threads or before
    torch.set_num_threads(threads)
    try:
        for x in batches.values():
            yield _measure_batch(cfg, x, settings, threads, engines)
    finally:
        torch.set_num_threads(before)
        torch.compiler.reset()


def _measure_batch(cfg: CfgNode, x: Tensor, settings: BenchmarkSettings, threads: int, engines: Sequence[str]) -> Peers:
    models = {name: build_variant(cfg, name, CPU) for name in ("dense", "ats")}
    if "static" in models["ats"].layouts:
        models["ats static"] = build_variant(cfg, "static", CPU)
    checkpoint, one = cfg.TEST.CHECKPOINT_FILE_PATH, len(x) == 1
    how: dict[str, Any] = {"scale": settings.token_scale, "mean_std": settings.mean_std}
    text = describe_counts(checkpoint, **how) + (
        " A single sample keeps the mean counts." if one and not checkpoint else ""
    )
    # A static file takes the same time whatever is kept.
    with synthetic_counts([] if checkpoint else [models["ats"]], **how) as counts, TemporaryDirectory() as folder:
        counts.draw(x, mean=one)  # an adaptive file has its counts inside
        with torch.inference_mode():
            logits = {name: model(x) for name, model in models.items()}
            cost = gflops(models["ats"], models["ats"].forward_tokens(x)[1], x.shape)
        passes, left_out = _make_passes(models, x, settings.dtype, threads, engines, Path(folder))
        rows = {}
        for (network, engine), run in passes.items():
            want = logits.get(network, logits["ats"])
            difference = (run().float() - want).abs().max() / want.abs().max()
            rows[network, engine] = Peer(network, engine, difference.item())
        how = {"rounds": settings.rounds, "max_seconds": settings.max_seconds}
        seconds, _ = interleave(passes, **how, label=f"batch {len(x)}")
    for name, row in rows.items():
        row.seconds = seconds[name]
    flop_ratio = cost.dense / cost.as_run.mean().item()
    return Peers(len(x), settings.dtype, threads, text, flop_ratio, list(rows.values()), left_out)


def _make_passes(
    models: dict[str, nn.Module], x: Tensor, dtype: str, threads: int, engines: Sequence[str], folder: Path
) -> tuple[dict[tuple[str, str], Pass], list[str]]:
    """(network, engine) -> pass; and what cannot be measured, with the reason. Changes the models to `dtype`."""
    engines = [name for name in engines if dtype in ENGINES[name].dtypes]
    reasons = {name: obstacle(name) for name in engines}
    left_out = [f"{name}: {reason}" for name, reason in reasons.items() if reason]
    usable = {name: ENGINES[name] for name in engines if not reasons[name]}
    files = {}
    for network, write in _writers(models, x).items() if any(engine.reads_file for engine in usable.values()) else ():
        with _attempt(left_out, f"{network} as a file"):
            files[network] = write(path=folder / f"{network}.onnx")
    half = getattr(torch, dtype)
    models = {name: model.to(half) for name, model in models.items()}
    passes = {}
    for name, engine in usable.items():
        networks, images = (files, x) if engine.reads_file else (models, x.to(half))
        for network in (network for network in engine.networks if network in networks):
            with _attempt(left_out, f"{network} in {name}"):
                run = engine.make(networks[network], images, threads)
                run()
                passes[network, name] = run
    return passes, left_out


def _writers(models: dict[str, nn.Module], x: Tensor) -> dict[str, Callable[..., Path]]:
    """Network -> function that writes its file to `path`."""
    writers: dict[str, Callable[..., Path]] = {"dense": partial(write_onnx, models["dense"], x)}
    if "ats static" in models:  # other networks have no graph with ATS
        writers["ats static"] = partial(write_onnx, models["ats static"], x)
        if len(x) == 1:
            writers["ats adaptive"] = partial(write_adaptive, models["ats"], x)
    return writers


@contextmanager
def _attempt(left_out: list[str], what: str) -> Iterator[None]:
    """Add what fails to `left_out`, so that the other engines still run."""
    try:
        yield
    except Exception as error:  # compilers and translators raise anything
        reason = (str(error).strip().splitlines() or [""])[0][:200]
        left_out.append(f"{what}: {reason if isinstance(error, UserError) else f'{type(error).__name__}: {reason}'}")
