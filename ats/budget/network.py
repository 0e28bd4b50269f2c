"""The network being calibrated: its knobs, passes over the images, and the reductions of its blocks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ats.budget.search import Knobs, Setting
from ats.errors import UserError
from ats.flops import dense_gflops
from ats.flops import gflops as count_gflops
from ats.models.block import ats_blocks, change_reductions
from ats.models.cost import size
from ats.plugin.handle import Patched
from ats.plugin.patch import library_of
from ats.reduction import Reduction
from ats.reduction.base import options_of

LEARN_FROM = 64  # images that reductions learn from, at least


@dataclass(frozen=True)
class Pass:
    """What one pass over N images measured."""

    setting: Setting  # of the pass, with what was learned from the images
    gflops: Tensor  # [N] in the chosen accounting
    keep: Tensor  # [N] share of the tokens kept, mean over the ATS blocks
    tokens: tuple[float, ...]  # mean tokens kept in each ATS block
    changes: Tensor  # [N] total variation distance from the dense network's class distribution; empty if not asked for


class Network:
    """A network, its knobs, and passes over the images.

    Args:
        compare: measure how far the logits are from the dense network's.
        together: see `Knobs`.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: list[Tensor],
        accounting: str,
        *,
        progress: bool,
        compare: bool = False,
        together: bool = False,
    ) -> None:
        self.model, self.batches, self.accounting, self.progress = model, batches, accounting, progress
        modules = ats_blocks(model)
        if not modules or not hasattr(model, "forward_tokens"):
            raise UserError(
                "This network has no ATS block: build it with ATS.ENABLE True and the blocks in ATS.BLOCKS."
                if hasattr(model, "forward_tokens")
                else "This network has no ATS block: call ats.patch(model, blocks=...) first."
            )
        self.original = tuple(module.reduction for module in modules if module.reduction)
        for name in (reduction.name for reduction in self.original if not reduction.amount):
            raise UserError(f"The sampler {name} has no amount to calibrate: choose another ATS.SAMPLER.")
        self.blocks = tuple(reduction.block for reduction in self.original)
        self.depth, self.num_images, self.num_passes = len(model.block_list()), sum(map(len, batches)), 0
        shape = tuple(batches[0].shape)
        self.dense, self.device = dense_gflops(model, shape), next(model.parameters()).device
        grids = {block: (model.block_grids(shape)[block], model.prefix_of(block)) for block in self.blocks}
        self.dense_tokens = {block: num_prefix + size(grid.queries) for block, (grid, num_prefix) in grids.items()}
        max_tokens = tuple(num_prefix + size(grid.keys) for grid, num_prefix in grids.values())
        self.knobs = Knobs(self.original, max_tokens, together)
        self.dense_probs: list[Tensor] = []
        self._known: dict[Setting, Setting] = {}
        if compare:
            self.compare_with_dense()

    def compare_with_dense(self) -> None:
        """Let later passes measure how far the logits are from the dense network's."""
        with self.restored_after_an_error():
            give(self.model, ())
            logits = (logits for _, logits, _ in self._forward("dense", self.batches))
            self.dense_probs = [own.double().softmax(dim=-1) for own in logits]
            give(self.model, self.original)

    def set(self, setting: Setting) -> None:
        """Give the blocks these reductions, and record them in the settings of a patched model."""
        give(self.model, setting)
        settings = self.model.ats.settings if isinstance(self.model, Patched) else {}
        stages = settings.get("stages", [settings] if settings else [])
        for stage in stages:
            own = [reduction for reduction in setting if reduction.block in stage["blocks"]]
            if len(own) < len(stage["blocks"]):
                stage["blocks"] = [reduction.block for reduction in own]
            if own:
                stage |= lists(own, self.depth)
                stage |= {name: getattr(own[0], name) for options in own[0].variants() for name in options}
                if "schedule" in stage:
                    stage["schedule"] = "flat"  # the amounts follow it already
        if "stages" in settings:
            settings["stages"] = [stage for stage in stages if stage["blocks"]]

    @contextmanager
    def restored_after_an_error(self) -> Iterator[None]:
        """Inside, an exception leaves the network's reductions as they were."""
        try:
            yield
        except BaseException:
            give(self.model, self.original)
            raise

    def run(self, setting: Setting) -> Pass:
        """One pass over all images with these reductions (at least one), which first learn what they can."""
        setting = self.learned(setting)
        give(self.model, setting)
        self.num_passes += 1
        dense_tokens = torch.tensor([self.dense_tokens[reduction.block] for reduction in setting]).double()
        costs, shares, tokens, changes = [], [], [], []
        for index, (x, logits, trace) in enumerate(self._forward(f"pass {self.num_passes}", self.batches)):
            cost = count_gflops(self.model, trace, x.shape)
            costs.append((cost.as_run if self.accounting == "run" else cost.paper).cpu())
            kept = torch.stack([entry.num_tokens for entry in trace], dim=1).double().cpu()  # [S, blocks]
            tokens.append(kept)
            share = (kept / dense_tokens).mean(dim=1)
            shares.append(share.reshape(len(x), -1).mean(dim=1))  # mean over a clip's frames
            if self.dense_probs:
                moved = (logits.double().softmax(dim=-1) - self.dense_probs[index]).abs().sum(dim=-1) / 2
                changes.append(moved.cpu())
        return Pass(
            setting=setting,
            gflops=torch.cat(costs),
            keep=torch.cat(shares),
            tokens=tuple(torch.cat(tokens).mean(dim=0).tolist()),
            changes=torch.cat(changes) if changes else torch.empty(0),
        )

    def learned(self, setting: Setting) -> Setting:
        """These reductions with what they learn from the images; each setting learns once."""
        if setting not in self._known:
            found: dict[int, list[float]] = {}
            learning = tuple(reduction.learning(found) for reduction in setting)
            if any(own is not reduction for own, reduction in zip(learning, setting, strict=True)):
                give(self.model, learning)
                enough = [num >= LEARN_FROM for num in accumulate(map(len, self.batches))]
                for _ in self._forward("thresholds", self.batches[: enough.index(True) + 1 if any(enough) else None]):
                    pass
            self._known[setting] = tuple(reduction.learned(found) for reduction in setting)
        return self._known[setting]

    @property
    def how_to_keep_less(self) -> str:
        """What to change where the fewest tokens are still too many."""
        first = self.blocks[0]
        return f"sample before block {first}" if first else "lower ATS.MIN_TOKENS"

    def dense_pass(self) -> Pass:
        """What a pass of the dense network would measure."""
        ones = torch.ones(self.num_images, dtype=torch.float64)
        return Pass(setting=(), gflops=self.dense * ones, keep=ones, tokens=(), changes=0 * ones)

    @torch.inference_mode()
    def _forward(self, title: str, batches: list[Tensor]) -> Iterator[tuple[Tensor, Tensor, list]]:
        """(x, logits, trace) of each batch, in evaluation mode."""
        was_training = self.model.training
        self.model.eval()
        try:
            for x in tqdm(batches, desc=title, unit="batch", leave=False, disable=None if self.progress else True):
                x = x.to(self.device)
                yield x, *self.model.forward_tokens(x)
        finally:
            self.model.train(was_training)


def give(model: nn.Module, setting: Setting) -> None:
    """Give blocks these reductions and all other blocks none, in place. An empty setting gives the dense network, at
    its speed. Raises a UserError if blocks of a patched model were wrapped since.
    """
    blocks, reductions = ats_blocks(model), {reduction.block: reduction for reduction in setting}
    if [block.index for block in blocks] == list(reductions):
        for block in blocks:
            block.reduction = reductions[block.index]
    elif isinstance(model, Patched):
        library = library_of(model)
        if reason := library.refusal(model):
            raise UserError(f"The blocks of this model cannot be changed: {reason}.")
        library.attach(model, reductions)
    else:
        change_reductions(model, reductions)


def per_block(setting: Iterable[Reduction], depth: int) -> list[int | float]:
    """The amounts with an entry for every block of the network."""
    setting = tuple(setting)
    return lists(setting, depth)[setting[0].amount] if setting else [1.0] * depth


def lists(setting: Sequence[Reduction], depth: int) -> dict[str, list[int | float]]:
    """The amount and whatever else differs from block to block, with an entry for every block of the network."""
    first, found = setting[0], {}
    for option in options_of(type(first)):
        values = {reduction.block: getattr(reduction, option.name) for reduction in setting}
        if option.name == first.amount:
            takes_ratio = float in (option.about.types or (type(option.default),))
            found[option.name] = [values.get(block, 1.0 if takes_ratio else 0) for block in range(depth)]
        elif option.about.per_block and set(values.values()) != {option.default}:
            found[option.name] = [values.get(block, option.default) for block in range(depth)]
    return found
