"""Every way to lose tokens, at the same mean GFLOPs: accuracies off the shelf and fine-tuned, and seconds.

The methods are those of `comparison.yaml`. For each budget, a share of the dense network's GFLOPs as run, the amount of
a method (K, r, a keep rate) is set on other images than those it is measured on. A subject is what they are measured
with: a classifier of ours and its validation images, or the features of a timm model on photographs without labels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from statistics import median

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from ats.budget import nearest, to_stages
from ats.checkpoint import load_weights, save_safetensors
from ats.config import SHIPPED, CfgNode, load_config
from ats.datasets import Sample, build_loader
from ats.datasets.base import FileDataset
from ats.datasets.loader import collate
from ats.errors import UserError
from ats.flops import dense_gflops, gflops
from ats.interleave import interleave
from ats.models.block import ats_blocks
from ats.reduction import REDUCTIONS
from ats.study.digits import fine_tune
from ats.study.results import ResultStore, file_sha256, load_model, measure

BATCH_SIZE = 100
TIMED_BATCH_SIZE = 32
DEFAULT_BLOCKS = range(3, 12)  # of ATS.BLOCKS
PPT_THRESHOLD = 7e-5 * 196**2  # its authors', for 196 patches; variances of shares fall with the square of their number


@dataclass(frozen=True)
class ComparisonSize:
    """How much is measured; the defaults are `make study`."""

    budgets: tuple[float, ...] = (0.75, 0.65, 0.5, 0.4, 0.3)  # GFLOPs / dense
    images: int = 2000  # that are evaluated, evenly spaced
    calibration_images: int = 256
    tuned_budgets: tuple[float, ...] = (0.4,)
    num_seeds: int = 3
    tune_steps: int = 50
    rounds: int = 9  # of the timing
    methods: tuple[str, ...] | None = None  # ids; None: all
    tuned: tuple[str, ...] = ("ats_drop", "ats_merge", "merge_sample", "evit", "tome", "pitome")


QUICK = ComparisonSize(
    budgets=(0.6,), images=200, calibration_images=64, tuned_budgets=(0.6,), num_seeds=2, tune_steps=1, rounds=3,
    methods=("ats_drop", "merge_sample", "tome_late", "ppt"),
)  # fmt: skip


@dataclass(frozen=True)
class Method:
    """A reduction and the blocks it works in."""

    id: str  # in `comparison.yaml`
    name: str
    sampler: str
    blocks: str  # all, quarter or usual
    ours: bool = False  # one of this project's, not only its plain baseline
    rival: bool = False
    options: dict = field(default_factory=dict)

    def stage(self, depth: int, num_patches: int) -> dict[str, object]:
        """Its entry of ATS.STAGES in a network of `depth` blocks, without its amount."""
        kind = REDUCTIONS[self.sampler]
        blocks = {"all": range(depth), "quarter": range(depth // 4, depth), "usual": kind.usual_blocks(depth) or []}
        stage = {"SAMPLER": self.sampler, "BLOCKS": list(blocks[self.blocks])}
        stage |= {name.upper(): value for name, value in self.options.items()}
        if self.sampler == "ppt":
            stage["THRESHOLD"] = PPT_THRESHOLD / num_patches**2
        if hasattr(kind, "min_tokens"):
            stage["MIN_TOKENS"] = 3
        return stage


def _methods() -> dict[str, Method]:
    entries = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())["methods"]
    own = {f.name for f in fields(Method)}
    return {
        id: Method(
            id,
            **{name: value for name, value in entry.items() if name in own},
            options={name: value for name, value in entry.items() if name not in own},
        )
        for id, entry in entries.items()
    }


METHODS = _methods()


class Subject(ABC):
    """A network with its weights, and images to measure it with."""

    title: str
    unit: str  # of the values
    size: ComparisonSize
    can_be_tuned = False
    clusters: np.ndarray | None = None  # [images], equal where images are not independent

    @abstractmethod
    def network(self, stages: Sequence[dict] | None, weights: Path | None = None) -> nn.Module:
        """The network with these entries of ATS.STAGES, or dense; `weights`: others than its own."""

    @property
    @abstractmethod
    def calibration(self) -> Tensor:
        """[N, 3, H, W] images that budgets are met on."""

    @abstractmethod
    def values(self, model: nn.Module) -> tuple[list[float], float]:
        """A number per image, more is better, and mean GFLOPs as run."""

    def dense_values(self, model: nn.Module) -> list[float]:
        """The same of the dense network."""
        return self.values(model)[0]

    @property
    @abstractmethod
    def inputs(self) -> dict[str, object]:
        """What the values depend on, as plain values."""


class Classifier(Subject):
    """A network of a configuration, by its top-1 accuracy on validation images.

    Args:
        has_copies: images are called <number>_<copy>; those of one number show the same thing.
    """

    unit, can_be_tuned = "top-1 %", True

    def __init__(
        self, title: str, config: Path, weights: Path, data: Path, size: ComparisonSize, *, has_copies: bool = False
    ) -> None:
        self.title, self.config, self.weights, self.data, self.size = title, config, weights, data, size
        self.has_copies = has_copies

    def cfg(self, stages: Sequence[dict] | None, **more: object) -> CfgNode:
        """The configuration with these stages."""
        ats = ["ATS.ENABLE", stages is not None, "ATS.STAGES", list(stages or [])]
        ats += [
            "ATS.BLOCKS",
            list(DEFAULT_BLOCKS),
            "ATS.NUM_TOKENS",
            1.0,
            "ATS.DROPPED",
            "drop",
        ]  # the stages have them
        data = ["DATA.PATH_TO_DATA_DIR", str(self.data), "DATA_LOADER.NUM_WORKERS", 0, "DEVICE", "cpu"]
        others = [word for pair in more.items() for word in pair]
        return load_config(self.config, [*data, *ats, "TEST.BATCH_SIZE", BATCH_SIZE, *others])

    def network(self, stages: Sequence[dict] | None, weights: Path | None = None) -> nn.Module:
        return load_model(self.cfg(stages), weights or self.weights)

    @cached_property
    def calibration(self) -> Tensor:
        dataset = build_loader(self.cfg(None), "train").dataset
        dataset.transform = build_loader(self.cfg(None), "val").dataset.transform
        step = max(len(dataset) // self.size.calibration_images, 1)
        return torch.stack([dataset[i].x for i in range(0, len(dataset), step)][: self.size.calibration_images])

    @cached_property
    def chosen(self) -> tuple[FileDataset, list[int]]:
        """The validation data set, and which of its images are evaluated."""
        dataset = build_loader(self.cfg(None), "val").dataset
        step = max(len(dataset) // self.size.images, 1)
        return dataset, list(range(0, len(dataset), step))[: self.size.images]

    @cached_property
    def batches(self) -> list[Sample]:
        """Batches of these images, in memory."""
        dataset, chosen = self.chosen
        samples = [dataset[i] for i in chosen]
        return [collate(samples[i : i + BATCH_SIZE]) for i in range(0, len(samples), BATCH_SIZE)]

    @cached_property
    def clusters(self) -> np.ndarray | None:
        if not self.has_copies:
            return None
        dataset, chosen = self.chosen
        return np.array([int(Path(dataset.path(i)).stem.split("_")[0]) for i in chosen])

    def values(self, model: nn.Module) -> tuple[list[float], float]:
        result = measure(model, self.batches)
        return [100.0 * (hit == "1") for hit in result["hits"]], result["gflops"]["mean"]

    @property
    def inputs(self) -> dict[str, object]:
        return {"weights": file_sha256(self.weights), "images": [self.size.images, self.size.calibration_images]}


class Features(Subject):
    """A timm model with weights, by how near its CLS feature stays to the dense network's: their cosine.

    Args:
        images: a folder; every second image, by name, is measured, the others are for budgets.
    """

    unit = "cosine x 100"

    def __init__(self, name: str, weights: Path, images: Path, size: ComparisonSize) -> None:
        import timm
        from timm.data import create_transform, resolve_model_data_config

        from ats.datasets.folders import files_below
        from ats.datasets.imagenet import IMG_EXTENSIONS, read_image

        self.title, self.weights, self.size = name, weights, size
        state = torch.load(weights, weights_only=True) if weights.suffix in (".pth", ".pt") else str(weights)
        self.state = state.get("model", state) if isinstance(state, dict) else state
        self._make = lambda: timm.create_model(name, num_classes=0, img_size=224)
        settings = resolve_model_data_config(self._make(), verbose=False) | {"input_size": (3, 224, 224)}
        transform = create_transform(**settings)
        paths = files_below(str(images), IMG_EXTENSIONS, noun="image")
        if len(paths) < 4:
            raise UserError(f"{images} holds {len(paths)} images; give a folder with some more.")
        x = torch.stack([transform(read_image(str(images / path))) for path in sorted(paths)])
        self.measured, self._calibration = x[1::2][: size.images], x[::2][: size.calibration_images]
        with torch.inference_mode():
            self.dense = self._features(self._loaded())

    def _loaded(self) -> nn.Module:
        model = self._make()
        load_weights(model, self.state)
        return model.eval()

    def network(self, stages: Sequence[dict] | None, weights: Path | None = None) -> nn.Module:
        import ats

        model = self._loaded()
        if stages is None:
            return model
        return ats.patch(model, stages=[{name.lower(): value for name, value in stage.items()} for stage in stages])

    @property
    def calibration(self) -> Tensor:
        return self._calibration

    def _features(self, model: nn.Module) -> Tensor:
        return torch.cat([model.forward_features(x)[:, 0] for x in self.measured.split(20)])

    def dense_values(self, model: nn.Module) -> list[float]:
        return [100.0] * len(self.measured)  # it is what the others are compared with

    @torch.inference_mode()
    def values(self, model: nn.Module) -> tuple[list[float], float]:
        features, costs = [], []
        model.ats.trace = True
        for x in self.measured.split(20):
            features.append(model.forward_features(x)[:, 0])
            costs.append(gflops(model, model.ats.last, x.shape).as_run)
        cosines = torch.nn.functional.cosine_similarity(torch.cat(features), self.dense)
        return (100 * cosines).tolist(), torch.cat(costs).mean().item()

    @property
    def inputs(self) -> dict[str, object]:
        return {"weights": file_sha256(self.weights), "images": [len(self.measured), len(self.calibration)]}


@dataclass
class Cell:
    """A method at a budget."""

    method: Method | None  # None: the dense network
    budget: float
    values: np.ndarray  # [seeds, images], one seed off the shelf
    cost: float  # GFLOPs / dense, mean over seeds
    stages: list[dict]  # entries of ATS.STAGES that meet the budget; of a fine-tuned one empty
    ms: float | None = None  # per image, one thread

    @property
    def in_reach(self) -> bool:
        """Whether the budget was met."""
        return abs(self.cost / self.budget - 1) < 0.04


class Comparison:
    """All methods at all budgets with one subject; results are kept in `folder`."""

    def __init__(self, subject: Subject, *, folder: Path, size: ComparisonSize) -> None:
        self.subject, self.folder, self.size = subject, folder, size
        dense = subject.network([{"SAMPLER": "tome", "BLOCKS": [0], "R": 0}])  # only what it says of itself is read
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
        return self.subject.inputs | {"stage": stage, "torch": torch.__version__, **more}

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
        return Cell(None, 1.0, np.array([found["values"]]), 1.0, [], found["ms"])

    def _cell(self, method: Method, budget: float) -> Cell:
        def evaluate() -> dict:
            model = self._at_budget(method, budget)
            values, cost = self.subject.values(model)
            stages = to_stages([block.reduction for block in ats_blocks(model)], self.depth)
            return {"values": values, "cost": cost / self.dense_gflops, "stages": stages}

        found = self.results.get(f"{method.id}__{budget}", self._inputs(method, budget=budget), evaluate)
        return Cell(method, budget, np.array([found["values"]]), found["cost"], found["stages"])

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
        """Every method fine-tuned at the budgets in question, and the dense network by as many steps."""
        cells = []
        for budget in (1.0, *self.size.tuned_budgets):
            for method in self.tuned_methods if budget < 1 else (None,):
                found = [self._tune(method, budget, seed) for seed in range(self.size.num_seeds)]
                cost = float(np.mean([own["cost"] for own in found]))
                cells.append(Cell(method, budget, np.array([own["values"] for own in found]), cost, []))
        return cells

    def _tune(self, method: Method | None, budget: float, seed: int) -> dict:
        def train() -> dict:
            subject = self.subject
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
            values, cost = subject.values(self._at_budget(method, budget, path))  # scores changed: met again
            return {"values": values, "cost": cost / self.dense_gflops}

        name = f"tuned/{'dense' if method is None else method.id}__{budget}_{seed}"
        inputs = self._inputs(method, budget=budget, seed=seed, steps=self.size.tune_steps)
        return self.results.get(name, inputs, train, cost=2.0)


def shipped(name: str, data: Path, size: ComparisonSize) -> Classifier:
    """The classifier of a shipped configuration: digits or cifar10."""
    if name == "digits":
        config, weights = (
            SHIPPED / "Digits" / "DeiT_ATS.yaml",
            SHIPPED / "Digits" / "weights" / "deit_dense.safetensors",
        )
        return Classifier("Digits", config, weights, data, size, has_copies=True)
    config, weights = SHIPPED / "CIFAR10" / "ViT_ATS.yaml", SHIPPED / "CIFAR10" / "weights" / "vit_dense.safetensors"
    return Classifier("CIFAR-10", config, weights, data, size)
