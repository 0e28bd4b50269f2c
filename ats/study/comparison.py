"""Every way to drop or merge tokens, at equal mean GFLOPs: accuracies off the shelf and fine-tuned, and seconds.

The methods are those of `comparison.yaml`. For each budget (a share of the dense network's GFLOPs as run), each
method's amount (K, r, a keep rate) is set on other images than those it is measured on; `subjects.py` has both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from ats.budget import nearest, to_stages
from ats.checkpoint import save_safetensors
from ats.flops import dense_gflops
from ats.interleave import interleave
from ats.models.block import ats_blocks
from ats.reduction import REDUCTIONS
from ats.study.digits import fine_tune
from ats.study.results import ResultStore
from ats.study.subjects import ComparisonSize, Subject

TIMED_BATCH_SIZE = 32
PPT_THRESHOLD = 7e-5 * 196**2  # its authors', for 196 patches; variances of shares fall with the square of their number


@dataclass(frozen=True)
class Method:
    """A reduction and the blocks it works in."""

    id: str  # in `comparison.yaml`
    name: str
    sampler: str
    blocks: str  # all, quarter or usual
    ours: bool = False  # one of this project's, and not a plain baseline
    rival: bool = False
    options: dict = field(default_factory=dict)

    def stage(self, depth: int, num_patches: int) -> dict[str, Any]:
        """Its entry of ATS.STAGES in a network of `depth` blocks, without its amount."""
        kind = REDUCTIONS[self.sampler]
        blocks = {"all": range(depth), "quarter": range(depth // 4, depth), "usual": kind.usual_blocks(depth) or []}
        stage: dict[str, Any] = {"SAMPLER": self.sampler, "BLOCKS": list(blocks[self.blocks])}
        stage |= {name.upper(): value for name, value in self.options.items()}
        if self.sampler == "ppt":
            stage["THRESHOLD"] = PPT_THRESHOLD / num_patches**2
        if hasattr(kind, "min_tokens"):
            stage["MIN_TOKENS"] = 3
        return stage


_CONTENTS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
CLAIMS: list[dict] = _CONTENTS["claims"]


def _methods() -> dict[str, Method]:
    own = {f.name for f in fields(Method)}
    return {
        id: Method(
            id,
            **{name: value for name, value in entry.items() if name in own},
            options={name: value for name, value in entry.items() if name not in own},
        )
        for id, entry in _CONTENTS["methods"].items()
    }


METHODS = _methods()


@dataclass
class Cell:
    """A method at a budget."""

    method: Method | None  # None: the dense network
    budget: float
    measured: np.ndarray  # [units, seeds, images], one seed off the shelf
    cost: float  # GFLOPs / dense, mean over seeds
    stages: list[dict]  # entries of ATS.STAGES that meet the budget; empty if fine-tuned
    ms: float | None = None  # per image, one thread

    @property
    def values(self) -> np.ndarray:
        """[seeds, images] of the main unit."""
        return self.measured[0]

    @property
    def in_reach(self) -> bool:
        """Whether the budget was met: at most 4 % above it, or 10 % below, which is no advantage."""
        return -0.1 < self.cost / self.budget - 1 < 0.04


class Comparison:
    """All methods at all budgets with one subject; results are kept in `folder`."""

    def __init__(self, subject: Subject, *, folder: Path, size: ComparisonSize) -> None:
        self.subject, self.folder, self.size = subject, folder, size
        dense = subject.network([{"SAMPLER": "tome", "BLOCKS": [0], "R": 0}])  # only its sizes are read
        shape = tuple(subject.calibration[:1].shape)
        self.depth, self.dense_gflops = len(dense.block_list()), dense_gflops(dense, shape)
        grid = dense.block_grids(shape)[0].queries
        self.num_patches = grid[0] * grid[1] * grid[2]
        self.methods = [METHODS[id] for id in size.methods or METHODS]
        self.tuned_methods = [method for method in self.methods if method.id in size.tuned]
        num = len(self.methods) * len(size.budgets)
        tuned = (len(self.tuned_methods) + 1) * len(size.tuned_budgets) * size.num_seeds * subject.can_be_tuned
        self.results = ResultStore(folder, total_cost=num + 2 * tuned + len(size.budgets))

    def run(self) -> tuple[list[Cell], list[Cell]]:
        """Off the shelf, with seconds; and fine-tuned. The first cell of each is the dense network."""
        cells = [self._dense()]
        cells += [self._cell(method, budget) for budget in self.size.budgets for method in self.methods]
        for budget in self.size.budgets:
            seconds = self._seconds(budget, [cell for cell in cells[1:] if cell.budget == budget])
            for cell in cells[1:]:
                if cell.budget == budget:
                    cell.ms = seconds[cell.method.id] * cells[0].ms
        return cells, self._tuned() if self.subject.can_be_tuned and self.size.tuned_budgets else []

    def _inputs(self, method: Method | None, **more: object) -> dict[str, object]:
        stage = None if method is None else method.stage(self.depth, self.num_patches)
        own = {"units": list(self.subject.units), "stage": stage, "torch": torch.__version__}
        return self.subject.inputs | own | more

    def _at_budget(self, method: Method, budget: float, weights: Path | None = None) -> nn.Module:
        """The network with the amounts that meet a budget."""
        model = self.subject.network([method.stage(self.depth, self.num_patches)], weights)
        nearest(model, self.subject.calibration, budget * self.dense_gflops, together=False)
        return model

    def _dense(self) -> Cell:
        def evaluate() -> dict:
            model = self.subject.network(None)
            return {"values": self.subject.dense_values(model), "ms": self._time({"dense": model})["dense"]}

        found = self.results.get("dense", self._inputs(None), evaluate)
        return Cell(None, 1.0, np.array(found["values"])[:, None], 1.0, [], found["ms"])

    def _cell(self, method: Method, budget: float) -> Cell:
        def evaluate() -> dict:
            model = self._at_budget(method, budget)
            values, cost = self.subject.values(model)
            stages = to_stages([block.reduction for block in ats_blocks(model)], self.depth)
            return {"values": values, "cost": cost / self.dense_gflops, "stages": stages}

        found = self.results.get(f"{method.id}__{budget}", self._inputs(method, budget=budget), evaluate)
        return Cell(method, budget, np.array(found["values"])[:, None], found["cost"], found["stages"])

    def _seconds(self, budget: float, cells: Sequence[Cell]) -> dict[str, float]:
        """Time over the dense network's, in one run, interleaved."""

        def time() -> dict:
            models = {"dense": self.subject.network(None)}
            for cell in cells:
                models[cell.method.id] = self.subject.network(cell.stages)
            seconds = self._time(models)
            return {name: own / seconds["dense"] for name, own in seconds.items()}

        inputs = self._inputs(None, stages=[cell.stages for cell in cells], rounds=self.size.rounds)
        return self.results.get(f"seconds__{budget}", inputs, time)

    def _time(self, models: dict[str, nn.Module]) -> dict[str, float]:
        """Milliseconds per image of each network, median of the rounds, one thread."""
        x, threads = self.subject.calibration[:TIMED_BATCH_SIZE], torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.inference_mode():
                runs = {name: (lambda model=model: model(x)) for name, model in models.items()}
                seconds, _ = interleave(runs, rounds=self.size.rounds)
        finally:
            torch.set_num_threads(threads)
        return {name: 1000 * median(own) / len(x) for name, own in seconds.items()}

    def _tuned(self) -> list[Cell]:
        """Every method fine-tuned at its budgets, and the dense network trained for as many steps."""
        cells = []
        for budget in (1.0, *self.size.tuned_budgets):
            for method in self.tuned_methods if budget < 1 else (None,):
                found = [self._tune(method, budget, seed) for seed in range(self.size.num_seeds)]
                cost = float(np.mean([own["cost"] for own in found]))
                values = np.stack([own["values"] for own in found], axis=1)
                cells.append(Cell(method, budget, values, cost, []))
        return cells

    def _tune(self, method: Method | None, budget: float, seed: int) -> dict:
        def train() -> dict:
            subject: Any = self.subject  # which `can_be_tuned`
            stages = None
            if method is not None:
                start = self._at_budget(method, budget)
                stages = to_stages([block.reduction for block in ats_blocks(start)], self.depth)
            more = {"RNG_SEED": seed, "SOLVER.MAX_EPOCH": 1, "TRAIN.CHECKPOINT_FILE_PATH": str(subject.weights)}
            cfg = subject.cfg(stages, **more)
            path = self.folder / "tuned.safetensors"
            save_safetensors(path, fine_tune(cfg, num_steps=self.size.tune_steps).state_dict())
            if method is None:
                return {"values": subject.values(subject.network(None, path))[0], "cost": 1.0}
            values, cost = subject.values(self._at_budget(method, budget, path))  # scores changed: set the amount again
            return {"values": values, "cost": cost / self.dense_gflops}

        name = f"tuned/{'dense' if method is None else method.id}__{budget}_{seed}"
        inputs = self._inputs(method, budget=budget, seed=seed, steps=self.size.tune_steps)
        return self.results.get(name, inputs, train, cost=2.0)
