"""A list of measurements, each kept in a file: what is there and still valid is read, the rest is measured.

runner = Runner(Path("output/study"), total_cost=40)
results = runner.run([Task("dense", inputs={"config": ..., "weights": ...}, measure=lambda: {"top1": 96.5})])
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from ats.datasets import Sample
from ats.engine.ensemble import Ensemble
from ats.engine.evaluate import evaluate
from ats.engine.tally import Result, Tally
from ats.files import atomic_write

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """A measurement.

    Attributes:
        name: of its file, below the runner's folder.
        inputs: plain values on which the result depends; a file of other inputs is measured anew.
        measure: returns the result, plain values.
        cost: about how long it takes, in any unit that the tasks of a runner share.
    """

    name: str
    inputs: dict
    measure: Callable[[], dict]
    cost: float = 1.0


class Runner:
    """Runs tasks one after the other and says how far it is.

    Args:
        folder: where the results are kept. total_cost: of all tasks that will be run, for the time left.
    """

    def __init__(self, folder: Path, *, total_cost: float) -> None:
        self.folder, self.total_cost = folder, total_cost
        self.done: set[str] = set()
        self.done_cost = self.measured_cost = self.measured_seconds = 0.0

    def run(self, tasks: Iterable[Task]) -> dict[str, dict]:
        """The result of each task, by name."""
        return {task.name: self.run_one(task) for task in tasks}

    def run_one(self, task: Task) -> dict:
        """The result of a task, from its file if that is of the same inputs."""
        path = self.folder / f"{task.name}.json"
        result = _read(path, task.inputs)
        self.done_cost += task.cost * (task.name not in self.done)
        self.done.add(task.name)
        if result is not None:
            return result
        start = time.perf_counter()
        result = json.loads(json.dumps(task.measure()))  # as it will be read
        self.measured_seconds += time.perf_counter() - start
        self.measured_cost += task.cost
        _write(path, {"inputs": task.inputs, "result": result})
        logger.info("%s: %s", self._progress(), task.name)
        return result

    def _progress(self) -> str:
        seconds_per_cost = self.measured_seconds / self.measured_cost if self.measured_cost else 0.0
        left = max(self.total_cost - self.done_cost, 0) * seconds_per_cost
        share = min(self.done_cost / self.total_cost, 1) if self.total_cost else 1
        return f"{share:4.0%}, about {left / 60:.0f} min left"


def _read(path: Path, inputs: dict) -> dict | None:
    try:
        contents = json.loads(path.read_text())
        return contents["result"] if contents["inputs"] == json.loads(json.dumps(inputs)) else None
    except (OSError, ValueError, KeyError, TypeError):  # not there, or not whole
        return None


def _write(path: Path, contents: dict) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(contents) + "\n")


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def measure(
    model: nn.Module, loader: Iterable[Sample], *, device: torch.device, ensemble: Ensemble | None = None
) -> dict:
    """Evaluate a model; plain values to keep: the fields of `Result`, and per sample (in order of its index) `hits`, a
    string of 0 and 1, and `costs`, GFLOPs in the paper's accounting.
    """
    tally = Tally()
    result = evaluate(model, loader, device=device, ensemble=ensemble, tally=tally)
    rows = torch.cat(tally.rows)
    rows = rows[rows[:, 0].argsort()]
    return asdict(result) | {
        "hits": "".join("1" if hit else "0" for hit in rows[:, 1].tolist()),
        "costs": [float(f"{cost:.6g}") for cost in rows[:, 5].tolist()],
    }


def as_result(kept: dict) -> Result:
    """The `Result` in what `measure` returned, or in its copy from a file, whose keys are strings."""
    fields = {key: value for key, value in kept.items() if key not in ("hits", "costs")}
    for key in ("tokens_per_block", "token_counts"):
        fields[key] = {int(block): value for block, value in fields[key].items()}
    return Result(**fields)
