"""Evaluate a model: accuracy, GFLOPs of every sample, tokens kept per block, speed.

    result = evaluate(model, loader, device=torch.device("cpu"))
    result = evaluate_weights(cfg)      # the model, weights and data of a config; OUTPUT_DIR/result.json and a table

Everything is collected per sample and ordered by the sample's index before it is averaged, so the result depends
neither on the batch size nor on the order in which samples arrive, nor on the number of processes among which they are
shared.
"""

from __future__ import annotations

import logging
import platform
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import simplejson
import timm
import torch
import torchvision
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

import ats
from ats.checkpoint import load_weights, to_fine_tune
from ats.config import CfgNode
from ats.datasets import build_loader, input_shape
from ats.engine.device import autocast, device_name, explain_lost_worker, select_device
from ats.engine.distributed import is_main, rank, world_size
from ats.engine.ensemble import Ensemble, build_ensemble
from ats.engine.logging import log_plan
from ats.engine.output_dir import config_sha256, open_output_dir, write_config
from ats.engine.tally import Result, Tally
from ats.errors import UserError
from ats.files import atomic_write
from ats.flops import dense_gflops, gflops
from ats.models import build_model
from ats.reduction.sampling import REDUCERS

logger = logging.getLogger(__name__)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable,
    *,
    device: torch.device,
    ensemble: Ensemble | None = None,
    amp_dtype: torch.dtype | None = None,
    progress: bool = True,
    tally: Tally | None = None,
) -> Result:
    """Run `model` (on `device`) once over every sample of `loader`, in eval mode; the mode it was in is restored.

    With several processes each runs over its own `loader`, and all get the result of all samples.

    Args:
        loader: batches of `ats.datasets.Sample`.
        ensemble: a new one, for videos in several views; clips marked `bad` are left out with their videos.
        amp_dtype: autocast to this type.
        progress: show a bar if the console is a terminal.
        tally: an empty one, to have the samples of this process one by one afterwards.

    Raises:
        UserError: the loader is empty.
    """
    was_training = model.training
    model.eval()
    tally = Tally() if tally is None else tally
    start = time.perf_counter()
    silent = None if progress and is_main() else True  # None: unless on a terminal
    for batch in tqdm(loader, desc="evaluate", unit="batch", leave=False, disable=silent):
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
    tally = Tally.of_all_processes(tally)
    if ensemble is not None:
        ensemble.exchange()
    if not tally.rows:
        reason = "the data set is empty" if ensemble is None else "no video can be read"
        raise UserError(f"There is nothing to evaluate: {reason}.")
    params_m = sum(p.numel() for p in model.parameters()) / 1e6
    wall_seconds = time.perf_counter() - start
    device = f"{world_size()} x {device_name(device)}" if world_size() > 1 else device_name(device)
    result = tally.result(ensemble=ensemble, wall_seconds=wall_seconds, params_m=params_m, device=device)
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
    """Evaluate `weights`, those just trained; without them `TEST.CHECKPOINT_FILE_PATH`, and with neither those that
    timm has downloaded for TIMM.PRETRAINED, on `TEST.DATASET`.

    Writes OUTPUT_DIR/result.json and prints the table.

    Raises:
        UserError: no weights are given; weights or data do not fit the model or cannot be read.
    """
    if weights and cfg.TEST.CHECKPOINT_FILE_PATH:
        logger.info(
            "TEST.CHECKPOINT_FILE_PATH %s is for runs that do not train; evaluating %s.",
            *(cfg.TEST.CHECKPOINT_FILE_PATH, weights),
        )
    weights = str(weights or cfg.TEST.CHECKPOINT_FILE_PATH)
    check_weights(cfg, weights, hint=", or TRAIN.ENABLE True to train first")
    output_dir = open_output_dir(cfg)
    write_config(cfg, output_dir)
    device = select_device(cfg.DEVICE)
    model = build_trained(cfg, weights, advice=to_fine_tune(cfg))
    loader = build_loader(cfg, "test", rank=rank(), world_size=world_size())
    log_plan(
        {
            "test": describe_model(cfg, model),
            "weights": weights or "timm's",
            "data": f"{cfg.TEST.DATASET} in {cfg.DATA.PATH_TO_DATA_DIR}: {len(loader.dataset)} samples",
            "device": f"{device_name(device)}, float32",
            "process": f"{world_size()} with {loader.num_workers} data workers each",
            "output": str(output_dir.resolve()),
        }
    )
    with explain_lost_worker():
        result = evaluate(model.to(device), loader, device=device, ensemble=build_ensemble(cfg, loader.dataset))
    if is_main():
        write_result(cfg, result, output_dir / "result.json")
        table = format_table({model_name(cfg): result})
        logger.debug("Result:\n%s", table)  # for log.txt; the console gets it on stdout
        print(f"\n{table}\n")
    logger.info("Result: %s; log: %s", output_dir / "result.json", output_dir / "log.txt")
    return result


def check_weights(cfg: CfgNode, weights: str, *, hint: str = "") -> None:
    """Refuse to go on with the weights of initialisation.

    Raises:
        UserError: no file, and no weights that timm has downloaded for TIMM.PRETRAINED.
    """
    downloaded = cfg.MODEL.NAME.startswith("timm/") and cfg.TIMM.PRETRAINED
    if not weights and not downloaded:
        raise UserError(
            "TEST.CHECKPOINT_FILE_PATH is empty: there are no weights to evaluate. "
            f"Type TEST.CHECKPOINT_FILE_PATH FILE{hint}."
        )


def build_trained(cfg: CfgNode, weights: str, *, advice: str = "") -> nn.Module:
    """The network of `cfg`, on the CPU, with the weights of a file, or without one timm's; `advice`: `load_weights`."""
    model = build_model(cfg)
    if weights:
        load_weights(model, weights, advice=advice)
    return model


def write_result(cfg: CfgNode, result: Result, path: Path) -> None:
    """Write result.json, atomically: the fields of `Result`, versions with the device, the config's hash."""
    contents = asdict(result)
    contents |= contents.pop("video") or {}
    del contents["token_counts"]
    contents["versions"] = versions() | {"device": contents.pop("device")}
    contents["config_sha256"] = config_sha256(cfg)
    with atomic_write(path) as temporary:
        temporary.write_text(simplejson.dumps(contents, indent=2, ignore_nan=True) + "\n")


def versions() -> dict[str, str]:
    """Versions of everything a result depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "timm": timm.__version__,
        "ats": ats.__version__,
    }


def model_name(cfg: CfgNode) -> str:
    """A name for tables: the model, and ATS with its sampler if on, or the method that stands in for it."""
    if cfg.ATS.ENABLE and cfg.ATS.SAMPLER in REDUCERS:
        return f"{cfg.MODEL.NAME} + {REDUCERS[cfg.ATS.SAMPLER].__name__}"
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
