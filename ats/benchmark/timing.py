"""Variants of one network, run in turn in one process, and the ratios of their times.

Machines are noisy and throttle, so a time alone says little. Every round runs each variant once, in an order that
rotates; what is reported is the median over rounds of the ratio to the dense network of the same round. A round is:
new token counts if they are imposed, synchronise the device, `time.perf_counter`, the pass, synchronise, the clock
again. The first rounds warm up (kernels chosen, caches filled, graphs compiled) and are not counted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from tqdm import tqdm

from ats.benchmark.counts import ImposedCounts, imposed_counts
from ats.benchmark.memory import saved_bytes
from ats.benchmark.parts import part_seconds
from ats.checkpoint import load_weights
from ats.engine.device import autocast, select_device
from ats.errors import UserError, suggest
from ats.flops import gflops
from ats.models import build_model

# name: (what it is, the keys that make it of a config with ATS)
VARIANTS: dict[str, tuple[str, list]] = {
    "dense": ("the network without ATS", ["ATS.ENABLE", False]),
    "ats": ("the config as it is", []),
    "topk": ("the K highest scores", ["ATS.SAMPLER", "topk"]),
    "random": ("K tokens at random", ["ATS.SAMPLER", "random"]),
    "padded": ("ATS, sequences padded to the longest", ["ATS.LAYOUT", "padded"]),
    "static": ("ATS, sequences padded to their slots", ["ATS.LAYOUT", "static"]),
}
NUM_WARMUP = 2


@dataclass
class Measured:
    """One variant at one batch size; times in seconds.

    Attributes:
        params_m: parameters, millions.
        gflops, gflops_paper: of each sample, as run and in the paper's accounting.
        gflops_dense: of a sample of the dense network.
        tokens: block -> tokens kept by each sequence.
        seconds: of each round. ratios: dense time / time of each round. flop_ratios: dense GFLOPs / mean GFLOPs of
            what each round computed.
        peak_mb: peak memory of the pass on a GPU, the weights included; None on a CPU.
        saved_mb: activations kept for the backward pass, when training.
        parts: share of the time by part.
    """

    variant: str
    batch_size: int
    params_m: float
    gflops: list[float] = field(default_factory=list)
    gflops_paper: list[float] = field(default_factory=list)
    gflops_dense: float = 0.0
    tokens: dict[int, list[int]] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    flop_ratios: list[float] = field(default_factory=list)
    peak_mb: float | None = None
    saved_mb: float | None = None
    parts: dict[str, float] = field(default_factory=dict)

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
        variants: names in VARIANTS; dense is always measured too.
        rounds: that count. dtype: None for float32, or what autocast computes in. compile: torch.compile all variants.
        train: time forward and backward instead of inference. threads: of the CPU; None leaves them.
    """

    variants: tuple[str, ...] = ("dense", "ats")
    rounds: int = 15
    dtype: torch.dtype | None = None
    compile: bool = False
    train: bool = False
    threads: int | None = None


def build_variant(cfg: CfgNode, name: str, device: torch.device) -> nn.Module:
    """The variant's network in evaluation mode, with the weights of TEST.CHECKPOINT_FILE_PATH, or random ones.

    Raises:
        UserError: no such variant.
    """
    if name not in VARIANTS:
        raise UserError(f"--compare {name}: choose from {', '.join(VARIANTS)}.{suggest(name, VARIANTS)}")
    cfg = cfg.clone()
    cfg.defrost()
    cfg.merge_from_list(VARIANTS[name][1])
    torch.manual_seed(cfg.RNG_SEED)
    model = build_model(cfg)
    if cfg.TEST.CHECKPOINT_FILE_PATH:
        load_weights(model, cfg.TEST.CHECKPOINT_FILE_PATH)
    return model.to(device).eval()


def measure(cfg: CfgNode, batches: dict[int, Tensor], settings: Settings) -> list[Measured]:
    """Measure the variants of `cfg` (ATS.ENABLE True) on each batch.

    Args:
        batches: batch size -> images [B, 3, H, W] or clips [B, 3, T, H, W].

    Returns:
        One entry per variant and batch size.
    """
    device = select_device(cfg.DEVICE)
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads or threads)
    try:
        names = ["dense", *(name for name in settings.variants if name != "dense")]
        models = {name: build_variant(cfg, name, device) for name in names}
        trained = bool(cfg.TEST.CHECKPOINT_FILE_PATH)
        with nullcontext() if trained else imposed_counts(list(models.values())) as counts:
            return [row for x in batches.values() for row in _measure_batch(models, x.to(device), settings, counts)]
    finally:
        torch.set_num_threads(threads)


def _measure_batch(
    models: dict[str, nn.Module], x: Tensor, settings: Settings, counts: ImposedCounts | None
) -> list[Measured]:
    rows = {name: _describe(name, model, x, counts, settings.rounds) for name, model in models.items()}
    runs = {name: _pass_of(model, x, settings) for name, model in models.items()}
    names = list(models)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in tqdm(range(settings.rounds + NUM_WARMUP), desc=f"batch {len(x)}", leave=False, disable=None):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            _draw(counts, x, seed=index)
            seconds[name].append(_seconds(runs[name], x.device))
    for name, row in rows.items():
        row.seconds = seconds[name][NUM_WARMUP:]
        pairs = zip(seconds["dense"][NUM_WARMUP:], row.seconds, strict=True)
        row.ratios = [dense / own for dense, own in pairs]
        _draw(counts, x, seed=0)
        row.peak_mb = _peak_memory(runs[name], x.device)
        if settings.train:
            row.saved_mb = saved_bytes(runs[name]) / 1e6
        elif not settings.compile:
            with autocast(x.device, settings.dtype):
                parts = part_seconds(models[name], x, rounds=2)
            total = sum(parts.values())
            row.parts = {part: own / total for part, own in parts.items()}
    return list(rows.values())


def _draw(counts: ImposedCounts | None, x: Tensor, *, seed: int) -> None:
    if counts is not None:
        counts.draw(len(x), seed=seed, device=x.device)


def _describe(name: str, model: nn.Module, x: Tensor, counts: ImposedCounts | None, rounds: int) -> Measured:
    """Parameters, GFLOPs and token counts: of every round's draw where the counts are imposed and few images make
    draws differ.
    """
    row = Measured(name, len(x), sum(parameter.numel() for parameter in model.parameters()) / 1e6)
    seeds = [NUM_WARMUP + index for index in range(rounds if counts is not None and len(x) < 8 else 1)]
    for seed in seeds:
        _draw(counts, x, seed=seed)
        with torch.inference_mode():
            trace = model.forward_tokens(x)[1]
        cost = gflops(model, trace, x.shape)
        row.gflops += cost.as_run.tolist()
        row.gflops_paper += cost.paper.tolist()
        row.gflops_dense = cost.dense
        row.flop_ratios.append(cost.dense / cost.as_run.mean().item())
        for entry in trace:
            row.tokens.setdefault(entry.block, []).extend(entry.num_tokens.tolist())
    row.flop_ratios *= rounds // len(seeds)
    return row


def _pass_of(model: nn.Module, x: Tensor, settings: Settings) -> Callable[[], None]:
    """What is timed: inference, or forward and backward of a cross-entropy."""
    forward = torch.compile(model) if settings.compile else model
    if not settings.train:

        def infer() -> None:
            with torch.inference_mode(), autocast(x.device, settings.dtype):
                forward(x)

        return infer

    target = torch.arange(len(x), device=x.device) % 2

    def train() -> None:
        model.zero_grad(set_to_none=True)
        with autocast(x.device, settings.dtype):
            loss = F.cross_entropy(forward(x).float(), target)
        loss.backward()

    return train


def _seconds(run: Callable[[], None], device: torch.device) -> float:
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronise()
    start = time.perf_counter()
    run()
    synchronise()
    return time.perf_counter() - start


def _peak_memory(run: Callable[[], None], device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    run()
    return torch.cuda.max_memory_allocated() / 1e6
