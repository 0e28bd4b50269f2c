"""The paper's studies on the Digits data: what is measured, at which cost, and how.

Every variant of `digits.yaml` is measured on the same canvases: `num_seeds` groups, which show the same validation
digits with different placement and clutter. Seed s is group s, and also the seed of the random sampler and of
the variant's fine-tuning. A budget is the cost of a network that keeps exactly k patches from block 3 on. K of inverse
transform sampling is set on training images to meet it. Costs are in the paper's accounting (`ats/flops.py`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from ats.checkpoint import save_safetensors
from ats.config import SHIPPED, CfgNode, load_config
from ats.datasets import Sample, build_loader, input_shape
from ats.engine.device import data_parallel, seed_everything, select_device
from ats.engine.step import Recipe, set_lr, train_step
from ats.engine.train import build_state
from ats.flops import dense_gflops, gflops
from ats.models import build_model
from ats.study.results import ResultStore, file_sha256, load_model, measure, search_num_tokens

BATCH_SIZE = 128  # of the canvases
TUNE_COST = 8.0  # relative to evaluating one group of canvases
SAVED = 0.37  # of the dense cost: what the paper's DeiT-S + ATS saves


@dataclass(frozen=True)
class StudySize:
    """How much is measured; the defaults are `make study`."""

    num_seeds: int = 3  # groups of canvases, and trainings per fine-tuned variant
    canvases: int = 4  # per validation digit and group
    num_digits: int | None = None  # validation digits; None: all
    budgets: tuple[int, ...] = (10, 6, 4)  # patches kept from block 3 on, in descending order
    tune_steps: int = 50  # optimizer steps of a fine-tuning, of 64 images each
    calibration_images: int = 192  # training images that K is set on
    sweep: tuple[int, ...] = (8, 16, 32, 65, 130, 260, 520)  # of K


QUICK = StudySize(
    num_seeds=2, canvases=1, num_digits=24, budgets=(10, 4), tune_steps=1, calibration_images=16, sweep=(8, 65)
)


@dataclass(frozen=True)
class Variant:
    """A network: which blocks sample and how, and with which weights."""

    id: str  # in `digits.yaml`
    name: str  # in the report
    blocks: Sequence[int] = ()  # that sample; (): dense
    sampler: str = "inverse_transform"
    score: str = "cls_attention_value_norm"
    rule: str = "official"
    weights: str = "deit_dense"  # shipped
    tuned: bool = False  # fine-tune the weights, with the same blocks sampling

    @property
    def has_seeds(self) -> bool:
        """Whether a seed changes more than the canvases: a training, or a random choice."""
        return self.tuned or self.sampler == "random"

    @property
    def file_name(self) -> str:
        """Its name, made safe for a file."""
        return re.sub(r"\W", "_", self.name)

    def overrides(self, num_tokens: int | None, seed: int) -> list:
        """The config keys of this variant with K = `num_tokens`."""
        if not self.blocks:
            return ["ATS.ENABLE", False]
        return [
            *("ATS.BLOCKS", list(self.blocks), "ATS.NUM_TOKENS", num_tokens, "ATS.MIN_TOKENS", 3, "ATS.SEED", seed),
            *("ATS.SAMPLER", self.sampler, "ATS.SCORE", self.score, "ATS.RULE", self.rule),
        ]


_CONTENTS = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
VARIANTS = {id: Variant(id, **fields) for id, fields in _CONTENTS["variants"].items()}
AT_BUDGETS = tuple(VARIANTS[id] for id in _CONTENTS["at_budgets"])
CLAIMS: list[dict] = _CONTENTS["claims"]


@dataclass
class Row:
    """A variant at one cost, measured on every group of canvases."""

    variant: Variant
    budget: int | str | None  # patches kept from block 3 on; "saving": the paper's cost; "K": the sweep; None: dense
    num_tokens: list[int | None] = field(default_factory=list)  # K, per seed
    measured: list[dict] = field(default_factory=list)  # by `results.measure`, per seed

    @property
    def hits(self) -> np.ndarray:
        """[seeds, canvases] bool: recognised."""
        return np.array([[hit == "1" for hit in seed["hits"]] for seed in self.measured])

    @property
    def costs(self) -> np.ndarray:
        """[seeds, canvases] GFLOPs."""
        return np.array([seed["costs"] for seed in self.measured])


class Canvases:
    """Validation canvases in memory, in groups. Each group shows the same digits with its own placement and clutter."""

    def __init__(self, cfg: CfgNode, size: StudySize) -> None:
        dataset = build_loader(cfg, "val").dataset
        about = json.loads((Path(cfg.DATA.PATH_TO_DATA_DIR) / "digits.json").read_text())["num_distractors"]["val"]
        names = [f"{Path(path).parent.name}/{Path(path).name}" for path in map(dataset.path, range(len(dataset)))]
        keys = [tuple(map(int, Path(name).stem.split("_"))) for name in names]  # digit, copy
        known = sorted({digit for digit, _ in keys})
        chosen = set(known if size.num_digits is None else known[:: -(-len(known) // size.num_digits)])
        self.groups: list[list[Sample]] = []  # batches of each group
        digits, distractors = [], []
        for seed in range(size.num_seeds):
            group = range(seed * size.canvases, (seed + 1) * size.canvases)
            members = [i for i, (digit, copy) in enumerate(keys) if copy in group and digit in chosen]
            self.groups.append(_batches([dataset[i] for i in members]))
            digits.append([keys[i][0] for i in members])
            distractors.append([about[names[i]] for i in members])
        self.digits = np.array(digits[0])  # [canvases of a group] which digit each shows; the same in every group
        self.distractors = np.array(distractors)  # [groups, canvases of a group] number of fragments beside the digit
        assert all(group == digits[0] for group in digits)


def _batches(samples: list[Sample]) -> list[Sample]:
    x, label = torch.stack([sample.x for sample in samples]), torch.tensor([sample.label for sample in samples])
    parts = torch.arange(len(x)).split(BATCH_SIZE)
    return [Sample(x[part], label[part], part, [""] * len(part)) for part in parts]


def fine_tune(cfg: CfgNode, *, num_steps: int) -> nn.Module:
    """Train for `num_steps` as `cfg` says, with the whole learning-rate schedule compressed into them."""
    loader, recipe = build_loader(cfg, "train"), Recipe(cfg)
    state = build_state(cfg, select_device(cfg.DEVICE))
    forward = data_parallel(state.model.train())
    loader.batch_sampler.set_epoch(0, start_batch=0)
    for step, batch in zip(range(num_steps), loader, strict=False):
        seed_everything(recipe.seed, 0, step)
        set_lr(state.optimizer, recipe.lr_at(step / num_steps * cfg.SOLVER.MAX_EPOCH))
        train_step(forward, batch.x, batch.label, state, recipe)
    return state.model.eval()


class DigitsStudy:
    """The Digits studies, of configs/Digits/DeiT_ATS.yaml and its shipped weights; results are kept in `folder`.

    `data` is made by `tools/make_digits.py`, with `num_seeds` x `canvases` canvases of each validation digit.
    """

    def __init__(self, *, data: Path, folder: Path, size: StudySize) -> None:
        self.data, self.folder, self.size = data, folder, size
        self.cfg = self._cfg([])
        self.data_sha256 = file_sha256(data / "SHA256SUMS")
        # The rows: variant, budget, and K where it is given.
        self.plan: list[tuple[Variant, Any, Any]] = [(VARIANTS[id], None, None) for id in ("dense", "dense_tuned")]
        self.plan += [(variant, budget, None) for variant in AT_BUDGETS for budget in size.budgets]
        self.plan += [(VARIANTS[id], "saving", None) for id in ("saving", "saving_tuned")]
        self.plan += [(VARIANTS["multi_stage"], "K", k) for k in size.sweep]
        self.tuned = [variant for variant in VARIANTS.values() if variant.tuned]
        total_cost = size.num_seeds * (len(self.plan) + TUNE_COST * len(self.tuned))
        self.results = ResultStore(folder, total_cost=total_cost)

    def _cfg(self, overrides: list) -> CfgNode:
        data = ["DATA.PATH_TO_DATA_DIR", str(self.data), "DATA_LOADER.NUM_WORKERS", 0]
        return load_config(SHIPPED / "Digits" / "DeiT_ATS.yaml", [*data, "DEVICE", "cpu", *overrides])

    @cached_property
    def canvases(self) -> Canvases:
        """The validation canvases."""
        return Canvases(self.cfg, self.size)

    @cached_property
    def calibration(self) -> Tensor:
        """The training images that K is set on, [N, 3, H, W]: evenly spaced, with the transform of validation."""
        dataset = build_loader(self.cfg, "train").dataset
        dataset.transform = build_loader(self.cfg, "val").dataset.transform
        step = len(dataset) // self.size.calibration_images
        return torch.stack([dataset[step * i].x for i in range(self.size.calibration_images)])

    def network(self, variant: Variant, num_tokens: int | None, seed: int) -> nn.Module:
        """The variant's network with its weights."""
        return load_model(self._cfg(variant.overrides(num_tokens, seed)), self.weights_of(variant, seed))

    def weights_of(self, variant: Variant, seed: int) -> Path:
        """The file of the variant's weights."""
        if variant.tuned:
            blocks = f"blocks_{variant.blocks[0]}-{variant.blocks[-1]}" if variant.blocks else "dense"
            return self.folder / "tuned" / f"{blocks}_{seed}.safetensors"
        return SHIPPED / "Digits" / "weights" / f"{variant.weights}.safetensors"

    def dense_gflops(self) -> float:
        """Cost of the dense network."""
        return dense_gflops(build_model(self._cfg(["ATS.ENABLE", False])), (1, *input_shape(self.cfg)))

    def budget_gflops(self, budget: int | str) -> float:
        """Cost of keeping exactly `budget` patches from block 3 on; "saving": the paper's share of dense."""
        if budget == "saving":
            return (1 - SAVED) * self.dense_gflops()
        model, x = self.network(VARIANTS["top_k"], budget + 1, seed=0), self.calibration[:1]  # CLS is a token too
        with torch.inference_mode():
            return gflops(model, model.forward_tokens(x)[1], x.shape).paper.item()

    def run(self) -> list[Row]:
        """Measure everything not measured yet."""
        for variant in self.tuned:
            for seed in range(self.size.num_seeds):
                self.tune(variant, seed)
        return [self.measure_row(*row) for row in self.plan]

    def tune(self, variant: Variant, seed: int) -> None:
        """Fine-tune the shipped weights with the variant's blocks sampling, at the middle budget."""
        start = replace(variant, name=variant.name.removesuffix(", fine-tuned"), tuned=False)
        middle = self.size.budgets[len(self.size.budgets) // 2]
        num_tokens = self.num_tokens(start, middle, seed) if variant.blocks else 0
        overrides = [*start.overrides(num_tokens, seed), "RNG_SEED", seed, "SOLVER.MAX_EPOCH", 1]
        cfg = self._cfg([*overrides, "TRAIN.CHECKPOINT_FILE_PATH", str(self.weights_of(start, seed))])
        path = self.weights_of(variant, seed)

        def train() -> dict:
            save_safetensors(path, fine_tune(cfg, num_steps=self.size.tune_steps).state_dict())
            return {"sha256": file_sha256(path)}

        inputs = self._inputs(start, seed) | {"seed": seed, "steps": self.size.tune_steps, "num_tokens": num_tokens}
        result = self.results.get(f"tuned/{path.stem}", inputs, train, cost=TUNE_COST)
        if not path.is_file() or file_sha256(path) != result["sha256"]:
            train()

    def num_tokens(self, variant: Variant, budget: int | str | None, seed: int) -> int | None:
        """K with which the variant meets the budget; None without a budget."""
        if budget is None:
            return None
        if variant.sampler != "inverse_transform":  # keeps exactly K tokens, with CLS
            return budget + 1
        target = self.budget_gflops(budget)
        name = f"num_tokens/{variant.file_name}__{budget}{f'_{seed}' if variant.tuned else ''}"
        inputs = self._inputs(variant, seed, target=target, images=self.size.calibration_images)
        return self.results.get(
            name, inputs, lambda: search_num_tokens(self.network(variant, 64, seed), self.calibration, target), cost=0.0
        )["num_tokens"]

    def measure_row(self, variant: Variant, budget: int | str | None, num_tokens: int | None = None) -> Row:
        """A variant at a budget, or with K = `num_tokens`, on all groups of canvases."""
        row, settings = Row(variant, budget), [self.size.num_seeds, self.size.canvases, self.size.num_digits]
        suffix = f"__K{num_tokens}" if num_tokens else "" if budget is None else f"__{budget}"
        for seed in range(self.size.num_seeds):
            k = num_tokens or self.num_tokens(variant, budget, seed)
            inputs = self._inputs(variant, seed, num_tokens=k, group=seed, settings=settings)

            def evaluate(k: int | None = k, seed: int = seed) -> dict:
                return measure(self.network(variant, k, seed), self.canvases.groups[seed])

            row.num_tokens.append(k)
            row.measured.append(self.results.get(f"rows/{variant.file_name}{suffix}_{seed}", inputs, evaluate))
        return row

    def _inputs(self, variant: Variant, seed: int, **more: Any) -> dict:
        """What a result depends on. A kept result is reused only if this is the same: renaming a key measures again."""
        fields = {key: getattr(variant, key) for key in ("blocks", "sampler", "score", "rule", "weights")}
        return {
            "variant": fields | {"tuned_on": variant.blocks if variant.tuned else None},
            "weights": file_sha256(self.weights_of(variant, seed)),
            "seed": seed if variant.has_seeds else 0,
            "data": self.data_sha256,
            "torch": torch.__version__,
            **more,
        }
