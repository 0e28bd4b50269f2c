"""The Digits studies' canvases, and the short fine-tuning."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ats.config import CfgNode
from ats.datasets import Sample, build_loader
from ats.engine.device import seed_everything
from ats.engine.distributed import data_parallel
from ats.engine.optim import set_lr
from ats.engine.step import Recipe, train_step
from ats.engine.train import build_state
from ats.study.budget import BATCH_SIZE

DEVICE = torch.device("cpu")  # the same numbers everywhere; the networks are small


class Canvases:
    """Validation canvases in memory, in groups that show the same digits on canvases of their own.

    Args:
        num_groups, per_group: groups, and canvases of a digit in each. num_digits: how many digits; None: all.

    Attributes:
        groups: batches of each.
        digits: [canvases of a group] which digit each shows; the same in every group.
        distractors: [groups, canvases of a group] fragments beside the digit.
    """

    def __init__(self, cfg: CfgNode, *, num_groups: int, per_group: int, num_digits: int | None) -> None:
        dataset = build_loader(cfg, "val").dataset
        about = json.loads((Path(cfg.DATA.PATH_TO_DATA_DIR) / "digits.json").read_text())["num_distractors"]["val"]
        names = [f"{Path(path).parent.name}/{Path(path).name}" for path in map(dataset.path, range(len(dataset)))]
        keys = [tuple(map(int, Path(name).stem.split("_"))) for name in names]  # digit, copy
        chosen = sorted({digit for digit, _ in keys})
        chosen = set(chosen if num_digits is None else chosen[:: -(-len(chosen) // num_digits)])
        self.groups: list[list[Sample]] = []
        digits, distractors = [], []
        for seed in range(num_groups):
            group = range(seed * per_group, (seed + 1) * per_group)
            members = [i for i, (digit, copy) in enumerate(keys) if copy in group and digit in chosen]
            samples = [dataset[i] for i in members]
            x, label = torch.stack([sample.x for sample in samples]), torch.tensor([s.label for s in samples])
            self.groups.append(list(_batches(x, label)))
            digits.append([keys[i][0] for i in members])
            distractors.append([about[names[i]] for i in members])
        self.digits, self.distractors = np.array(digits[0]), np.array(distractors)
        assert all(group == digits[0] for group in digits)


def _batches(x: Tensor, label: Tensor) -> Iterator[Sample]:
    index = torch.arange(len(x))
    for part in index.split(BATCH_SIZE):
        yield Sample(x[part], label[part], part, [""] * len(part))


def fine_tune(cfg: CfgNode, *, num_steps: int) -> nn.Module:
    """`num_steps` of the training that `cfg` describes, its learning-rate schedule squeezed into them."""
    loader, recipe = build_loader(cfg, "train"), Recipe.from_cfg(cfg)
    state = build_state(cfg, DEVICE)
    forward = data_parallel(state.model.train())
    loader.batch_sampler.set_epoch(0, start_batch=0)
    for step, batch in zip(range(num_steps), loader, strict=False):
        seed_everything(recipe.seed, 0, step)
        set_lr(state.optimizer, recipe.lr_at(step / num_steps * cfg.SOLVER.MAX_EPOCH))
        train_step(forward, batch.x, batch.label, optimizer=state.optimizer, scaler=state.scaler, recipe=recipe)
    return state.model.eval()
