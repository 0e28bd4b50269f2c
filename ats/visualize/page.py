"""A validation run as one self-contained HTML page: `write_page`.

`page.html` is the template and does all the drawing. Its content is embedded as JSON: histograms and deciles over all
samples, and, for the few samples shown, the picture and what every block kept and scored.
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
from ats.errors import UserError, printable
from ats.files import write
from ats.flops import gflops
from ats.visualize.compare import Guess, Networks, SampleView, guesses
from ats.visualize.grids import BlockView
from ats.visualize.pictures import RAMP, relative_scores

NUM_SHOWN = 12  # samples of each kind
MAX_SIDE_IMAGE, MAX_SIDE_FRAME = 256, 128  # pixels in the page
NO_SCORE = 255  # where there was nothing to score; scores are 0 to 254


class Row(NamedTuple):
    """The results of one sample."""

    index: int  # type: ignore[assignment]  # not the method of tuples
    label: int
    ats: Guess
    dense: Guess
    gflops: float
    num_kept: list[int]  # tokens kept by each ATS block, without CLS


@torch.inference_mode()
def evaluate_both(networks: Networks, loader: Iterable[Sample]) -> tuple[list[Row], float]:
    """A row for every sample of `loader`, sorted by index, and the GFLOPs of the dense network."""
    rows, dense_gflops = list[Row](), 0.0
    for batch in tqdm(loader, desc="report", unit="batch", leave=False, disable=None):
        x = batch.x.to(networks.device)
        logits, trace = networks.ats.forward_tokens(x)
        cost = gflops(networks.ats, trace, x.shape)
        kept = [(e.num_tokens - e.num_prefix_tokens).reshape(len(x), -1).sum(dim=1) for e in trace]
        dense_gflops = cost.dense
        rows += map(
            Row,
            batch.index.tolist(),
            batch.label.tolist(),
            guesses(networks.ats, logits),
            guesses(networks.dense, networks.dense.forward_tokens(x)[0]),
            cost.as_run.tolist(),
            torch.stack(kept, dim=1).tolist(),
        )
    return sorted(rows), dense_gflops


def write_page(
    path: Path, networks: Networks, loader: Loader, *, title: str, names: Sequence[str], details: Sequence[str]
) -> Path:
    """Run both networks over a validation set and write the HTML file. UserError if the set is empty.

    Args:
        loader: the validation set. The samples shown are read again from `loader.dataset`.
        title: heading. names: of the classes. details: lines for the footer.
    """
    if not len(loader.dataset):
        raise UserError("There is nothing to report: the data set is empty.")
    blocks = networks.compare(loader.dataset[0].x[None])[0].blocks
    rows, dense_gflops = evaluate_both(networks, loader)
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
        "groups": [
            {"heading": heading, "note": note, "cards": [_card(networks, loader.dataset, row, names) for row in chosen]}
            for heading, note, chosen in choose(rows)
        ],
        "ramp": RAMP,
    }
    write(path, fill_page(content))
    return path


def fill_page(content: dict) -> str:
    """The page with `content` embedded; `<` is escaped, so no text can close the element that holds it."""
    data = simplejson.dumps(content, ignore_nan=True, separators=(",", ":")).replace("<", "\\u003c")
    page = files("ats.visualize").joinpath("page.html").read_text(encoding="utf-8")
    before, _, after = page.partition("__DATA__")
    return before.replace("__TITLE__", html.escape(content["title"])) + data + after


def choose(rows: Sequence[Row]) -> list[tuple[str, str, list[Row]]]:
    """The samples to show, in groups: heading, explanation, rows."""
    by_cost = sorted(rows, key=lambda row: (row.gflops, row.index))
    num_shown = min(NUM_SHOWN, len(rows) // 2 or 1)
    changed = [row for row in rows if row.ats.label != row.dense.label]
    lost = sum(row.dense.label == row.label for row in changed)
    won = sum(row.ats.label == row.label for row in changed)
    changed.sort(key=lambda row: -max(row.dense.confidence, row.ats.confidence))
    groups = [
        ("Least costly", "The samples with the fewest GFLOPs, cheapest first.", by_cost[:num_shown]),
        ("Most costly", "The samples with the most GFLOPs, most expensive first.", by_cost[::-1][:num_shown]),
    ]
    if changed:
        note = f"{len(changed):,} of {len(rows):,}: {lost} right only without ATS, {won} right only with it. "
        groups.append(("Where ATS changes the class", f"{note}Most confident first.", changed[:NUM_SHOWN]))
    return groups


def deciles(rows: Sequence[Row]) -> list[dict]:
    """Accuracy of both networks in ten equal parts of the samples (or one per sample), by cost with ATS."""
    by_cost = sorted(rows, key=lambda row: (row.gflops, row.index))
    parts = filter(None, (by_cost[i * len(rows) // 10 : (i + 1) * len(rows) // 10] for i in range(10)))
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
    ]


def _accuracy(rows: Sequence[Row], network: str) -> float:
    return 100 * float(np.mean([getattr(row, network).label == row.label for row in rows]))


def histograms(blocks: Sequence[BlockView], rows: Sequence[Row]) -> list[dict]:
    """For each block, a histogram of tokens kept per sample, in at most 40 bins, the same for all blocks."""
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
    """What the page shows about one sample."""
    sample = dataset[row.index]
    [view] = networks.compare(sample.x[None])
    name = Path(dataset.path(row.index)) if hasattr(dataset, "path") else Path(f"sample {row.index}")
    return {
        "name": printable("/".join(name.parts[-2:])),
        "label": names[row.label],
        "right": row.ats.label == row.label,
        "ats": [names[row.ats.label], row.ats.confidence],
        "dense": [names[row.dense.label], row.dense.confidence],
        "gflops": row.gflops,
        "size": list(view.picture.shape[1:]),
        "picture": _data_url(view),
        "numKept": [int(block.num_kept) for block in view.blocks],
        "kept": [_pack_kept(block.kept) for block in view.blocks],
        "scores": [_pack_scores(block.scores) for block in view.blocks],
    }


def _data_url(view: SampleView) -> str:
    """The picture, or the frames of a clip side by side: PNG if small, else JPEG."""
    frames = view.picture.transpose(0, 1)  # [T, 3, H, W]
    max_side = MAX_SIDE_IMAGE if len(frames) == 1 else MAX_SIDE_FRAME
    scale = min(1.0, max_side / max(frames.shape[2:]))
    if scale < 1:
        frames = torch.nn.functional.interpolate(frames, scale_factor=scale, mode="bilinear", antialias=True)
    pixels = (frames.permute(2, 0, 3, 1).flatten(1, 2).clamp(0, 1) * 255).round().byte().numpy()  # [H, T * W, 3]
    buffer, kind = io.BytesIO(), "png" if pixels.size < 3 * 96 * 96 * len(frames) else "jpeg"
    Image.fromarray(pixels).save(buffer, format=kind, quality=85)  # PNG has no quality
    return f"data:image/{kind};base64,{_base64(buffer.getvalue())}"


def _pack_kept(kept: Tensor) -> dict:
    """[T, h, w] bool as its size and base64 of its bits, most significant bit first."""
    return {"size": list(kept.shape), "bits": _base64(np.packbits(kept.numpy()).tobytes())}


def _pack_scores(scores: Tensor) -> dict:
    """[T, h, w] as its size and base64 of `relative_scores`, a byte each."""
    values = (relative_scores(scores) * (NO_SCORE - 1)).round().nan_to_num(nan=NO_SCORE).byte()
    return {"size": list(scores.shape), "bytes": _base64(values.numpy().tobytes())}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
