"""Results kept in files, so that an interrupted study resumes: what is there is read, the rest is measured.

results = ResultStore(Path("output/study"), total_cost=40)
results.get("rows/dense", {"config": ..., "weights": ...}, lambda: {"top1": 96.5})
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ats.budget import nearest
from ats.checkpoint import load_weights
from ats.config import CfgNode
from ats.datasets import Sample
from ats.engine.device import select_device
from ats.engine.evaluate import evaluate
from ats.engine.tally import Ensemble, Tally
from ats.files import write
from ats.models import build_model
from ats.models.block import ats_blocks

logger = logging.getLogger(__name__)


class ResultStore:
    """Results in files below `folder`, one each; logs how far the study is."""

    def __init__(self, folder: Path, *, total_cost: float) -> None:
        self.folder = folder
        self.total_cost = total_cost  # of all results that will be asked for, in any unit; for the time left
        self.costs: dict[str, float] = {}  # of the results that were asked for, by name
        self.measured_cost = self.measured_seconds = 0.0

    def get(self, name: str, inputs: dict, compute: Callable[[], dict], *, cost: float = 1.0) -> dict:
        """The result `name`: from its file if the inputs are the same, else computed and written there.

        Args:
            inputs: all that the result depends on, as plain values. compute: returns plain values too.
            cost: roughly how long `compute` takes, in the unit of `total_cost`.
        """
        path, inputs = self.folder / f"{name}.json", _as_read(inputs)
        self.costs[name] = cost
        try:
            contents = json.loads(path.read_text())
            if contents["inputs"] == inputs:
                return contents["result"]
        except (OSError, ValueError, KeyError, TypeError):  # missing or truncated
            pass
        start = time.perf_counter()
        result = _as_read(compute())
        self.measured_seconds += time.perf_counter() - start
        self.measured_cost += cost
        write(path, json.dumps({"inputs": inputs, "result": result}) + "\n")
        logger.info("%s: %s", self._progress(), name)
        return result

    def _progress(self) -> str:
        done = sum(self.costs.values())
        seconds_per_cost = self.measured_seconds / self.measured_cost if self.measured_cost else 0.0
        seconds_left = max(self.total_cost - done, 0) * seconds_per_cost
        share = min(done / self.total_cost, 1) if self.total_cost else 1
        return f"{share:4.0%}, about {seconds_left / 60:.0f} min left"


def _as_read(contents: dict) -> dict:
    """As it comes back from JSON: lists for tuples, strings for keys."""
    return json.loads(json.dumps(contents))


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_model(cfg: CfgNode, weights: Path) -> nn.Module:
    """The network of a configuration with these weights, on the device of `cfg.DEVICE`, for evaluation."""
    model = build_model(cfg)
    load_weights(model, weights)
    return model.to(select_device(cfg.DEVICE)).eval()


def measure(model: nn.Module, loader: Iterable[Sample], *, ensemble: Ensemble | None = None) -> dict:
    """Evaluate a model on its device. Returns the fields of `ats.engine.tally.Result`, and two per sample, in the order
    of the data set: `hits`, a string of 0 and 1, and `costs`, GFLOPs in the paper's accounting.
    """
    tally = Tally()
    result = evaluate(model, loader, device=next(model.parameters()).device, ensemble=ensemble, tally=tally)
    rows = torch.cat(tally.rows)
    rows = rows[rows[:, 0].argsort()]
    return asdict(result) | {
        "hits": "".join("1" if hit else "0" for hit in rows[:, 1].tolist()),
        "costs": [float(f"{cost:.6g}") for cost in rows[:, 5].tolist()],
    }


def search_num_tokens(model: nn.Module, x: Tensor, gflops: float) -> dict:
    """`num_tokens`: the K, the same in all blocks, with which images x [B, 3, H, W] cost `gflops` on average, in the
    paper's accounting. Changes the model's K.
    """
    nearest(model, x, gflops, accounting="paper")
    first: Any = ats_blocks(model)[0].reduction
    return {"num_tokens": first.num_tokens}


def token_counts(measured: Sequence[dict]) -> dict[int, list[int]]:
    """ATS block -> number of sequences that kept 0, 1, 2, ... tokens, over several results of `measure`."""
    total: dict[int, list[int]] = {}
    for result in measured:
        for block, counts in result["token_counts"].items():
            total[int(block)] = [a + b for a, b in zip_longest(total.get(int(block), []), counts, fillvalue=0)]
    return total
