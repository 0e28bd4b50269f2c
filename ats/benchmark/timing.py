"""Time the variants of one network, interleaved in one process, and compare seconds with FLOPs.

It reports medians over rounds (`interleave`) of the ratio to the dense network in the same round. Imposed token counts
are drawn anew for every pass, before its clock starts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from ats.benchmark.breakdown import linear_efficiencies, part_seconds
from ats.benchmark.memory import peak_megabytes, saved_bytes
from ats.benchmark.synthetic_counts import SyntheticCounts, synthetic_counts
from ats.benchmark.variants import GRAPHS, build_variants, describe_reductions, labelled_images
from ats.budget import nearest
from ats.engine.device import autocast, select_device
from ats.engine.evaluate import evaluate
from ats.errors import UserError
from ats.export.cuda_graph import capture
from ats.flops import gflops
from ats.interleave import host_waits, interleave
from ats.models.block import ats_blocks
from ats.models.cost import size
from ats.reduction import REDUCTIONS
from ats.tokens import KeptTokens


@dataclass
class Measured:
    """One variant at one batch size. "Per sample" and "per round" are lists with one number each."""

    variant: str
    batch_size: int
    params_m: float  # parameters, millions
    setting: str = ""  # what its samplers are set to, e.g. the r found for ToMe
    top1: float | None = None  # per cent over the images of `BenchmarkSettings.accuracy`; None: not asked for
    top1_gflops: float | None = None  # mean over the same images
    gflops: list[float] = field(default_factory=list)  # per sample, as run
    gflops_paper: list[float] = field(default_factory=list)  # per sample, in the paper's accounting
    gflops_dense: float = 0.0  # of one sample in the dense network
    gflops_per_block: dict[int, list[float]] = field(default_factory=dict)  # block -> its part of `gflops`
    gflops_paper_per_block: dict[int, list[float]] = field(default_factory=dict)
    tokens_per_block: dict[int, list[int]] = field(default_factory=dict)  # ATS block -> tokens kept per sequence
    token_ratio: float | None = None  # tokens / dense tokens, mean over blocks; None: the blocks change the grid
    seconds: list[float] = field(default_factory=list)  # per round
    ratios: list[float] = field(default_factory=list)  # per round: dense time / time
    flop_ratios: list[float] = field(default_factory=list)  # per round: dense GFLOPs / mean GFLOPs
    peak_mb: float | None = None  # weights included; None: a CUDA graph, or compiled on a CPU
    saved_for_backward_mb: float | None = None  # in training: tensors saved for the backward pass
    activations_mb: float | None = None  # of these, without the weights
    parts: dict[str, float] = field(default_factory=dict)  # share of the time by part
    linear_efficiency: float | None = None  # of the linear layers alone (`linear_efficiencies`); None: not measured
    host_waits: int | None = None  # how often a pass makes the host wait for the GPU; None on a CPU
    image_size: int = 0  # pixels
    dtype: str = "float32"  # of weights and inputs; in training, of autocast

    @property
    def efficiencies(self) -> list[float]:
        """Time ratio over FLOP ratio of each round; 1 means that seconds follow FLOPs."""
        return [time / flop for time, flop in zip(self.ratios, self.flop_ratios, strict=True)]

    def as_dict(self) -> dict:
        """The row of results.json; tables and plots read it too."""
        summaries = {
            "gflops": spread(self.gflops),
            "gflops_paper": spread(self.gflops_paper),
            "gflops_per_block": {i: statistics.fmean(own) for i, own in self.gflops_per_block.items()},
            "gflops_paper_per_block": {i: statistics.fmean(own) for i, own in self.gflops_paper_per_block.items()},
            "tokens_per_block": {i: spread(own) for i, own in self.tokens_per_block.items()},
            "latency_ms": spread([1e3 * seconds for seconds in self.seconds]),
            "samples_per_second": self.batch_size / statistics.median(self.seconds),
            "speedup": spread(self.ratios),
            "flop_ratio": statistics.median(self.flop_ratios),
            "efficiency": spread(self.efficiencies),
        }
        rounds = ("seconds", "ratios", "flop_ratios")
        return {name: value for name, value in vars(self).items() if name not in rounds} | summaries


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, standard deviation, and 5th, 50th and 95th percentile."""
    numbers = torch.tensor(values, dtype=torch.float64)
    percentiles = numbers.quantile(numbers.new_tensor([0.05, 0.5, 0.95])).tolist()
    moments = {"mean": numbers.mean().item(), "std": numbers.std(correction=0).item()}
    return moments | dict(zip(("p5", "p50", "p95"), percentiles, strict=True))


@dataclass(frozen=True)
class BenchmarkSettings:
    """How to measure."""

    variants: Sequence[str] = ("dense", "ats")  # dense is always measured, and ats if others must match its cost
    rounds: int = 15  # counted rounds
    max_seconds: float = float("inf")  # start no round after this, once `interleave.MIN_ROUNDS` are done
    dtype: str = "float32"  # of weights and inputs; in training, of autocast
    compile: bool = False  # torch.compile every variant
    train: bool = False  # time forward and backward instead of inference
    threads: int | None = None  # of the CPU; None: leave them
    parts: bool = True  # also measure where the time goes, and the linear layers alone
    token_scale: float = 1.0  # of the imposed counts, see `SyntheticCounts`
    mean_std: Sequence[float] | None = None  # of the imposed counts, see `SyntheticCounts`
    dense_keys: Sequence = ()  # [KEY, VALUE, ...] for the dense network only, e.g. to make it timm's own
    equal_gflops: bool = True  # give other methods the cost of ats; False: leave them as configured
    accuracy: int | None = None  # top-1 over this many images of the evaluation data; 0: all; None: no top-1

    @property
    def half(self) -> torch.dtype | None:
        """`dtype` as a torch.dtype; None for float32."""
        return None if self.dtype == "float32" else getattr(torch, self.dtype)


def measure(cfg: CfgNode, batches: dict[int, Tensor], settings: BenchmarkSettings) -> Iterator[Measured]:
    """Measure the variants of `cfg` (ATS.ENABLE True) on each batch of images [B, 3, H, W] or clips [B, 3, T, H, W].

    `batches`: size -> batch. Yields one row per variant and batch size, as soon as the batch is done.
    """
    if settings.train and set(settings.variants) & set(GRAPHS):
        raise UserError(f"--train: {' and '.join(GRAPHS)} are for inference.")
    device = select_device(cfg.DEVICE)
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads or threads)
    try:
        models = build_variants(
            cfg, settings.variants, device, equal_gflops=settings.equal_gflops, dense_keys=settings.dense_keys
        )
        if settings.half is not None and not settings.train:
            models = {name: model.to(settings.half) for name, model in models.items()}
            batches = {size: x.to(settings.half) for size, x in batches.items()}
        imposed = [] if cfg.TEST.CHECKPOINT_FILE_PATH else list(models.values())
        # Blocks share their code, but each is compiled for its own constants.
        config: Any = torch.compiler.config  # has its `patch` at run time
        limit = config.patch(recompile_limit=64) if settings.compile else nullcontext()
        with synthetic_counts(imposed, scale=settings.token_scale, mean_std=settings.mean_std) as counts, limit:
            accuracy = _match_and_evaluate(cfg, models, batches[max(batches)].to(device), settings, counts)
            for x in batches.values():
                for row in _measure_batch(models, x.to(device), settings, counts):
                    row.setting = describe_reductions(models[row.variant])
                    row.top1, row.top1_gflops = accuracy.get(row.variant, (None, None))
                    row.image_size, row.dtype = x.shape[-1], settings.dtype
                    yield row
    finally:
        torch.set_num_threads(threads)


def _match_and_evaluate(
    cfg: CfgNode, models: dict[str, nn.Module], x: Tensor, settings: BenchmarkSettings, counts: SyntheticCounts
) -> dict[str, tuple[float, float]]:
    """Give the other methods the mean cost of ats, over the evaluated images if there are any, else over `x`. Returns
    top-1 and mean GFLOPs by name, if `settings.accuracy` asks for them.
    """
    found: dict[str, tuple[float, float]] = {}
    loader = None if settings.accuracy is None else labelled_images(cfg, settings.accuracy)
    for name in sorted(models, key=lambda name: name != "ats"):  # ats first: the others need its cost
        if settings.equal_gflops and name in REDUCTIONS:
            costs = [found["ats"][1]] if found else _describe("ats", models["ats"], x, counts, range(8)).gflops
            # With imposed counts an amount changes nothing, so it stays.
            if all(block.reduction.amount and block.imposed is None for block in ats_blocks(models[name])):
                nearest(models[name], x, statistics.fmean(costs))
        if loader is not None:
            result = evaluate(models[name], loader, device=x.device, amp_dtype=settings.half)
            found[name] = result.top1, result.gflops["mean"]
    return found


def _measure_batch(
    models: dict[str, nn.Module], x: Tensor, settings: BenchmarkSettings, counts: SyntheticCounts
) -> list[Measured]:
    counts.draw(x)
    runs = {name: _make_pass(name, model, x, settings) for name, model in models.items()}
    seconds, seeds = interleave(
        runs,
        rounds=settings.rounds,
        max_seconds=settings.max_seconds,
        prepare=lambda _, seed: counts.draw(x, seed=seed),
        label=f"batch {len(x)}",
    )
    eager = {name: model for name, model in models.items() if name not in GRAPHS}
    parts = settings.parts and not settings.train and not settings.compile
    counts.draw(x)
    linear = linear_efficiencies(eager, x, rounds=len(seeds)) if parts else {}
    rows = []
    for name, model in models.items():
        row = _describe(name, model, x, counts, seeds)
        row.seconds = seconds[name]
        row.ratios = [dense / own for dense, own in zip(seconds["dense"], row.seconds, strict=True)]
        counts.draw(x)
        if name in eager and (x.is_cuda or not settings.compile):
            row.peak_mb = peak_megabytes(runs[name], model, x.device)
        row.host_waits = host_waits(runs[name], x.device)
        if settings.train:
            row.saved_for_backward_mb = saved_bytes(runs[name]) / 1e6
            row.activations_mb = saved_bytes(runs[name], without=model.parameters()) / 1e6
        elif parts and name in eager:
            part_times = part_seconds(model, x, rounds=min(len(seeds), 10))
            row.parts = {part: own / sum(part_times.values()) for part, own in part_times.items()}
            row.linear_efficiency = linear[name]
        rows.append(row)
    return rows


def _describe(name: str, model: nn.Module, x: Tensor, counts: SyntheticCounts, seeds: range) -> Measured:
    """Parameters, GFLOPs and token counts: over every round's draw if counts are imposed on few images, so that draws
    differ, otherwise of the first.
    """
    row = Measured(name, len(x), sum(parameter.numel() for parameter in model.parameters()) / 1e6)
    is_dense = name.startswith("dense")
    differ = counts.depth > 0 and len(x) < 8 and not is_dense
    for seed in seeds if differ else seeds[:1]:
        counts.draw(x, seed=seed)
        with torch.inference_mode():
            trace = [] if is_dense else model.forward_tokens(x)[1]
        cost = gflops(model, trace, x.shape)
        row.gflops += cost.as_run.tolist()
        row.gflops_paper += cost.paper.tolist()
        row.gflops_dense = cost.dense
        row.flop_ratios.append(cost.dense / cost.as_run.mean().item())
        for per_block, paper in ((row.gflops_per_block, False), (row.gflops_paper_per_block, True)):
            for block, own in enumerate(model.block_multiply_adds(trace, x.shape, paper=paper or is_dense)):
                per_block.setdefault(block, []).extend((own / 1e9).tolist())
        row.token_ratio = token_ratio(model, trace, x.shape)
        for entry in trace:
            row.tokens_per_block.setdefault(entry.block, []).extend(entry.num_tokens.tolist())
    row.flop_ratios *= len(seeds) // len(row.flop_ratios)
    return row


def token_ratio(model: nn.Module, trace: Sequence[KeptTokens], input_shape: Sequence[int]) -> float | None:
    """Tokens after each block / dense tokens, mean of blocks and samples; None if blocks change the grid."""
    grids = model.block_grids(input_shape)
    if any(grid != grids[0] or grid.tokens != grid.keys for grid in grids):
        return None
    left, ratios = 1.0, []
    kept = {entry.block: entry.num_tokens.double().mean().item() for entry in trace}
    for block, grid in enumerate(grids):
        if block in kept:
            left = kept[block] / (model.prefix_of(block) + size(grid.queries))
        ratios.append(left)
    return statistics.fmean(ratios)


def _make_pass(name: str, model: nn.Module, x: Tensor, settings: BenchmarkSettings) -> Callable[[], object]:
    """The pass that is timed: inference, or forward and backward of a cross-entropy."""
    if name in GRAPHS:
        forward = capture(model, x)
    else:
        forward = torch.compile(model) if settings.compile else model
    if not settings.train:
        return torch.inference_mode()(lambda: forward(x))
    target = torch.arange(len(x), device=x.device) % 2

    def train() -> None:
        model.zero_grad(set_to_none=True)
        with autocast(x.device, settings.half):
            loss = F.cross_entropy(forward(x).float(), target)
        loss.backward()

    return train
