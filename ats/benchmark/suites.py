"""The measurements that docs/BENCHMARKS.md shows, each suite by one command: `tools/benchmark.py --suite NAME`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from ats.benchmark import report
from ats.benchmark.timing import Settings, measure
from ats.config import load_config
from ats.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "BENCHMARKS.md"
FOLDER = ROOT / "docs" / "benchmarks"


@dataclass(frozen=True)
class Measurement:
    """One table of a suite.

    Attributes:
        title: heading. cfg: below configs/. overrides: KEY, VALUE, ... image_size: None for the config's.
    """

    title: str
    cfg: str
    settings: Settings
    batch_sizes: tuple[int, ...]
    overrides: tuple = ()
    image_size: int | None = None


DEIT, XVIT, MVIT = "ImageNet/DeiT_S.yaml", "Kinetics/XViT_B16_16x16_K400_ATS.yaml", "ImageNet/MViTv2_T_ATS.yaml"
SMALL_XVIT = ("VIT.EMBED_DIM", 384, "VIT.NUM_HEADS", 6, "TEMPORAL_HEAD.NUM_ATTENTION_HEADS", 6)


def _cpu() -> list[Measurement]:
    one, two = Settings(threads=1, rounds=11), Settings(threads=2, rounds=11)
    return [
        Measurement("DeiT-S, 1 thread", DEIT, one, (1, 8, 32)),
        Measurement("DeiT-S, 2 threads", DEIT, two, (1, 8, 32)),
        Measurement("DeiT-S, padded layout", DEIT, Settings(("padded",), rounds=7, threads=1), (32,)),
        Measurement("DeiT-S, bfloat16", DEIT, Settings(dtype=torch.bfloat16, threads=1, rounds=7), (8,)),
        Measurement("DeiT-S, training step", DEIT, Settings(train=True, threads=1, rounds=7), (8,)),
        Measurement("XViT of DeiT-S's width, 16 frames", XVIT, Settings(threads=1, rounds=5), (1,), SMALL_XVIT),
        Measurement("MViTv2-T", MVIT, Settings(threads=1, rounds=7), (8,)),
        *(
            Measurement(f"DeiT-S, {side} pixels", DEIT, Settings(threads=1, rounds=5), (1,), image_size=side)
            for side in (384, 512, 1024)
        ),
    ]


def _gpu() -> list[Measurement]:
    half = Settings(dtype=torch.bfloat16, rounds=21)
    sizes = (1, 8, 32, 64, 256, 1024)
    return [
        Measurement("DeiT-S, bfloat16", DEIT, half, sizes),
        Measurement("DeiT-S, float16", DEIT, Settings(dtype=torch.float16, rounds=21), (256,)),
        Measurement(
            "DeiT-S, bfloat16, torch.compile", DEIT, Settings(dtype=torch.bfloat16, compile=True, rounds=21), (8, 256)
        ),
        Measurement("DeiT-S, bfloat16, padding", DEIT, Settings(("padded", "static"), 9, torch.bfloat16), (256,)),
        Measurement("DeiT-S, training step", DEIT, Settings(dtype=torch.bfloat16, train=True, rounds=15), (256,)),
        Measurement("DeiT-S, 384 pixels, bfloat16", DEIT, half, (64, 256), image_size=384),
        Measurement("XViT, 16 frames, bfloat16", XVIT, Settings(dtype=torch.bfloat16, rounds=9), (1, 8)),
        Measurement("MViTv2-T, bfloat16", MVIT, half, (64, 256)),
    ]


def _quick() -> list[Measurement]:
    """Every kind of measurement on tiny networks: whether the others would run."""
    tiny = ("VIT.EMBED_DIM", 32, "VIT.NUM_HEADS", 2, "VIT.DEPTH", 12)
    return [
        Measurement("Tiny ViT", DEIT, Settings(("ats", "padded", "static"), rounds=3), (1, 2), tiny),
        Measurement("Tiny ViT, bfloat16", DEIT, Settings(dtype=torch.bfloat16, rounds=2), (2,), tiny),
        Measurement("Tiny ViT, training step", DEIT, Settings(train=True, rounds=2), (2,), tiny),
    ]


SUITES: dict[str, Callable[[], list[Measurement]]] = {"cpu": _cpu, "gpu": _gpu, "quick": _quick}
ReadBatch = Callable[[CfgNode, int, int | None], Tensor]


def run_suite(name: str, read_batch: ReadBatch, *, folder: Path = FOLDER, document: Path = DOCUMENT) -> None:
    """Run a suite; write <folder>/<name>.json and the section `name` of `document`, after every measurement, so that
    nothing measured is lost.

    Raises:
        UserError: the suite gpu without a GPU.
    """
    if name == "gpu" and not torch.cuda.is_available():
        raise UserError("--suite gpu: PyTorch sees no GPU. Try --suite cpu, or --suite quick to see that it would run.")
    command = f"python tools/benchmark.py --suite {name}"
    machine = report.machine()
    text = [f"`{command}` on " + ", ".join(f"{key} {value}" for key, value in machine.items())]
    results = []
    folder.mkdir(parents=True, exist_ok=True)
    for item in SUITES[name]():
        start = time.perf_counter()
        print(f"\n### {item.title}\n", flush=True)
        cfg = load_config(str(ROOT / "configs" / item.cfg), ["ATS.ENABLE", True, *item.overrides])
        batches = {size: read_batch(cfg, size, item.image_size) for size in item.batch_sizes}
        rows = measure(cfg, batches, item.settings)
        tables = [report.table(rows), report.parts_table(rows)]
        print("\n\n".join(table for table in tables if table), flush=True)
        text += [f"### {item.title}", *(table for table in tables if table)]
        results.append(
            {
                "title": item.title,
                "cfg": item.cfg,
                "overrides": list(item.overrides),
                "threads": item.settings.threads,
                "seconds": time.perf_counter() - start,
                "rows": [report.as_dict(row) for row in rows],
            }
        )
        about = {"command": command, "machine": machine, "measurements": results}
        (folder / f"{name}.json").write_text(json.dumps(about, indent=1) + "\n")
        report.replace_section(document, name, "\n\n".join(text))
    print(f"\nWritten: {folder / name}.json, {document}")
