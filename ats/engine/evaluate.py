"""Evaluate a model: accuracy, GFLOPs of every sample, tokens kept per block, speed.

    result = evaluate(model, loader, device=torch.device("cpu"))
    result = evaluate_weights(cfg)      # the model, weights and data of a config; OUTPUT_DIR/result.json and a table

Everything is collected per sample and ordered by the sample's index before it is averaged, so the result depends
neither on the batch size nor on the order in which samples arrive.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import simplejson
import timm
import torch
import torchvision
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

import ats
from ats.checkpoint import load_weights
from ats.config import CfgNode
from ats.config.schema import flatten
from ats.datasets import build_loader, input_shape
from ats.engine.device import autocast, device_name, select_device
from ats.engine.ensemble import Ensemble, build_ensemble
from ats.engine.logging import log_plan, open_output_dir
from ats.engine.meters import hits
from ats.errors import UserError
from ats.flops import Gflops, dense_gflops, gflops
from ats.models import build_model

logger = logging.getLogger(__name__)

# Keys that say where and how a run is carried out, not what it computes.
MACHINE_KEYS = {
    "OUTPUT_DIR",
    "DEVICE",
    "LOG_PERIOD",
    "TENSORBOARD.ENABLE",
    "DATA.PATH_TO_DATA_DIR",
    "DATA.PATH_PREFIX",
    "DATA_LOADER.NUM_WORKERS",
    "DATA_LOADER.PIN_MEMORY",
    "TRAIN.AUTO_RESUME",
    "TRAIN.CHECKPOINT_FILE_PATH",
    "TEST.CHECKPOINT_FILE_PATH",
}


@dataclass
class Result:
    """What an evaluation found; the fields of result.json.

    top1, top5: percent of the samples (top5 among fewer than five classes: among all of them).
    gflops: `mean`, `std`, `min`, `p5`, `p50`, `p95`, `max` over the samples as run; `paper_mean` in the paper's
        accounting; `dense` of the same network without ATS.
    tokens_per_block: ATS block -> mean number of tokens kept, prefix tokens counted.
    images_per_second: rate of the forward passes alone, the first batch (warm-up) left out where there are others;
        `wall_seconds` is the whole evaluation with reading the data.
    num_nonfinite: samples whose logits were not finite; they count as wrong.
    video: of videos in several views; then samples are clips, `gflops` is per view, `top1` and `top5` are of the
        videos, and this has `clip_top1`, `clip_top5` and `Ensemble.summary`.
    """

    top1: float
    top5: float
    num_samples: int
    num_nonfinite: int
    gflops: dict[str, float]
    tokens_per_block: dict[int, float]
    images_per_second: float
    wall_seconds: float
    params_m: float
    device: str
    video: dict[str, object] | None = None


@dataclass
class _Tally:
    """Per-sample records of an evaluation, in order of arrival; those of several processes can be concatenated."""

    # Per batch [B, 6] float64: index, hit at 1, hit at 5, non-finite, GFLOPs as run, GFLOPs of the paper.
    rows: list[Tensor] = field(default_factory=list)
    # ATS block -> [sum of kept tokens, number of sequences]
    tokens: dict[int, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))
    # Per batch: samples, seconds of the forward pass.
    timing: list[tuple[int, float]] = field(default_factory=list)
    dense: float = 0.0

    def add(self, logits: Tensor, label: Tensor, index: Tensor, trace: list, cost: Gflops, seconds: float) -> None:
        """Add one batch: logits [B, C], label and index [B]."""
        hit1, hit5, finite = hits(logits, label)
        columns = [index, hit1, hit5, ~finite, cost.as_run, cost.paper]
        self.rows.append(torch.stack([column.to("cpu", torch.float64) for column in columns], dim=1))
        for entry in trace:
            self.tokens[entry.block][0] += int(entry.num_tokens.sum())
            self.tokens[entry.block][1] += len(entry.num_tokens)
        self.dense = cost.dense
        self.timing.append((len(index), seconds))

    def result(self, *, ensemble: Ensemble | None, wall_seconds: float, params_m: float, device: str) -> Result:
        """The averages over all samples, clips of skipped videos left out."""
        rows = torch.cat(self.rows)
        rows = rows[rows[:, 0].argsort()]
        if ensemble is not None:
            rows = rows[~ensemble.skipped[rows[:, 0].long() // ensemble.num_views]]
            if not len(rows):
                raise UserError("There is nothing to evaluate: no video can be read.")
        _, hit1, hit5, nonfinite, as_run, paper = rows.T
        quantiles = torch.tensor([0.0, 0.05, 0.5, 0.95, 1.0], dtype=torch.float64)
        low, p5, p50, p95, high = torch.quantile(as_run, quantiles).tolist()
        spread = {"mean": as_run.mean().item(), "std": as_run.std(correction=0).item()}
        spread |= {"min": low, "p5": p5, "p50": p50, "p95": p95, "max": high}
        timed = self.timing[1:] or self.timing
        result = Result(
            top1=100 * hit1.mean().item(),
            top5=100 * hit5.mean().item(),
            num_samples=len(rows),
            num_nonfinite=int(nonfinite.sum()),
            gflops=spread | {"paper_mean": paper.mean().item(), "dense": self.dense},
            tokens_per_block={block: total / count for block, (total, count) in sorted(self.tokens.items())},
            images_per_second=sum(n for n, _ in timed) / sum(seconds for _, seconds in timed),
            wall_seconds=wall_seconds,
            params_m=params_m,
            device=device,
        )
        return result if ensemble is None else _of_videos(result, ensemble)


def _of_videos(clips: Result, ensemble: Ensemble) -> Result:
    """The result of the clips as that of their videos."""
    top1, top5 = ensemble.accuracy()
    video = ensemble.summary(clips.gflops) | {"clip_top1": clips.top1, "clip_top5": clips.top5}
    return replace(clips, top1=top1, top5=top5, video=video)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable,
    *,
    device: torch.device,
    ensemble: Ensemble | None = None,
    amp_dtype: torch.dtype | None = None,
    progress: bool = True,
) -> Result:
    """Run `model` (on `device`) once over every sample of `loader`, in eval mode; the mode it was in is restored.

    Args:
        loader: batches of `ats.datasets.Sample`.
        ensemble: a new one, for videos in several views; clips marked `bad` are left out with their videos.
        amp_dtype: autocast to this type.
        progress: show a bar if the console is a terminal.

    Raises:
        UserError: the loader is empty.
    """
    was_training = model.training
    model.eval()
    tally = _Tally()
    start = time.perf_counter()
    for batch in tqdm(loader, desc="evaluate", unit="batch", leave=False, disable=None if progress else True):
        if ensemble is not None and any(batch.bad):
            batch = ensemble.leave_out_bad(batch)
            if not len(batch.x):
                continue
        x = batch.x.to(device, non_blocking=True)
        _synchronize(device)
        forward_start = time.perf_counter()
        with autocast(device, amp_dtype):
            logits, trace = model.forward_tokens(x)
        _synchronize(device)
        seconds = time.perf_counter() - forward_start
        tally.add(logits, batch.label, batch.index, trace, gflops(model, trace, x.shape), seconds)
        if ensemble is not None:
            ensemble.add(logits, batch.label, batch.index)
    model.train(was_training)
    if not tally.rows:
        raise UserError("There is nothing to evaluate: the data set is empty.")
    params_m = sum(p.numel() for p in model.parameters()) / 1e6
    wall_seconds = time.perf_counter() - start
    result = tally.result(ensemble=ensemble, wall_seconds=wall_seconds, params_m=params_m, device=device_name(device))
    if result.video and result.video["num_skipped_videos"]:
        logger.warning(
            "%d of %d videos cannot be read and are left out.", result.video["num_skipped_videos"], ensemble.num_videos
        )
    if result.num_nonfinite:
        logger.warning(
            "%d of %d samples have NaN or infinite logits; counted as wrong.", result.num_nonfinite, result.num_samples
        )
    return result


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def evaluate_weights(cfg: CfgNode, *, weights: str | Path = "") -> Result:
    """Evaluate `TEST.CHECKPOINT_FILE_PATH`, or `weights` where that is empty (or with neither, those that timm has
    downloaded for TIMM.PRETRAINED), on `TEST.DATASET`.

    Writes OUTPUT_DIR/result.json and prints the table.

    Raises:
        UserError: no weights are given; weights or data do not fit the model or cannot be read.
    """
    weights = str(cfg.TEST.CHECKPOINT_FILE_PATH or weights)
    downloaded = cfg.MODEL.NAME.startswith("timm/") and cfg.TIMM.PRETRAINED
    if not weights and not downloaded:
        raise UserError(
            "TEST.CHECKPOINT_FILE_PATH is empty: there are no weights to evaluate. "
            "Type TEST.CHECKPOINT_FILE_PATH FILE, or TRAIN.ENABLE True to train first."
        )
    output_dir = open_output_dir(cfg)
    device = select_device(cfg.DEVICE)
    model = build_model(cfg)
    if weights:
        load_weights(model, weights)
    loader = build_loader(cfg, "test")
    log_plan(
        {
            "test": describe_model(cfg, model),
            "weights": weights or "timm's",
            "data": f"{cfg.TEST.DATASET} in {cfg.DATA.PATH_TO_DATA_DIR}: {len(loader.dataset)} samples",
            "device": f"{device_name(device)}, float32",
            "output": str(output_dir.resolve()),
        }
    )
    result = evaluate(model.to(device), loader, device=device, ensemble=build_ensemble(cfg, loader.dataset))
    write_result(cfg, result, output_dir / "result.json")
    table = format_table({model_name(cfg): result})
    logger.debug("Result:\n%s", table)  # for log.txt; the console gets it on stdout
    print(f"\n{table}\n")
    logger.info("Result: %s; log: %s", output_dir / "result.json", output_dir / "log.txt")
    return result


def write_result(cfg: CfgNode, result: Result, path: Path) -> None:
    """Write result.json, atomically: the fields of `Result`, versions with the device, the config's hash."""
    contents = asdict(result)
    contents |= contents.pop("video") or {}
    contents["versions"] = versions() | {"device": contents.pop("device")}
    contents["config_sha256"] = config_sha256(cfg)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(simplejson.dumps(contents, indent=2, ignore_nan=True) + "\n")
    os.replace(temporary, path)


def versions() -> dict[str, str]:
    """Versions of everything a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "ats": ats.__version__,
    }


def config_sha256(cfg: CfgNode) -> str:
    """Hash of every setting that can change a result: the same on every machine and for every OUTPUT_DIR."""
    settings = {key: value for key, value in flatten(cfg) if key not in MACHINE_KEYS}
    return hashlib.sha256(simplejson.dumps(settings, sort_keys=True).encode()).hexdigest()


def model_name(cfg: CfgNode) -> str:
    """A name for tables: the model, and ATS with its sampler if on."""
    sampler = "" if cfg.ATS.SAMPLER == "inverse_transform" else f" ({cfg.ATS.SAMPLER})"
    return f"{cfg.MODEL.NAME} + ATS{sampler}" if cfg.ATS.ENABLE else f"{cfg.MODEL.NAME} dense"


def describe_model(cfg: CfgNode, model: nn.Module) -> str:
    """Name, sampling blocks, size and dense cost of a model, for the head of the log."""
    name = model_name(cfg) + (f" in blocks {', '.join(map(str, cfg.ATS.BLOCKS))}" if cfg.ATS.ENABLE else "")
    size = sum(p.numel() for p in model.parameters()) / 1e6
    cost = dense_gflops(model, (1, *input_shape(cfg)))
    return f"{name}: {size:.2f} M parameters, {cost:.4g} GFLOPs dense"


def format_table(results: dict[str, Result], *, style: str = "simple") -> str:
    """An aligned table with one line per named result, GFLOPs of videos per view x views.

    `style` is one of tabulate's, e.g. "pipe" for markdown.
    """
    is_video = any(r.video for r in results.values())
    speed = "clips/s" if is_video else "images/s"
    headers = ["model", "top-1 %", "top-5 %", "GFLOPs", "paper", "dense", speed, "tokens kept (block: mean)"]
    lines = []
    for name, r in results.items():
        tokens = ", ".join(f"{block}: {mean:.1f}" for block, mean in r.tokens_per_block.items()) or "all"
        views = f" x {r.video['num_views']}" if r.video else ""
        cost = [f"{r.gflops[kind]:.4g}{views}" for kind in ("mean", "paper_mean", "dense")]
        lines.append([name, f"{r.top1:.2f}", f"{r.top5:.2f}", *cost, f"{r.images_per_second:.1f}", tokens])
    return tabulate(
        lines, headers=headers, tablefmt=style, disable_numparse=True, colalign=("left", *["right"] * 6, "left")
    )
