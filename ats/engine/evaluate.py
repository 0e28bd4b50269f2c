"""Evaluate a model: accuracy, GFLOPs per sample, tokens kept per block, speed.

    result = evaluate(model, loader, device=torch.device("cpu"))
    result = evaluate_weights(cfg)      # the config's model, weights and data -> OUTPUT_DIR/result.json and a table

Records are kept per sample and sorted by index before averaging, so the result does not depend on the batch size, the
order of the samples or the number of processes.
"""

from __future__ import annotations

import json
import logging
import platform
import re
import time
from collections.abc import Iterable
from dataclasses import asdict, replace
from pathlib import Path

import simplejson
import timm
import torch
import torchvision
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

import ats
from ats.checkpoint import load_weights, read_metadata, to_fine_tune
from ats.config import SHIPPED, CfgNode, find_shipped
from ats.config.key import typed
from ats.config.schema import flatten, titles
from ats.datasets import Draw, Loader, Sample, build_loader, input_shape
from ats.datasets.base import Split
from ats.datasets.build import noun_of, preprocessing
from ats.engine.device import autocast, device_name, explain_lost_process, is_main, rank, select_device, world_size
from ats.engine.output import config_sha256, log_plan, open_output_dir
from ats.engine.tally import Ensemble, Result, Tally, build_ensemble
from ats.errors import UserError, counted, printable, rounded
from ats.files import write
from ats.flops import dense_gflops, gflops
from ats.models import build_model
from ats.models.block import ats_blocks

logger = logging.getLogger(__name__)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable[Sample],
    *,
    device: torch.device,
    ensemble: Ensemble | None = None,
    amp_dtype: torch.dtype | None = None,
    tally: Tally | None = None,
) -> Result:
    """Run `model` (on `device`) once over every sample of `loader`, in eval mode and in the dtype of its weights, then
    restore its mode.

    With several processes, each runs over its own `loader`; all return the result over all samples.

    Args:
        ensemble: an empty one, for videos in several views. Videos with a clip marked `bad` are left out.
        amp_dtype: autocast to this dtype.
        tally: an empty one, to get this process's per-sample records.

    Raises:
        UserError: there is nothing to evaluate.
    """
    was_training, dtype = model.training, _dtype(model)
    model.eval()
    tally = Tally() if tally is None else tally
    synchronize = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else lambda: None
    start = time.perf_counter()
    disable_bar = None if is_main() else True  # None: show it on a terminal only
    for batch in tqdm(loader, desc="evaluate", unit="batch", leave=False, disable=disable_bar):
        if ensemble is not None and any(batch.bad):
            batch = ensemble.drop_bad(batch)
            if not len(batch.x):
                continue
        x = batch.x.to(device, dtype, non_blocking=True)
        synchronize()
        forward_start = time.perf_counter()
        with autocast(device, amp_dtype):
            logits, trace = model.forward_tokens(x)
        synchronize()
        seconds = time.perf_counter() - forward_start
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        tally.add(logits, batch.label, batch.index, trace, gflops(model, trace, x.shape), seconds)
        if ensemble is not None:
            ensemble.add(logits, batch.label, batch.index)
    model.train(was_training)
    name = f"{world_size()} x {device_name(device)}" if world_size() > 1 else device_name(device)
    result = tally.result(ensemble=ensemble, start=start, params_m=_params_m(model), device=name)
    result = replace(result, dtype=str(amp_dtype or dtype).removeprefix("torch."))
    if num_skipped := (result.video or {}).get("num_skipped_videos"):
        logger.warning("%d of %d videos cannot be read and are left out.", num_skipped, ensemble.num_videos)
    if result.num_nonfinite:
        message = "%d of %d samples have NaN or infinite logits; counted as wrong."
        logger.warning(message, result.num_nonfinite, result.num_samples)
    return result


@torch.no_grad()
def check_samples(cfg: CfgNode, model: nn.Module, loaders: dict[Split, Loader], *, device: torch.device) -> None:
    """Run `model` (on `device`) on the first sample of every split, so that a mismatch shows before the first step.

    Raises:
        UserError: the model rejects a sample, or the sample cannot be read.
    """
    was_training = model.training
    model.eval()
    taken = set()
    for split, loader in loaders.items():
        x = loader.dataset[Draw(0, seed=0) if split == "train" else 0].x[None].to(device, _dtype(model))
        if x.shape in taken:
            continue
        taken.add(x.shape)
        try:
            logits, trace = model.forward_tokens(x)
            gflops(model, trace, x.shape)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # networks reject a shape with any exception
            size = f"DATA.{'TRAIN' if split == 'train' else 'TEST'}_CROP_SIZE {x.shape[-1]}"
            name = f"TEST.DATASET {cfg.TEST.DATASET}" if split == "test" else f"TRAIN.DATASET {cfg.TRAIN.DATASET}"
            shape = " x ".join(map(str, x.shape[1:]))
            raise UserError(
                f"{cfg.MODEL.NAME} cannot take the {split} samples of {name} and {size}, which are {shape}: "
                f"{str(error).rstrip('.')}. Change one of these keys."
            ) from error
        if logits.shape != (1, cfg.MODEL.NUM_CLASSES):
            shape = " x ".join(map(str, logits.shape[1:]))
            raise UserError(
                f"{cfg.MODEL.NAME} gives {shape} logits for a sample instead of MODEL.NUM_CLASSES "
                f"{cfg.MODEL.NUM_CLASSES}: take num_classes and global_pool out of TIMM.KWARGS, or correct the network."
            )
    model.train(was_training)


def build_test(cfg: CfgNode) -> tuple[Loader, Ensemble | None]:
    """This process's share of `TEST.DATASET`, and the ensemble of its views."""
    loader = build_loader(cfg, "test", rank=rank(), world_size=world_size())
    return loader, build_ensemble(cfg, loader.dataset)


def _dtype(model: nn.Module) -> torch.dtype:
    """The dtype of a network's weights."""
    return next(model.parameters()).dtype


def _params_m(model: nn.Module) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6


def evaluate_weights(cfg: CfgNode, *, weights: str | Path = "") -> Result:
    """Evaluate a network on `TEST.DATASET`; write OUTPUT_DIR/result.json and print the table.

    Args:
        weights: the weights just trained. Default: `TEST.CHECKPOINT_FILE_PATH`, or if that is empty the weights that
            timm downloads for TIMM.PRETRAINED.

    Raises:
        UserError: there are no weights; weights or data do not fit the model or cannot be read.
    """
    given = cfg.TEST.CHECKPOINT_FILE_PATH
    if weights and given and Path(weights).absolute() != Path(given).absolute():
        logger.info("TEST.CHECKPOINT_FILE_PATH %s is for runs that do not train; evaluating %s.", given, weights)
    weights = str(weights or given)
    check_weights(cfg, weights, hint=", or TRAIN.ENABLE True to train first")
    output_dir = open_output_dir(cfg)
    if is_main():
        write(output_dir / "config.yaml", cfg.dump())
    device = select_device(cfg.DEVICE)
    model = build_trained(cfg, weights, advice=to_fine_tune(cfg)).to(device, getattr(torch, cfg.TEST.DTYPE))
    loader, ensemble = build_test(cfg)
    check_samples(cfg, model, {"test": loader}, device=device)
    log_plan(
        {
            "test": describe_model(cfg, model),
            "weights": describe_weights(cfg, weights),
            "data": f"{cfg.TEST.DATASET} in {cfg.DATA.PATH_TO_DATA_DIR}: {len(loader.dataset)} samples",
            "device": f"{device_name(device)}, {cfg.TEST.DTYPE}",
            "process": f"{world_size()} with {counted(loader.num_workers, 'data worker')} each",
            "output": str(output_dir.resolve()),
        }
    )
    with explain_lost_process():
        result = evaluate(model, loader, device=device, ensemble=ensemble)
    if is_main():
        write_result(cfg, result, output_dir / "result.json")
        table = format_table({model_name(cfg): result})
        noun = noun_of(cfg)
        table += (
            f"\n\nGFLOPs: multiply-adds of one {noun}, as run. paper: as the paper counts them. dense: without ATS.\n"
            f"{noun}s/s is no benchmark: tools/benchmark.py times the network beside the dense one."
        )
        logger.debug("Result:\n%s", table)  # for log.txt; the console gets it on stdout
        print(f"\n{table}\n")
    logger.info("Result: %s; log: %s", output_dir / "result.json", output_dir / "log.txt")
    return result


def check_weights(cfg: CfgNode, weights: str, *, why: str = "there are no weights to evaluate", hint: str = "") -> None:
    """Raise a UserError if there is no weights file and timm downloads none for TIMM.PRETRAINED.

    `why`: why random weights are useless, for the message. `hint`: what else to type.
    """
    if not weights and not (cfg.MODEL.NAME.startswith("timm/") and cfg.TIMM.PRETRAINED):
        raise UserError(f"TEST.CHECKPOINT_FILE_PATH is empty: {why}. Type TEST.CHECKPOINT_FILE_PATH FILE{hint}.")


def describe_weights(cfg: CfgNode, weights: str | Path) -> str:
    """Where a network's weights come from: a file (full path and kind), timm, or random initialisation."""
    if not weights:
        from_timm = cfg.MODEL.NAME.startswith("timm/") and cfg.TIMM.PRETRAINED
        return f"timm's for {cfg.MODEL.NAME.removeprefix('timm/')}" if from_timm else f"random, RNG_SEED {cfg.RNG_SEED}"
    path = find_shipped(weights).resolve()
    kind = "safetensors" if path.suffix == ".safetensors" else "PyTorch checkpoint"
    shipped = ", shipped with this package" if path.is_relative_to(SHIPPED.resolve()) else ""
    return printable(f"{path} ({kind}{shipped})")


def build_trained(cfg: CfgNode, weights: str, *, advice: str = "") -> nn.Module:
    """The network of `cfg` on the CPU, with weights from a file if given; `advice`: see `load_weights`."""
    model = build_model(cfg)
    if weights:
        load_weights(model, weights, advice=advice)
        _warn_of_other_settings(cfg, weights)
    return model


# Keys that define a network and its input. Weights may load even if these differ from the training's.
OF_THE_NETWORK = re.compile(
    r"(MODEL|VIT|TIMM|XVIT|TIMESFORMER|MVIT|CVT|PSVIT|TEMPORAL_HEAD)\.|DATA\.(MEAN|STD|TEST_CROP_\w+|NUM_FRAMES|SAMPLING_RATE)$"
)


def network_settings(cfg: CfgNode) -> dict[str, object]:
    """The keys, other than ATS's, that decide what a network computes from an image or clip."""
    others = ("TIMM.PRETRAINED", "MODEL.ACT_CHECKPOINT", "MODEL.NUM_CLASSES")
    return {key: value for key, value in flatten(cfg) if OF_THE_NETWORK.match(key) and key not in others}


def _warn_of_other_settings(cfg: CfgNode, weights: str) -> None:
    """Compare `cfg` with the settings that training stored in the header of the weights."""
    said, now = read_metadata(weights), network_settings(cfg)
    then = json.loads(said.get("network", "{}"))
    if others := {key: value for key, value in then.items() if key in now and value != now[key]}:
        logger.warning("%s was trained with other settings. To use them, type: %s", weights, typed(others))
    if not cfg.ATS.ENABLE and (settings := json.loads(said.get("ats", "{}"))):
        text = "%s was trained with ATS, and this network keeps all tokens. To sample: %s"
        logger.warning(text, weights, typed(settings))


def write_result(cfg: CfgNode, result: Result, path: Path) -> None:
    """Write result.json atomically: the fields of `Result`, versions and device, preprocessing, and a config hash."""
    contents = asdict(result)
    contents |= contents.pop("video") or {}
    del contents["token_counts"]
    contents["versions"] = versions() | {"device": contents.pop("device")}
    contents["preprocessing"] = preprocessing(cfg)
    contents["config_sha256"] = config_sha256(cfg)
    write(path, simplejson.dumps(contents, indent=2, ignore_nan=True) + "\n")


def versions() -> dict[str, str]:
    """Versions of the packages a result depends on."""
    modules = {module.__name__: module.__version__ for module in (torch, torchvision, timm, ats)}
    return {"python": platform.python_version()} | modules


def model_name(cfg: CfgNode) -> str:
    """The model's name for tables, with the titles of its reductions or "dense"."""
    if not cfg.ATS.ENABLE:
        return f"{cfg.MODEL.NAME} dense"
    return f"{cfg.MODEL.NAME} + {' + '.join(titles(cfg))}"


def describe_model(cfg: CfgNode, model: nn.Module) -> str:
    """Name, ATS blocks, size and dense cost of a model, for the start of the log."""
    blocks = ", ".join(str(block.reduction.block) for block in ats_blocks(model))
    name = model_name(cfg) + (f" in blocks {blocks}" if blocks else "")
    cost = dense_gflops(model, (1, *input_shape(cfg)))
    return f"{name}: {_params_m(model):.2f} M parameters, {rounded(cost)} GFLOPs dense"


def format_table(results: dict[str, Result], *, style: str = "simple") -> str:
    """An aligned table with a row per result; videos show GFLOPs per view x number of views.

    `style` is one of tabulate's, e.g. "pipe" for markdown.
    """
    is_video = any(r.video for r in results.values())
    speed = "clips/s" if is_video else "images/s"
    headers = ["model", "top-1 %", "top-5 %", "GFLOPs", "paper", "dense", speed, "tokens kept (block: mean)"]
    rows = []
    for name, r in results.items():
        tokens = ", ".join(f"{block}: {mean:.1f}" for block, mean in r.tokens_per_block.items()) or "all"
        views = f" x {r.video['num_views']}" if r.video else ""
        cost = [f"{rounded(r.gflops[kind])}{views}" for kind in ("mean", "paper_mean", "dense")]
        rows.append([name, f"{r.top1:.2f}", f"{r.top5:.2f}", *cost, f"{r.images_per_second:.1f}", tokens])
    align = ("left", *["right"] * 6, "left")
    return tabulate(rows, headers=headers, tablefmt=style, disable_numparse=True, colalign=align)
