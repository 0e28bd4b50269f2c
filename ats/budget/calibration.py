"""Which K meets a budget? `calibrate` finds K of every ATS block for a mean cost on images you give; no labels needed.
Other reductions than sampling have another amount instead of K: r of ToMe, the keep rate of EViT.

    ats.patch(model, blocks=range(3, 12))
    found = ats.calibrate(model, images, gflops=2.9)      # or keep=0.5, or speedup=1.6; the model now has these K
    print(found.yaml())                                   # the same for a config

From the command line: `python tools/calibrate.py --help`. The search itself is `search.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby

import torch
import yaml
from torch import Tensor, nn
from tqdm import tqdm

from ats.budget.search import Knobs, Setting, Trial, amounts, bisect, refine
from ats.errors import UserError
from ats.flops import dense_gflops
from ats.flops import gflops as count_gflops
from ats.models.block import ats_blocks
from ats.models.cost import size
from ats.plugin.handle import Patched
from ats.reduction import Reduction
from ats.reduction.base import options_of

ACCOUNTINGS = ("run", "paper")


@dataclass(frozen=True)
class Pass:
    """What one pass over N images measured."""

    gflops: Tensor  # [N] in the chosen accounting
    keep: Tensor  # [N] share of the tokens kept, mean over the ATS blocks
    tokens: tuple[float, ...]  # mean tokens kept in each ATS block
    changes: Tensor  # [N] total variation distance from the dense network's class distribution; empty if not asked for


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found."""

    setting: Setting  # the reductions of the blocks that lose tokens
    depth: int  # blocks of the network
    found: Pass  # over the images, with these reductions
    dense: float  # GFLOPs of the dense network
    least: float  # mean GFLOPs in reach
    most: float
    accounting: str  # "run" or "paper"
    passes: int  # over the images, that the search took

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks that lose tokens."""
        return tuple(reduction.block for reduction in self.setting)

    @property
    def num_tokens(self) -> tuple[int | float, ...]:
        """K of each of them (or r, or the keep rate)."""
        return amounts(self.setting)

    @property
    def per_block(self) -> list[int | float]:
        """ATS.NUM_TOKENS: an entry for each block of the network, 1.0 (r: 0) where no token is lost."""
        return _per_block(self.setting, self.depth)

    def yaml(self, *, as_stages: bool = False) -> str:
        """The lines for a config: blocks and amounts, where all blocks have one reduction; other options are then those
        of the config. Else ATS.STAGES with all options.

        Args:
            as_stages: ATS.STAGES in any case, for a config that has it.
        """
        stages = [list(own) for _, own in groupby(self.setting, key=lambda r: replace(r, block=0, **{r.amount: 1}))]
        kind, lines = self.setting[0], {"ATS": {"ENABLE": True}}
        if as_stages or len(stages) > 1:
            lines["ATS"]["STAGES"] = [_stage(own, self.depth) for own in stages]
        else:
            key = next(option.key for option in options_of(type(kind)) if option.name == kind.amount)
            section, name = key.split(".")
            sampler = {} if kind.name == "inverse_transform" else {"SAMPLER": kind.name}
            lines["ATS"] |= {"BLOCKS": list(self.blocks)} | sampler
            lines.setdefault(section, {})[name] = self.per_block
        return yaml.safe_dump(lines, sort_keys=False, default_flow_style=None, width=10**6)

    def spread(self) -> dict[str, float]:
        """GFLOPs over the images: mean, its standard error, standard deviation, smallest, quantiles, largest."""
        values = self.found.gflops
        std = values.std(correction=1).item() if len(values) > 1 else 0.0
        quantiles = torch.quantile(values, values.new_tensor([0.0, 0.05, 0.5, 0.95, 1.0])).tolist()
        head = {"mean": values.mean().item(), "standard error": std / len(values) ** 0.5, "std": std}
        return head | dict(zip(("min", "p5", "p50", "p95", "max"), quantiles, strict=True))


def calibrate(
    model: nn.Module,
    images: Tensor | Iterable[Tensor],
    *,
    gflops: float | None = None,
    keep: float | None = None,
    speedup: float | None = None,
    accounting: str = "run",
    refine_rounds: int = 0,
    batch_size: int = 32,
    tolerance: float = 0.002,
    progress: bool = True,
) -> Calibration:
    """Set K of every ATS block of `model`, in place, so that the mean over `images` meets a budget.

    Args:
        model: any network of `ats.models` with ATS, or a model after `ats.patch`, on any device.
        images: [N, 3, H, W] or clips [N, 3, T, H, W], as the network takes them; or batches of them, e.g. a DataLoader,
            which are held in memory; of a tuple or list, such as (images, labels), the first element is taken. A few
            hundred: the mean is as exact as its standard error (`Calibration.spread`).
        gflops: mean GFLOPs of an image. keep: mean share of the tokens left behind the ATS blocks. speedup: GFLOPs of
            the dense network over the mean. Give one of the three.
        accounting: what `gflops` and `speedup` count: "run", what is computed; "paper", what the paper's tables count.
        refine_rounds: rounds in which tokens are moved between the blocks to change the logits less at the same
            cost; each takes some 7 passes per ATS block.
        tolerance: relative; the search stops when the mean is this near.
        progress: show a bar if the console is a terminal.

    Returns:
        What was found; the model has it already.

    Raises:
        UserError: no ATS in the model, no images, not exactly one budget, or one out of reach: the message has the
            range. The model's K are as they were then.
    """
    wanted = _one_budget({"gflops": gflops, "keep": keep, "speedup": speedup})
    if accounting not in ACCOUNTINGS:
        raise UserError(f"accounting {accounting}: choose from {', '.join(ACCOUNTINGS)}.")
    batches = _to_batches(images, batch_size)
    network = Network(model, batches, accounting, progress=progress, compare=refine_rounds > 0)
    with network.restored_after_an_error():
        return _search(network, *wanted, refine_rounds=refine_rounds, tolerance=tolerance)


def _to_batches(images: Tensor | Iterable, batch_size: int) -> list[Tensor]:
    """The batches on the CPU, without what a loader gives beside the images."""
    wanted = "Give [N, 3, H, W] (clips: [N, 3, T, H, W]) or batches of that, as a DataLoader yields them"
    batches = []
    for batch in images.split(batch_size) if isinstance(images, Tensor) else images:
        x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(x, Tensor):
            raise UserError(f"images: a {type(x).__name__} is no batch of images. {wanted}.")
        if x.ndim not in (4, 5):
            hint = "; torch.stack makes a batch of single images" if x.ndim == 3 else ""
            raise UserError(f"images: a tensor of shape {list(x.shape)} is no batch of images. {wanted}{hint}.")
        if len(x):
            batches.append(x.cpu())
    if not batches:
        raise UserError(f"There are no images to calibrate with. {wanted}.")
    return batches


def _one_budget(budgets: dict[str, float | None]) -> tuple[str, float]:
    given = [(name, value) for name, value in budgets.items() if value is not None]
    if len(given) != 1:
        raise UserError(f"Give one budget, not {len(given)}: {', '.join(budgets)}.")
    name, value = given[0]
    if not value > 0:
        raise UserError(f"{name} {value:g}: a budget is above 0.")
    if name == "keep" and value > 1:
        raise UserError(f"keep {value:g}: a share of the tokens is from 0 to 1, and 0.5 is half of them.")
    return name, value


def _per_block(setting: Iterable[Reduction], depth: int) -> list[int | float]:
    """The amounts with an entry for every block of the network."""
    setting = tuple(setting)
    by_block = dict(zip((reduction.block for reduction in setting), amounts(setting), strict=True))
    kind = type(setting[0])
    [option] = [option for option in options_of(kind) if option.name == kind.amount]
    takes_ratio = float in (option.about.types or (type(option.default),))
    return [by_block.get(block, 1.0 if takes_ratio else 0) for block in range(depth)]


def _stage(setting: Sequence[Reduction], depth: int) -> dict[str, object]:
    """An entry of ATS.STAGES: blocks that differ in their amount alone."""
    first = setting[0]
    options = {
        option.name.upper(): getattr(first, option.name)
        for option in options_of(type(first))
        if not option.about.networks or getattr(first, option.name) != option.default
    }
    blocks = [reduction.block for reduction in setting]
    return {"SAMPLER": first.name, "BLOCKS": blocks} | options | {first.amount.upper(): _per_block(setting, depth)}


def nearest(model: nn.Module, x: Tensor, gflops: float, *, accounting: str = "run", batch_size: int = 128) -> float:
    """Set the one amount of all blocks of `model`, in place, with which images x come nearest to a budget, in or out of
    reach; for comparisons at equal cost.

    Args:
        x: [N, 3, H, W] or clips. gflops: mean of an image.

    Returns:
        Mean GFLOPs reached.
    """
    network = Network(model, _to_batches(x, batch_size), accounting, progress=False, together=True)
    with network.restored_after_an_error():
        measure = cache(lambda setting: Trial(setting, network.run(setting).gflops.mean().item()))
        best = bisect(measure, network.knobs, gflops)[1]
    network.set(best.setting)
    return best.cost


def _search(network: Network, name: str, value: float, *, refine_rounds: int, tolerance: float) -> Calibration:
    dense = network.dense
    target = dense / value if name == "speedup" else value
    passes: dict[Setting, Pass] = {}

    @cache
    def measure(setting: Setting) -> Trial:
        passes[setting] = result = network.run(setting)
        cost = (result.keep if name == "keep" else result.gflops).mean().item()
        return Trial(setting, cost, tuple(result.changes.tolist()))

    knobs = network.knobs
    least, most = measure(knobs.least).cost, measure(knobs.most).cost
    if not least * (1 - tolerance) <= target <= most * (1 + tolerance):
        raise UserError(_out_of_reach(network, name, value, least, most))
    start = bisect(measure, knobs, target, tolerance=tolerance)
    best = refine(measure, knobs, start, target, rounds=refine_rounds, tolerance=tolerance)
    network.set(best.setting)
    return Calibration(
        setting=best.setting,
        depth=network.depth,
        found=passes[best.setting],
        dense=dense,
        least=passes[knobs.least].gflops.mean().item(),
        most=passes[knobs.most].gflops.mean().item(),
        accounting=network.accounting,
        passes=len(passes),
    )


def _out_of_reach(network: Network, name: str, value: float, least: float, most: float) -> str:
    units = {"gflops": "mean GFLOPs", "keep": "as share of the tokens", "speedup": "times fewer GFLOPs than dense"}
    low, high = (network.dense / most, network.dense / least) if name == "speedup" else (least, most)
    dense = "" if name == "keep" else f" (dense: {network.dense:.4g} GFLOPs)"
    first = network.blocks[0]
    fewer = f"sample before block {first}" if first else "lower ATS.MIN_TOKENS"
    return (
        f"{name} {value:.4g} cannot be met with ATS in blocks {', '.join(map(str, network.blocks))}: on these "
        f"{network.num_images} images they reach {low:.4g} to {high:.4g} {units[name]}{dense}. "
        f"Give {name} in between; to spend less, {fewer} (ATS.BLOCKS); to spend more, sample in fewer blocks "
        "or later ones."
    )


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
        self.modules = ats_blocks(model)
        if not self.modules or not hasattr(model, "forward_tokens"):
            raise UserError(
                "This network has no ATS block: build it with ATS.ENABLE True and the blocks in ATS.BLOCKS."
                if hasattr(model, "forward_tokens")
                else "This network has no ATS block: call ats.patch(model, blocks=...) first."
            )
        self.original = tuple(module.reduction for module in self.modules)
        for name in (reduction.name for reduction in self.original if not reduction.amount):
            raise UserError(f"The sampler {name} has no amount to calibrate: choose another ATS.SAMPLER.")
        self.blocks = tuple(reduction.block for reduction in self.original)
        self.depth, self.num_images, self.num_passes = len(model.block_list()), sum(map(len, batches)), 0
        shape = tuple(batches[0].shape)
        self.dense, self.device = dense_gflops(model, shape), next(model.parameters()).device
        grids = [(model.block_grids(shape)[block], model.prefix_of(block)) for block in self.blocks]
        self.dense_tokens = [num_prefix + size(grid.queries) for grid, num_prefix in grids]
        max_tokens = tuple(num_prefix + size(grid.keys) for grid, num_prefix in grids)
        self.knobs = Knobs(self.original, max_tokens, together)
        self.dense_probs = self._dense_probs() if compare else []

    def _dense_probs(self) -> list[Tensor]:
        """Class probabilities of the dense network, batch by batch: every block keeps everything."""
        with self.restored_after_an_error():
            self._turn(self.knobs.most)
            for module in self.modules:
                module.imposed = lambda candidates, _: candidates.valid
            try:
                return [logits.double().softmax(dim=-1) for _, logits, _ in self._forward("dense", self.batches)]
            finally:
                for module in self.modules:
                    del module.imposed
                self._turn(self.original)

    def _turn(self, setting: Setting) -> None:
        for module, reduction in zip(self.modules, setting, strict=True):
            module.reduction = reduction

    def set(self, setting: Setting) -> None:
        """Give the blocks these reductions, for good; the handle of a patched model then says so."""
        self._turn(setting)
        settings = self.model.ats.settings if isinstance(self.model, Patched) else {}
        if "stages" in settings:
            for stage in settings["stages"]:
                own = [reduction for reduction in setting if reduction.block in stage["blocks"]]
                stage[own[0].amount] = _per_block(own, self.depth)
        elif settings:
            settings[setting[0].amount] = _per_block(setting, self.depth)

    @contextmanager
    def restored_after_an_error(self) -> Iterator[None]:
        """Within it an exception leaves the network's reductions as they were."""
        try:
            yield
        except BaseException:
            self._turn(self.original)
            raise

    def run(self, setting: Setting) -> Pass:
        """One pass over all images with these reductions."""
        self._turn(setting)
        self.num_passes += 1
        costs, shares, tokens, changes = [], [], [], []
        for index, (x, logits, trace) in enumerate(self._forward(f"pass {self.num_passes}", self.batches)):
            cost = count_gflops(self.model, trace, x.shape)
            costs.append((cost.as_run if self.accounting == "run" else cost.paper).cpu())
            kept = torch.stack([entry.num_tokens for entry in trace], dim=1).double().cpu()  # [S, blocks]
            tokens.append(kept)
            share = (kept / torch.tensor(self.dense_tokens, dtype=torch.float64)).mean(dim=1)
            shares.append(share.reshape(len(x), -1).mean(dim=1))  # of a clip's frames
            if self.dense_probs:
                moved = (logits.double().softmax(dim=-1) - self.dense_probs[index]).abs().sum(dim=-1) / 2
                changes.append(moved.cpu())
        return Pass(
            gflops=torch.cat(costs),
            keep=torch.cat(shares),
            tokens=tuple(torch.cat(tokens).mean(dim=0).tolist()),
            changes=torch.cat(changes) if changes else torch.empty(0),
        )

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
