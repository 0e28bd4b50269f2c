"""Time image reading: the loader against a bare loop, which opens each file with Pillow and applies the same timm
transform, without checks. One process, one thread: images/s are per core.

    python tools/perf/loading.py [FOLDER] [--cfg FILE] [--rounds N] [--needed IMAGES_PER_SECOND] [KEY VALUE ...]

FOLDER has ImageNet's layout. Without one, the tool makes images of ImageNet's usual size. --needed is what the network
evaluates per second (samples/s of tools/benchmark.py); the tool then says whether data or network is the limit.
"""

from __future__ import annotations

import os
import random
import statistics
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from fvcore.common.config import CfgNode
from PIL import Image
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a clone that is not installed

from command import make_parser, run_tool  # beside this file

from ats.cli.parser import in_range
from ats.datasets.base import Draw, generators_unchanged, seed_generators
from ats.datasets.build import build_loader, build_transform
from ats.datasets.folders import class_folders
from ats.datasets.transforms import Transform
from ats.errors import UserError
from ats.options import POSITIVE

BATCH_SIZE = 8


def write_images(root: Path, *, num_images: int = 32) -> None:
    """Write JPEGs of coloured waves with grain in ImageNet's layout and usual size: 500 x 375 pixels, about 110 kB."""
    y, x = np.mgrid[:375, :500]
    for split in ("train", "val"):
        for label in range(2):
            (root / split / f"class{label}").mkdir(parents=True)
        for seed in range(num_images):
            rng = np.random.default_rng(seed)
            frequency, phase = rng.uniform(0.01, 0.3, (3, 2)), rng.uniform(0, 6, 3)
            waves = [np.sin(y * f[0] + x * f[1] + p) for f, p in zip(frequency, phase, strict=True)]
            pixels = 127 + 70 * np.stack(waves, axis=-1) + rng.normal(0, 12, (375, 500, 1))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(root / split / f"class{seed % 2}" / f"{seed}.jpg", quality=92)


def bare_batch(paths: list[str], transform: Transform, seeds: list[int | None]) -> tuple[Tensor, float, float]:
    """Read a batch with Pillow and the transform.

    Args:
        seeds: of each image's random transform, the same as the loader's; seeding is not timed.

    Returns:
        The batch [B, 3, H, W], seconds for all of it, and seconds for decoding.
    """
    clock, images, total, decoding = time.process_time, [], 0.0, 0.0
    for path, seed in zip(paths, seeds, strict=True):
        with generators_unchanged():
            if seed is not None:
                seed_generators(seed)
            begin = clock()
            image = Image.open(path).convert("RGB")
            decoded = clock()
            images.append(transform(image))
            total += clock() - begin
            decoding += decoded - begin
    begin = clock()
    batch = torch.stack(images)
    return batch, total + clock() - begin, decoding


def compare_loading(cfg: CfgNode, *, rounds: int) -> list[dict[str, str | float]]:
    """Images per second and core of the loader and of the bare loop, with the training and the evaluation transform.

    Every round reads the same files both ways, in random order, and takes the ratio. The clock is the process's CPU
    time: files come from memory, and other programs do not count.

    Returns:
        A row per split that DATA.PATH_TO_DATA_DIR has: "train" and "val".

    Raises:
        UserError: it has neither.
    """
    cfg = cfg.clone()
    cfg.defrost()
    root = Path(cfg.DATA.PATH_TO_DATA_DIR)
    splits = [split for split in ("train", "val") if (root / split).is_dir()]
    if not splits:
        raise UserError(f"{root} has neither a folder train/ nor val/ with a folder per class in it.")
    cfg.DATA_LOADER.NUM_WORKERS, cfg.TRAIN.BATCH_SIZE, cfg.TEST.BATCH_SIZE = 0, BATCH_SIZE, BATCH_SIZE
    cfg.TRAIN.DATASET = cfg.TEST.DATASET = "imagenet"
    cfg.MIXUP.ENABLE = False  # it mixes batches, on the device
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = []
        for split in splits:
            cfg.MODEL.NUM_CLASSES = len(class_folders(root / split))
            rows.append(_compare_split(cfg, split, rounds))
        return rows
    finally:
        torch.set_num_threads(threads)


def _compare_split(cfg: CfgNode, split: str, rounds: int) -> dict[str, str | float]:
    loader = build_loader(cfg, "train" if split == "train" else "test")
    transform = build_transform(cfg, "train" if split == "train" else "test")
    rng, ratios, shares, of_loader, of_bare = random.Random(0), [], [], [], []  # seconds are per image
    while len(ratios) <= rounds:
        batches = iter(loader)
        for keys in loader.batch_sampler:
            draws = [key if isinstance(key, Draw) else Draw(key, None) for key in keys]
            paths = [loader.dataset.path(draw.index) for draw in draws]
            for path in paths:
                Path(path).read_bytes()  # from the disk into memory, before either is timed
            for name in rng.sample(["bare", "loader"], 2):
                if name == "bare":
                    _, bare, decoding = bare_batch(paths, transform, [draw.seed for draw in draws])
                else:
                    begin = time.process_time()
                    next(batches)
                    own = time.process_time() - begin
            of_loader.append(own / len(keys))
            of_bare.append(bare / len(keys))
            ratios.append(bare / own)
            shares.append(decoding / bare)
            if len(ratios) > rounds:
                break
    low, middle, high = torch.quantile(torch.tensor(ratios[1:]), torch.tensor([0.1, 0.5, 0.9])).tolist()
    return {  # without the first round, which warms up
        "split": split,
        "batches": rounds,
        "loader images/s": 1 / statistics.median(of_loader[1:]),
        "bare images/s": 1 / statistics.median(of_bare[1:]),
        "loader / bare": middle,
        "p10": low,
        "p90": high,
        "decoding / bare": statistics.median(shares[1:]),
    }


def benchmark_loading(source: str, cfg: CfgNode, *, rounds: int) -> list[dict[str, str | float]]:
    """`compare_loading` on the images in the folder `source`, or on generated ones if it is empty."""
    cfg = cfg.clone()
    cfg.defrost()
    if source:
        cfg.DATA.PATH_TO_DATA_DIR = source
        return compare_loading(cfg, rounds=rounds)
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder))
        cfg.DATA.PATH_TO_DATA_DIR = folder
        return compare_loading(cfg, rounds=rounds)


def data_limit(images_per_second_per_core: float, needed: float, *, cores: int | None = None) -> str:
    """A sentence that says whether data or network limits the evaluation.

    Args:
        images_per_second_per_core: of the loader. needed: images/s of the network.
        cores: how many read; default: those this process may use.
    """
    cores = len(os.sched_getaffinity(0)) if cores is None else cores
    readable = images_per_second_per_core * cores
    numbers = f"{cores} cores read {readable:.4g} images/s, the network computes {needed:.4g}"
    if readable >= needed:
        return f"The network is the limit: {numbers}."
    return f"Data is the limit: {numbers}; {needed / images_per_second_per_core:.1f} cores would keep up."


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = make_parser(__doc__, source="FOLDER")
    parser.add_argument(
        "--needed", type=in_range(float, POSITIVE), metavar="IMAGES_PER_SECOND", help="the network's images/s"
    )

    def measure(args: Namespace, cfg: CfgNode) -> list[dict[str, str | float]]:
        rows = benchmark_loading(args.source, cfg, rounds=args.rounds)
        if args.needed is not None:
            print(f"{data_limit(rows[-1]['loader images/s'], args.needed)}\n")
        return rows

    return run_tool(parser, measure, argv)


if __name__ == "__main__":
    sys.exit(main())
