"""A validation run as one HTML page that needs nothing else: `write_report`.

The page (`report.html`) gets its content as JSON: numbers of all samples as histograms and deciles, and of the few
samples that are shown the picture and, packed, what every block kept and scored. All drawing is done there.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejson
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ats.datasets import Loader, Sample
from ats.errors import UserError
from ats.flops import gflops
from ats.visualize.compare import Guess, Networks, SampleView, class_label, guesses
from ats.visualize.grids import BlockView
from ats.visualize.pictures import RAMP

NUM_SHOWN = 12  # samples of each kind
MAX_SIDE = {"image": 256, "clip": 128}  # pixels of a picture, or of a frame, in the page
NO_SCORE = 255  # where there was nothing to score; scores are 0 to 254


class Row(NamedTuple):
    """What is known of every sample of the run. `num_kept`: tokens kept by each ATS block, CLS not counted."""

    index: int
    label: int
    ats: Guess
    dense: Guess
    gflops: float
    num_kept: list[int]


@torch.inference_mode()
def run(networks: Networks, loader: Iterable[Sample]) -> tuple[list[Row], float]:
    """A row for every sample of `loader`, by index, and the GFLOPs of the dense network."""
    rows, dense_gflops = [], 0.0
    for batch in tqdm(loader, desc="report", unit="batch", leave=False, disable=None):
        x = batch.x.to(networks.device)
        logits, trace = networks.ats.forward_tokens(x)
        cost = gflops(networks.ats, trace, x.shape)
        kept = [(e.num_tokens - e.num_prefix_tokens).reshape(len(x), -1).sum(dim=1).tolist() for e in trace]
        dense_gflops = cost.dense
        rows += [
            Row(*columns, list(counts))
            for *columns, counts in zip(
                batch.index.tolist(),
                batch.label.tolist(),
                guesses(networks.ats, logits),
                guesses(networks.dense, networks.dense.forward_tokens(x)[0]),
                cost.as_run.tolist(),
                zip(*kept, strict=True),
                strict=True,
            )
        ]
    return sorted(rows), dense_gflops


def write_report(
    path: str | Path,
    networks: Networks,
    loader: Loader,
    *,
    title: str,
    names: Sequence[str] = (),
    details: Sequence[str] = (),
) -> Path:
    """Run both networks over a validation set and write the page.

    Args:
        path: of the HTML file.
        loader: with its data set as `loader.dataset`, from which the samples that are shown are read again.
        title: heading. names: of the classes. details: lines for the foot of the page.

    Raises:
        UserError: the data set is empty, or it is not known where the tokens of such a network lie.
    """
    if not len(loader.dataset):
        raise UserError("There is nothing to report: the data set is empty.")
    blocks = networks.compare(loader.dataset[0].x[None])[0].blocks
    rows, dense_gflops = run(networks, loader)
    groups = []
    for heading, note, chosen in choose(rows):
        cards = [_card(networks, loader.dataset, row, names) for row in chosen]
        groups.append({"heading": heading, "note": note, "cards": cards})
    content = {
        "title": title,
        "details": list(details),
        "numSamples": len(rows),
        "denseGflops": dense_gflops,
        "gflops": float(np.mean([row.gflops for row in rows])),
        "top1": {kind: _accuracy(rows, kind) for kind in ("ats", "dense")},
        "agree": 100 * float(np.mean([row.ats.label == row.dense.label for row in rows])),
        "blocks": histograms(blocks, rows),
        "deciles": deciles(rows),
        "groups": groups,
        "ramp": RAMP,
    }
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(fill_page(content), encoding="utf-8")
    return path


def fill_page(content: dict) -> str:
    """The page with `content` in it. No text in it can end the element it stands in."""
    data = simplejson.dumps(content, ignore_nan=True, separators=(",", ":")).replace("<", "\\u003c")
    page = files("ats.visualize").joinpath("report.html").read_text(encoding="utf-8")
    before, _, after = page.partition("__DATA__")
    return before.replace("__TITLE__", html.escape(content["title"])) + data + after


def choose(rows: Sequence[Row]) -> list[tuple[str, str, list[Row]]]:
    """The samples to show: heading, a line below it, and rows."""
    by_cost = sorted(rows, key=lambda row: (row.gflops, row.index))
    num_shown = min(NUM_SHOWN, len(rows) // 2 or 1)
    changed = [row for row in rows if row.ats.label != row.dense.label]
    lost = sum(row.dense.label == row.label for row in changed)
    won = sum(row.ats.label == row.label for row in changed)
    changed.sort(key=lambda row: -max(row.dense.confidence, row.ats.confidence))
    groups = [
        ("Least costly", "The samples with the fewest GFLOPs, the least first.", by_cost[:num_shown]),
        ("Most costly", "The samples with the most GFLOPs, the most first.", by_cost[::-1][:num_shown]),
        (
            "Where ATS changes the class",
            f"{len(changed):,} of {len(rows):,}: {lost} were right and are not any more, {won} the other way round. "
            "The surest come first.",
            changed[:NUM_SHOWN],
        ),
    ]
    return [group for group in groups if group[2]]


def deciles(rows: Sequence[Row]) -> list[dict]:
    """Accuracy of both networks in ten parts of equal size (or as many as there are samples), by cost with ATS."""
    by_cost = sorted(rows, key=lambda row: (row.gflops, row.index))
    parts = [by_cost[i * len(rows) // 10 : (i + 1) * len(rows) // 10] for i in range(10)]
    return [
        {
            "low": part[0].gflops,
            "high": part[-1].gflops,
            "gflops": float(np.mean([row.gflops for row in part])),
            "num": len(part),
            "ats": _accuracy(part, "ats"),
            "dense": _accuracy(part, "dense"),
        }
        for part in parts
        if part
    ]


def _accuracy(rows: Sequence[Row], network: str) -> float:
    return 100 * float(np.mean([getattr(row, network).label == row.label for row in rows]))


def histograms(blocks: Sequence[BlockView], rows: Sequence[Row]) -> list[dict]:
    """For each block how many samples kept so many tokens, in at most 40 bins, the same for all blocks."""
    kept = np.array([row.num_kept for row in rows])  # [samples, blocks]
    width = -(-(int(kept.max()) + 1) // 40)
    num_bins = int(kept.max()) // width + 1
    return [
        {
            "block": view.block,
            "numTokens": view.num_tokens,
            "mean": float(kept[:, i].mean()),
            "binWidth": width,
            "counts": np.bincount(kept[:, i] // width, minlength=num_bins).tolist(),
        }
        for i, view in enumerate(blocks)
    ]


def _card(networks: Networks, dataset: Dataset[Sample], row: Row, names: Sequence[str]) -> dict:
    """What the page shows of one sample."""
    sample = dataset[row.index]
    [view] = networks.compare(sample.x[None])
    name = Path(dataset.path(row.index)) if hasattr(dataset, "path") else Path(f"sample {row.index}")
    return {
        "name": "/".join(name.parts[-2:]),
        "label": class_label(names, row.label),
        "right": row.ats.label == row.label,
        "ats": [class_label(names, row.ats.label), row.ats.confidence],
        "dense": [class_label(names, row.dense.label), row.dense.confidence],
        "gflops": row.gflops,
        "size": list(view.picture.shape[1:]),
        "picture": _data_url(view),
        "numKept": [int(block.num_kept) for block in view.blocks],
        "kept": [_pack_kept(block.kept) for block in view.blocks],
        "scores": [_pack_scores(block.scores) for block in view.blocks],
    }


def _data_url(view: SampleView) -> str:
    """The picture, or the frames of a clip side by side: lossless if small."""
    num_frames = view.picture.shape[1]
    frames = view.picture.transpose(0, 1)  # [T, 3, H, W]
    limit = MAX_SIDE["image" if num_frames == 1 else "clip"]
    scale = min(1.0, limit / max(frames.shape[2:]))
    if scale < 1:
        frames = torch.nn.functional.interpolate(frames, scale_factor=scale, mode="bilinear", antialias=True)
    pixels = (frames.permute(2, 0, 3, 1).flatten(1, 2).clamp(0, 1) * 255).round().byte().numpy()  # [H, T * W, 3]
    buffer = io.BytesIO()
    is_small = pixels.size < 3 * 96 * 96 * num_frames
    Image.fromarray(pixels).save(buffer, **({"format": "PNG"} if is_small else {"format": "JPEG", "quality": 85}))
    kind = "png" if is_small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _pack_kept(kept: Tensor) -> dict:
    """[T, h, w] bool as its size and base64 of its bits, the first in the highest place."""
    return {"size": list(kept.shape), "bits": base64.b64encode(np.packbits(kept.numpy()).tobytes()).decode()}


def _pack_scores(scores: Tensor) -> dict:
    """[T, h, w] as its size and base64 of a byte each: the square root of the share of the highest."""
    strength = (scores / scores.nan_to_num().amax().clamp_min(1e-12)).sqrt() * (NO_SCORE - 1)
    values = strength.round().nan_to_num(nan=NO_SCORE).byte()
    return {"size": list(scores.shape), "bytes": base64.b64encode(values.numpy().tobytes()).decode()}
