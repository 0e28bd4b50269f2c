"""The paper's studies on the Digits data: which variants are run, at which cost, and how each is measured.

Every variant is measured on the same canvases, `num_seeds` groups of them, each group with its own placement and
clutter of the same validation digits; seed s also is the seed of the random sampler and of the fine-tuning that the
variant needs. A budget is the cost of a network that keeps exactly k patches from block 3 on; K of inverse transform
sampling is set, on training images, to meet it. Costs are in the paper's accounting (`ats/flops.py`).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ats.checkpoint import load_weights, save_safetensors
from ats.config import CfgNode, load_config
from ats.datasets import build_loader
from ats.flops import gflops
from ats.models import build_model
from ats.study.budget import fit_num_tokens, mean_gflops
from ats.study.digits_data import DEVICE, Canvases, fine_tune
from ats.study.tasks import Runner, Task, file_sha256, measure

SINGLE, MULTI, LATE = (3,), tuple(range(3, 12)), tuple(range(5, 12))  # blocks: the paper's, and the shipped weights'
TUNED = ", fine-tuned"
TUNE_COST, CALIBRATE_COST = 8.0, 0.7  # in evaluations of one group of canvases


@dataclass(frozen=True)
class Settings:
    """How much of everything; the defaults are `make study`.

    Attributes:
        num_seeds: groups of canvases, and trainings per fine-tuned variant.
        canvases: per validation digit and group.
        num_digits: validation digits that are used, None: all.
        budgets: patches kept from block 3 on, descending cost.
        tune_steps: optimizer steps of 64 images of a fine-tuning.
        calibration_images: training images K is set on.
        sweep: K of the sweep.
    """

    num_seeds: int = 3
    canvases: int = 4
    num_digits: int | None = None
    budgets: tuple[int, ...] = (10, 6, 4)
    tune_steps: int = 50
    calibration_images: int = 192
    sweep: tuple[int, ...] = (8, 16, 32, 65, 130, 260, 520)


QUICK = Settings(
    num_seeds=2, canvases=1, num_digits=24, budgets=(10, 4), tune_steps=1, calibration_images=16, sweep=(8, 65)
)


@dataclass(frozen=True)
class Variant:
    """A network: what samples, and with which weights.

    Attributes:
        tuned_on: blocks that sampled in the fine-tuning, () for one of the dense network, None for the shipped weights
            `weights`.
    """

    name: str
    blocks: tuple[int, ...] = ()
    sampler: str = "inverse_transform"
    score: str = "cls_attention_value_norm"
    rule: str = "official"
    weights: str = "deit_dense"
    tuned_on: tuple[int, ...] | None = None

    def overrides(self, num_tokens: int, seed: int) -> list:
        """The config keys of this variant with K = `num_tokens`."""
        if not self.blocks:
            return ["ATS.ENABLE", False]
        return [
            *("ATS.BLOCKS", list(self.blocks), "ATS.NUM_TOKENS", num_tokens, "ATS.MIN_TOKENS", 3, "ATS.SEED", seed),
            *("ATS.SAMPLER", self.sampler, "ATS.SCORE", self.score, "ATS.RULE", self.rule),
        ]


DENSE = Variant("dense")
DENSE_TUNED = Variant("dense, trained on", tuned_on=())
INVERSE = Variant("block 3, inverse transform", SINGLE)
TOP_K = replace(INVERSE, name="block 3, top-K", sampler="topk")
RANDOM = replace(INVERSE, name="block 3, random", sampler="random")
INVERSE_TUNED = replace(INVERSE, name=INVERSE.name + TUNED, tuned_on=SINGLE)
STAGES = Variant("blocks 3-11", MULTI)
STAGES_TUNED = replace(STAGES, name=STAGES.name + TUNED, tuned_on=MULTI)
ATTENTION = replace(STAGES, name="blocks 3-11, score: CLS attention alone", score="cls_attention")
MEAN_ATTENTION = replace(STAGES, name="blocks 3-11, score: mean attention", score="mean_attention")
PAPER_RULE = replace(STAGES, name="blocks 3-11, rule: paper", rule="paper")
SAVING = Variant("blocks 5-11", LATE)
SAVING_TUNED = replace(SAVING, name="blocks 5-11, fine-tuned (shipped weights)", weights="deit_ats")
AT_BUDGETS = (
    *(INVERSE, TOP_K, RANDOM, INVERSE_TUNED, STAGES, STAGES_TUNED),
    *(ATTENTION, MEAN_ATTENTION, PAPER_RULE),
)
SAVED = 0.37  # of the dense cost: what the paper's DeiT-S + ATS saves


@dataclass
class Row:
    """A variant at one cost, measured on every group of canvases.

    Attributes:
        budget: what it was set to: patches kept from block 3 on, "saving", or "K" of the sweep; None: dense.
        num_tokens: K, for each seed.
        measured: what `tasks.measure` returned, for each seed.
    """

    variant: Variant
    budget: int | str | None
    num_tokens: list[int | None] = field(default_factory=list)
    measured: list[dict] = field(default_factory=list)

    @property
    def hits(self) -> np.ndarray:
        """[seeds, canvases] bool: recognised."""
        return np.array([[hit == "1" for hit in seed["hits"]] for seed in self.measured])

    @property
    def costs(self) -> np.ndarray:
        """[seeds, canvases] GFLOPs."""
        return np.array([seed["costs"] for seed in self.measured])

    @property
    def has_seeds(self) -> bool:
        """Whether another seed changes more than the canvases: a training, or a random choice."""
        return self.variant.tuned_on is not None or self.variant.sampler == "random"


class DigitsStudy:
    """The Digits studies.

    Args:
        config: configs/Digits/DeiT_ATS.yaml. weights: folder of the shipped weights. data: folder made by
            `tools/make_digits.py`, with `num_seeds` x `canvases` canvases of each validation digit.
        folder: where results are kept.
    """

    def __init__(self, *, config: Path, weights: Path, data: Path, folder: Path, settings: Settings) -> None:
        self.config, self.weights, self.data, self.folder, self.settings = config, weights, data, folder, settings
        self.cfg = self._cfg([])
        rows = 2 + len(AT_BUDGETS) * len(settings.budgets) + 2 + len(settings.sweep)
        tuned = {variant.tuned_on for variant in (*AT_BUDGETS, DENSE_TUNED)} - {None}
        calibrations = sum(
            len(settings.budgets) * (settings.num_seeds if variant.tuned_on else 1)
            for variant in AT_BUDGETS
            if variant.sampler == "inverse_transform"
        )
        cost = settings.num_seeds * (rows + TUNE_COST * len(tuned)) + CALIBRATE_COST * (calibrations + 2)
        self.runner = Runner(folder, total_cost=cost)

    def _cfg(self, overrides: list) -> CfgNode:
        data = ["DATA.PATH_TO_DATA_DIR", str(self.data), "DATA_LOADER.NUM_WORKERS", 0]
        return load_config(self.config, [*data, "DEVICE", "cpu", *overrides])

    @cached_property
    def canvases(self) -> Canvases:
        """The validation canvases."""
        num_seeds, per_group, num_digits = self.settings.num_seeds, self.settings.canvases, self.settings.num_digits
        return Canvases(self.cfg, num_groups=num_seeds, per_group=per_group, num_digits=num_digits)

    @cached_property
    def calibration(self) -> Tensor:
        """The training images that K is set on, [N, 3, H, W]: evenly from the training set, as validation sees them."""
        dataset = build_loader(self.cfg, "train").dataset
        dataset.transform = build_loader(self.cfg, "val").dataset.transform
        step = len(dataset) // self.settings.calibration_images
        return torch.stack([dataset[step * i].x for i in range(self.settings.calibration_images)])

    @cached_property
    def data_sha256(self) -> str:
        """Of the checksums of the data."""
        return file_sha256(self.data / "SHA256SUMS")

    def network(self, variant: Variant, num_tokens: int, seed: int) -> nn.Module:
        """The variant's network with its weights."""
        model = build_model(self._cfg(variant.overrides(num_tokens, seed)))
        load_weights(model, self.weights_of(variant, seed))
        return model.eval()

    def dense_gflops(self) -> float:
        """Of the dense network."""
        model = build_model(self._cfg(["ATS.ENABLE", False]))
        return gflops(model, [], (1, 3, *model_size(self.cfg))).dense

    def budget_gflops(self, patches: int) -> float:
        """Cost of keeping exactly `patches` from block 3 on."""
        return mean_gflops(self.network(TOP_K, patches + 1, seed=0), self.calibration[:1])

    # ---- the tasks

    def _inputs(self, variant: Variant, seed: int, **more: object) -> dict:
        fields = asdict(variant)
        del fields["name"]
        tuned = variant.tuned_on is not None
        return {
            "variant": fields,
            "weights": file_sha256(self.weights_of(variant, seed)) if tuned else self.shipped_sha256(variant.weights),
            "seed": seed if tuned or variant.sampler == "random" else 0,
            "data": self.data_sha256,
            "torch": torch.__version__,
            **more,
        }

    def shipped_sha256(self, name: str) -> str:
        """Of shipped weights."""
        return file_sha256(self.weights / f"{name}.safetensors")

    def weights_of(self, variant: Variant, seed: int) -> Path:
        """The file of the variant's weights."""
        if variant.tuned_on is None:
            return self.weights / f"{variant.weights}.safetensors"
        return self.folder / "tuned" / f"{_blocks_name(variant.tuned_on)}_{seed}.safetensors"

    def tune(self, variant: Variant, seed: int) -> None:
        """Fine-tune the shipped dense weights with the blocks of `variant.tuned_on`, at the middle budget."""
        blocks = variant.tuned_on
        start = replace(variant, name=variant.name.removesuffix(TUNED), tuned_on=None, blocks=blocks)
        middle = self.settings.budgets[len(self.settings.budgets) // 2]
        num_tokens = self.num_tokens(start, middle, seed) if blocks else 0
        overrides = [*start.overrides(num_tokens, seed), "RNG_SEED", seed, "SOLVER.MAX_EPOCH", 1]
        cfg = self._cfg([*overrides, "TRAIN.CHECKPOINT_FILE_PATH", str(self.weights / "deit_dense.safetensors")])
        path = self.weights_of(variant, seed)

        def run() -> dict:
            save_safetensors(path, fine_tune(cfg, num_steps=self.settings.tune_steps).state_dict())
            return {"sha256": file_sha256(path)}

        task = Task(
            f"tuned/{_blocks_name(blocks)}_{seed}",
            self._inputs(start, seed) | {"seed": seed, "steps": self.settings.tune_steps, "num_tokens": num_tokens},
            run,
            TUNE_COST,
        )
        result = self.runner.run_one(task)
        if not path.is_file() or file_sha256(path) != result["sha256"]:
            run()

    def num_tokens(self, variant: Variant, budget: int | str, seed: int) -> int:
        """K with which the variant costs what the budget says."""
        if variant.sampler != "inverse_transform":
            return budget + 1  # that many tokens, CLS counted
        if budget == "saving":
            target = (1 - SAVED) * self.dense_gflops()
        else:
            target = self.budget_gflops(budget)
        task = Task(
            f"num_tokens/{_file_name(variant, budget)}{'' if variant.tuned_on is None else f'_{seed}'}",
            self._inputs(variant, seed, target=target, images=self.settings.calibration_images),
            lambda: {"num_tokens": fit_num_tokens(self.network(variant, 64, seed), self.calibration, target)},
            CALIBRATE_COST,
        )
        return self.runner.run_one(task)["num_tokens"]

    def measure_row(self, variant: Variant, budget: int | str | None, *, num_tokens: int | None = None) -> Row:
        """A variant at a budget (or with K = `num_tokens`) on all groups of canvases."""
        row = Row(variant, budget)
        for seed in range(self.settings.num_seeds):
            k = num_tokens
            if k is None and budget is not None:
                k = self.num_tokens(variant, budget, seed)
            row.num_tokens.append(k)
            task = Task(
                f"rows/{_file_name(variant, budget if num_tokens is None else f'K{num_tokens}')}_{seed}",
                self._inputs(
                    variant, seed, num_tokens=k, group=seed, settings=list(asdict(self.settings).values())[:3]
                ),
                lambda k=k, seed=seed: measure(
                    self.network(variant, k or 0, seed), self.canvases.groups[seed], device=DEVICE
                ),
            )
            row.measured.append(self.runner.run_one(task))
        return row

    def run(self) -> list[Row]:
        """All rows."""
        for variant in (INVERSE_TUNED, STAGES_TUNED, DENSE_TUNED):
            for seed in range(self.settings.num_seeds):
                self.tune(variant, seed)
        rows = [self.measure_row(DENSE, None), self.measure_row(DENSE_TUNED, None)]
        rows += [self.measure_row(variant, budget) for variant in AT_BUDGETS for budget in self.settings.budgets]
        rows += [self.measure_row(variant, "saving") for variant in (SAVING, SAVING_TUNED)]
        rows += [self.measure_row(STAGES, "K", num_tokens=k) for k in self.settings.sweep]
        return rows


def model_size(cfg: CfgNode) -> tuple[int, int]:
    """Height and width of the images."""
    return cfg.DATA.TEST_CROP_SIZE, cfg.DATA.TEST_CROP_SIZE


def _blocks_name(blocks: tuple[int, ...]) -> str:
    return f"blocks_{blocks[0]}-{blocks[-1]}" if blocks else "dense"


def _file_name(variant: Variant, budget: int | str | None) -> str:
    name = "".join(c if c.isalnum() else "_" for c in variant.name)
    return name if budget is None else f"{name}__{budget}"
