"""What the comparison measures, and how much of it: one of our classifiers on its validation images or clips, or a timm
model's features on unlabelled photographs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from ats.checkpoint import load_weights
from ats.config import SHIPPED, CfgNode, load_config
from ats.datasets import Sample, build_loader
from ats.datasets.base import FileDataset
from ats.datasets.kinetics import Kinetics
from ats.datasets.loader import collate
from ats.errors import UserError
from ats.flops import gflops
from ats.study.results import file_sha256, load_model, measure

BATCH_SIZE = 100
DEFAULT_BLOCKS = range(3, 12)  # of ATS.BLOCKS


@dataclass(frozen=True)
class ComparisonSize:
    """How much is measured; the defaults are those of `tools/compare.py`."""

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


class Subject(ABC):
    """A network with its weights, and images to measure it with."""

    title: str
    units: ClassVar[dict[str, str]]  # what is measured of an image -> its unit; the first is the main one
    size: ComparisonSize
    can_be_tuned = False
    clusters: np.ndarray | None = None  # [images], equal where images are not independent

    @abstractmethod
    def network(self, stages: Sequence[dict] | None, weights: Path | None = None) -> nn.Module:
        """The network with these entries of ATS.STAGES, or dense. `weights` replace its own."""

    @property
    @abstractmethod
    def calibration(self) -> Tensor:
        """[N, 3, H, W] images that budgets are met on."""

    @abstractmethod
    def values(self, model: nn.Module) -> tuple[list[list[float]], float]:
        """For each of `units` a number per image, higher is better; and mean GFLOPs as run."""

    def dense_values(self, model: nn.Module) -> list[list[float]]:
        """The same for the dense network."""
        return self.values(model)[0]

    @property
    @abstractmethod
    def inputs(self) -> dict[str, object]:
        """What the values depend on, as plain values."""


class Classifier(Subject):
    """A config's network, judged by its top-1 accuracy on validation images or clips, one view each.

    Args:
        has_copies: files are called <number>_<copy>; files with the same number show the same thing.
    """

    units: ClassVar = {"": "top-1 %"}
    can_be_tuned = True

    def __init__(
        self, title: str, config: Path, weights: Path, data: Path, size: ComparisonSize, *, has_copies: bool = False
    ) -> None:
        self.title, self.config, self.weights, self.data, self.size = title, config, weights, data, size
        self.has_copies = has_copies

    def cfg(self, stages: Sequence[dict] | None, **more: Any) -> CfgNode:
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
        dataset = build_loader(self.cfg(None), "val").dataset  # replaced by training data, with this transform
        if isinstance(dataset, Kinetics):
            dataset = replace(dataset, listing=build_loader(self.cfg(None), "train").dataset.listing)
        else:
            dataset = replace(dataset, split="train")
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
    def clusters(self) -> np.ndarray | None:  # type: ignore[override]
        if not self.has_copies:
            return None
        dataset, chosen = self.chosen
        return np.array([int(Path(dataset.path(i)).stem.split("_")[0]) for i in chosen])

    def values(self, model: nn.Module) -> tuple[list[list[float]], float]:
        result = measure(model, self.batches)
        return [[100.0 * (hit == "1") for hit in result["hits"]]], result["gflops"]["mean"]

    @property
    def inputs(self) -> dict[str, object]:
        return {"weights": file_sha256(self.weights), "images": [self.size.images, self.size.calibration_images]}


class Features(Subject):
    """A timm model with weights, judged by how near its features stay to the dense network's: the cosine of CLS, and
    the mean cosine of the patches. A dropped patch has the feature of the token that stands for it (`restore` nearest).

    Args:
        images: a folder; every second image, by name, is measured, the others set budgets.
    """

    units: ClassVar = {"CLS": "cosine x 100", "patches": "cosine x 100"}

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
            raise UserError(f"{images} holds {len(paths)} images; give a folder with at least 4.")
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
        return torch.cat([model.forward_features(x) for x in self.measured.split(20)])

    def dense_values(self, model: nn.Module) -> list[list[float]]:
        return [[100.0] * len(self.measured)] * 2  # the reference itself

    @torch.inference_mode()
    def values(self, model: nn.Module) -> tuple[list[list[float]], float]:
        features, costs = [], []
        handle: Any = model.ats
        handle.trace, handle.restore = True, "nearest"
        for x in self.measured.split(20):
            features.append(model.forward_features(x))
            costs.append(gflops(model, handle.last, x.shape).as_run)
        cosines = 100 * torch.nn.functional.cosine_similarity(torch.cat(features), self.dense, dim=2)
        num_prefix = model.num_prefix_tokens
        return [cosines[:, 0].tolist(), cosines[:, num_prefix:].mean(dim=1).tolist()], torch.cat(costs).mean().item()

    @property
    def inputs(self) -> dict[str, object]:
        return {"weights": file_sha256(self.weights), "images": [len(self.measured), len(self.calibration)]}


# Name -> title, configuration and weights in configs/, whether files are called <number>_<copy>.
SUBJECTS = {
    "digits": ("Digits", "Digits/DeiT_ATS.yaml", "Digits/weights/deit_dense.safetensors", True),
    "cifar10": ("CIFAR-10", "CIFAR10/ViT_ATS.yaml", "CIFAR10/weights/vit_dense.safetensors", False),
    "moving_digits": ("moving Digits (X-ViT)", "Digits/XViT_ATS.yaml", "Digits/weights/xvit_dense.safetensors", True),
}


def shipped(name: str, data: Path, size: ComparisonSize) -> Classifier:
    """The classifier of a shipped configuration."""
    title, config, weights, has_copies = SUBJECTS[name]
    return Classifier(title, SHIPPED / config, SHIPPED / weights, data, size, has_copies=has_copies)
