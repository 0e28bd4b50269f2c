"""Variants of one network, run in turn in one process, and the ratios of their times.

What is reported is the median over rounds (`turns`) of the ratio to the dense network of the same round. A variant's
turn is: new token counts if they are imposed, synchronise the device, `time.perf_counter`, the pass, synchronise, the
clock again.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from ats.benchmark.blocks import block_gflops, token_ratio
from ats.benchmark.counts import ImposedCounts, imposed_counts
from ats.benchmark.equal import MATCHED, describe_samplers, match_gflops
from ats.benchmark.memory import peak_megabytes, saved_bytes
from ats.benchmark.meters import host_waits
from ats.benchmark.parts import part_seconds
from ats.benchmark.products import linear_efficiencies
from ats.benchmark.turns import time_in_turn
from ats.benchmark.variants import GRAPHS, build_variants, labelled_images
from ats.engine.device import autocast, select_device
from ats.engine.evaluate import evaluate
from ats.errors import UserError
from ats.export.cuda_graph import capture
from ats.flops import gflops


@dataclass
class Measured:
    """One variant at one batch size; times in seconds.

    Attributes:
        params_m: parameters, millions.
        setting: of the variant's samplers, e.g. the r that was found for ToMe.
        top1: per cent of the images of `Settings.accuracy`, and their mean GFLOPs; None: not evaluated.
        gflops, gflops_paper: of each sample, as run and in the paper's accounting.
        gflops_dense: of a sample of the dense network.
        block_gflops, block_gflops_paper: block -> what it has of `gflops` and `gflops_paper`.
        tokens: block -> tokens kept by each sequence.
        token_ratio: tokens over the dense network's, mean over blocks; None where blocks change the grid.
        seconds: of each round. ratios: dense time / time of each round. flop_ratios: dense GFLOPs / mean GFLOPs of
            what each round computed.
        peak_mb: peak memory of the pass, the weights included; None where it is compiled on a CPU, and of a CUDA graph,
            whose memory is its own.
        saved_mb: tensors kept for the backward pass, when training. activations_mb: of them, without the weights.
        parts: share of the time by part.
        linear_efficiency: of the linear layers alone, see `products.py`; None where it was not measured.
        host_waits: how often a pass makes the host wait for the GPU; None on a CPU.
        image_size, dtype: side of the inputs in pixels; of weights and inputs, or of autocast in training.
    """

    variant: str
    batch_size: int
    params_m: float
    setting: str = ""
    top1: float | None = None
    top1_gflops: float | None = None
    gflops: list[float] = field(default_factory=list)
    gflops_paper: list[float] = field(default_factory=list)
    gflops_dense: float = 0.0
    block_gflops: dict[int, list[float]] = field(default_factory=dict)
    block_gflops_paper: dict[int, list[float]] = field(default_factory=dict)
    tokens: dict[int, list[int]] = field(default_factory=dict)
    token_ratio: float | None = None
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    flop_ratios: list[float] = field(default_factory=list)
    peak_mb: float | None = None
    saved_mb: float | None = None
    activations_mb: float | None = None
    parts: dict[str, float] = field(default_factory=dict)
    linear_efficiency: float | None = None
    host_waits: int | None = None
    image_size: int = 0
    dtype: str = "float32"

    @property
    def speedup(self) -> float:
        """Median of dense time / time."""
        return statistics.median(self.ratios)

    @property
    def flop_ratio(self) -> float:
        """Median of dense GFLOPs / GFLOPs as run."""
        return statistics.median(self.flop_ratios)

    @property
    def efficiencies(self) -> list[float]:
        """Of each round, how far seconds follow FLOPs; 1 is all the way."""
        return [time / flop for time, flop in zip(self.ratios, self.flop_ratios, strict=True)]

    @property
    def efficiency(self) -> float:
        """Median of `efficiencies`."""
        return statistics.median(self.efficiencies)


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        variants: names in VARIANTS; dense is always measured too, and ats where others are to cost the same.
        rounds: that count. dtype: None for float32; of weights and inputs for inference, of autocast in training.
        compile: torch.compile all variants. train: time forward and backward instead of inference.
        threads: of the CPU; None leaves them.
        parts: also say where the time goes, and how efficient the linear layers are by themselves.
        max_seconds: begin no round after these, once `turns.MIN_ROUNDS` are done.
        token_scale, mean_std: of the imposed counts, see `ImposedCounts`.
        dense_keys: more keys of the dense network, e.g. those that make it timm's own.
        equal_gflops: the variants of `equal.MATCHED` cost what ats costs; False: as configured.
        accuracy: top-1 over so many images of the evaluation data, spread evenly; 0: over all; None: not.
    """

    variants: tuple[str, ...] = ("dense", "ats")
    rounds: int = 15
    dtype: torch.dtype | None = None
    compile: bool = False
    train: bool = False
    threads: int | None = None
    parts: bool = True
    max_seconds: float = float("inf")
    token_scale: float = 1.0
    mean_std: tuple[int, int] | None = None
    dense_keys: tuple = ()
    equal_gflops: bool = True
    accuracy: int | None = None


def measure(cfg: CfgNode, batches: dict[int, Tensor], settings: Settings) -> list[Measured]:
    """All that `measure_each` yields."""
    return list(measure_each(cfg, batches, settings))


def measure_each(cfg: CfgNode, batches: dict[int, Tensor], settings: Settings) -> Iterator[Measured]:
    """Measure the variants of `cfg` (ATS.ENABLE True) on each batch.

    Args:
        batches: batch size -> images [B, 3, H, W] or clips [B, 3, T, H, W].

    Yields:
        One entry per variant and batch size, those of a batch as soon as it is done.
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
        if settings.dtype is not None and not settings.train:
            models = {name: model.to(settings.dtype) for name, model in models.items()}
            batches = {size: x.to(settings.dtype) for size, x in batches.items()}
        trained = bool(cfg.TEST.CHECKPOINT_FILE_PATH)
        imposed = (
            nullcontext()
            if trained
            else imposed_counts(list(models.values()), scale=settings.token_scale, mean_std=settings.mean_std)
        )
        # Blocks share their code, and each is compiled for its own numbers.
        limit = torch._dynamo.config.patch(recompile_limit=64) if settings.compile else nullcontext()
        with imposed as counts, limit:
            accuracy = _set_and_evaluate(cfg, models, batches[max(batches)].to(device), settings, counts)
            for x in batches.values():
                for row in _measure_batch(models, x.to(device), settings, counts):
                    row.setting = describe_samplers(models[row.variant])
                    row.top1, row.top1_gflops = accuracy.get(row.variant, (None, None))
                    row.image_size, row.dtype = x.shape[-1], dtype_name(settings.dtype)
                    yield row
    finally:
        torch.set_num_threads(threads)


def dtype_name(dtype: torch.dtype | None) -> str:
    """Of `Settings.dtype`: "float32", "bfloat16" or "float16"."""
    return str(dtype or torch.float32).removeprefix("torch.")


def _set_and_evaluate(
    cfg: CfgNode, models: dict[str, nn.Module], x: Tensor, settings: Settings, counts: ImposedCounts | None
) -> dict[str, tuple[float, float]]:
    """Make the variants that can cost what ats costs, on average over the images it is evaluated on, or else over `x`.

    Returns:
        Name -> top-1 and mean GFLOPs, if `settings.accuracy` asks for them.
    """
    found: dict[str, tuple[float, float]] = {}
    loader = None if settings.accuracy is None else labelled_images(cfg, settings.accuracy)
    for name in sorted(models, key=lambda name: name != "ats"):  # the target first
        if settings.equal_gflops and name in MATCHED:
            costs = [found["ats"][1]] if found else _describe("ats", models["ats"], x, counts, range(8)).gflops
            match_gflops(models[name], x, statistics.fmean(costs))
        if loader is not None:
            result = evaluate(models[name], loader, device=x.device, amp_dtype=settings.dtype)
            found[name] = result.top1, result.gflops["mean"]
    return found


def _measure_batch(
    models: dict[str, nn.Module], x: Tensor, settings: Settings, counts: ImposedCounts | None
) -> list[Measured]:
    _draw(counts, x, seed=0)
    runs = {name: _pass_of(name, model, x, settings) for name, model in models.items()}
    seconds, seeds = time_in_turn(
        runs,
        x.device,
        rounds=settings.rounds,
        max_seconds=settings.max_seconds,
        prepare=lambda seed: _draw(counts, x, seed=seed),
        label=f"batch {len(x)}",
    )
    eager = {name: model for name, model in models.items() if name not in GRAPHS}
    apart = settings.parts and not settings.train and not settings.compile
    _draw(counts, x, seed=0)
    linear = linear_efficiencies(eager, x, rounds=len(seeds)) if apart else {}
    rows = []
    for name, model in models.items():
        row = _describe(name, model, x, counts, seeds)
        row.seconds = seconds[name]
        row.ratios = [dense / own for dense, own in zip(seconds["dense"], row.seconds, strict=True)]
        _draw(counts, x, seed=0)
        if name in eager and (x.is_cuda or not settings.compile):
            row.peak_mb = peak_megabytes(runs[name], model, x.device)
        row.host_waits = host_waits(runs[name], x.device)
        if settings.train:
            row.saved_mb = saved_bytes(runs[name]) / 1e6
            row.activations_mb = saved_bytes(runs[name], without=model.parameters()) / 1e6
        elif apart and name in eager:
            parts = part_seconds(model, x, rounds=min(len(seeds), 10))
            total = sum(parts.values())
            row.parts = {part: own / total for part, own in parts.items()}
            row.linear_efficiency = linear[name]
        rows.append(row)
    return rows


def _draw(counts: ImposedCounts | None, x: Tensor, *, seed: int) -> None:
    if counts is not None:
        counts.draw(len(x), seed=seed, device=x.device)


def _describe(name: str, model: nn.Module, x: Tensor, counts: ImposedCounts | None, seeds: range) -> Measured:
    """Parameters, GFLOPs and token counts: of every round's draw where the counts are imposed and few images make
    draws differ.
    """
    row = Measured(name, len(x), sum(parameter.numel() for parameter in model.parameters()) / 1e6)
    is_dense = name.startswith("dense")
    differ = counts is not None and len(x) < 8 and not is_dense
    for seed in seeds if differ else seeds[:1]:
        _draw(counts, x, seed=seed)
        with torch.inference_mode():
            trace = [] if is_dense else model.forward_tokens(x)[1]
        cost = gflops(model, trace, x.shape)
        row.gflops += cost.as_run.tolist()
        row.gflops_paper += cost.paper.tolist()
        row.gflops_dense = cost.dense
        row.flop_ratios.append(cost.dense / cost.as_run.mean().item())
        for of_blocks, paper in ((row.block_gflops, False), (row.block_gflops_paper, True)):
            for block, own in enumerate(block_gflops(model, trace, x.shape, paper=paper)):
                of_blocks.setdefault(block, []).extend(own.tolist())
        row.token_ratio = token_ratio(model, trace, x.shape)
        for entry in trace:
            row.tokens.setdefault(entry.block, []).extend(entry.num_tokens.tolist())
    row.flop_ratios *= len(seeds) // len(row.flop_ratios)
    return row


def _pass_of(name: str, model: nn.Module, x: Tensor, settings: Settings) -> Callable[[], None]:
    """What is timed: inference, or forward and backward of a cross-entropy."""
    if name in GRAPHS:
        forward = capture(model, x)
    else:
        forward = torch.compile(model) if settings.compile else model
    if not settings.train:

        def infer() -> None:
            with torch.inference_mode():
                forward(x)

        return infer

    target = torch.arange(len(x), device=x.device) % 2

    def train() -> None:
        model.zero_grad(set_to_none=True)
        with autocast(x.device, settings.dtype):
            loss = F.cross_entropy(forward(x).float(), target)
        loss.backward()

    return train
