"""Which K meets a budget? `calibrate` sets K of every ATS block so that the mean cost on your images meets it; no
labels needed. Other reductions have another amount in place of K: r for ToMe, the keep rate for EViT.

    ats.patch(model, blocks=range(3, 12))
    found = ats.calibrate(model, images, gflops=2.9)      # or keep=0.5, or speedup=1.6; the model now has these K
    found = ats.calibrate(model, images, latency_ms=20)   # or speedup=1.5, measure="time": also finds the blocks
    print(found.yaml())                                   # the same for a config

From the command line: `python tools/calibrate.py --help`. `search.py` searches for a cost, `timing.py` for a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import groupby
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from ats.budget.network import Network, Pass, lists, per_block
from ats.budget.search import Knobs, Measure, Setting, Trial, amounts, bisect, refine
from ats.budget.timing import Goal, Timing, calibrate_time
from ats.errors import UserError, rounded
from ats.reduction import Reduction
from ats.reduction.base import options_of

ACCOUNTINGS = ("run", "paper")
MEASURES = ("gflops", "time")


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found."""

    setting: Setting  # the reductions of the blocks that lose tokens
    depth: int  # blocks of the network
    found: Pass  # over the images, with these reductions
    dense: float  # GFLOPs of the dense network
    least: float | None  # mean GFLOPs in reach; None: the budget is a time
    most: float | None
    accounting: str  # "run" or "paper"
    passes: int  # over the images, in the search
    timing: Timing | None = None  # with a time budget: what was timed

    @property
    def is_dense(self) -> bool:
        """Whether the model was left dense; `timing.why_dense` says why."""
        return not self.setting

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
        return per_block(self.setting, self.depth)

    def yaml(self, *, as_stages: bool = False) -> str:
        """Lines for a config. If all blocks share one reduction: blocks and amounts, for a config that has the other
        options. Else ATS.STAGES with all options. ATS.ENABLE False if the model was left dense.

        Args:
            as_stages: always write ATS.STAGES, for a config that has it.
        """
        if self.is_dense:
            return yaml.safe_dump({"ATS": {"ENABLE": False}})
        stages = to_stages(self.setting, self.depth)
        kind, lines = self.setting[0], {"ATS": dict[str, Any](ENABLE=True)}
        if as_stages or len(stages) > 1:
            lines["ATS"]["STAGES"] = stages
        else:
            keys = {option.name: option.key.split(".") for option in options_of(type(kind))}
            sampler = {} if kind.name == "inverse_transform" else {"SAMPLER": kind.name}
            lines["ATS"] |= {"BLOCKS": list(self.blocks)} | sampler
            if getattr(kind, "schedule", "flat") != "flat":  # the amounts follow it already
                lines["ATS"]["SCHEDULE"] = "flat"
            varied = {name: getattr(kind, name) for options in type(kind).variants() for name in options}
            for option, value in (lists(self.setting, self.depth) | varied).items():
                section, name = keys[option]
                lines.setdefault(section, {})[name] = value
        return yaml.safe_dump(lines, sort_keys=False, default_flow_style=None, width=10**6)

    def spread(self) -> dict[str, float]:
        """GFLOPs over the images: mean, its standard error, standard deviation, smallest, quantiles, largest."""
        values = self.found.gflops
        is_constant = len(values) < 2 or torch.equal(values, values[:1].expand_as(values))
        std = 0.0 if is_constant else values.std(correction=1).item()  # for equal values it would be round-off
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
    latency_ms: float | None = None,
    measure: str | None = None,
    accounting: str = "run",
    refine_rounds: int = 0,
    batch_size: int = 32,
    tolerance: float = 0.002,
    progress: bool = True,
    timed_batch_size: int = 1,
    threads: int | None = None,
) -> Calibration:
    """Set K of every ATS block of `model`, in place, so that the mean over `images` meets a budget. With a time budget,
    blocks may stop dropping tokens where that is faster; if all do, the model is dense.

    Args:
        model: any network of `ats.models` with ATS, or a model after `ats.patch`, on any device.
        images: [N, 3, H, W] or clips [N, 3, T, H, W], as the network takes them; or batches of them, e.g. a DataLoader,
            all held in memory. Of a tuple or list, such as (images, labels), the first element is taken; of a
            processor's dictionary, `pixel_values`. Give a few hundred; `Calibration.spread` has the standard error of
            the mean.
        gflops: mean GFLOPs per image. keep: mean share of tokens left after the ATS blocks. speedup: the dense
            network's GFLOPs over the mean. latency_ms: milliseconds per batch on this machine. Give one of the four.
        measure: what `speedup` is a ratio of: "gflops" (default) or "time". `latency_ms` is always time.
        accounting: what `gflops` and `speedup` count: "run", what is computed; "paper", what the paper's tables count.
        refine_rounds: rounds of moving tokens between blocks to change the logits less at the same cost; each takes
            about 7 passes per ATS block.
        tolerance: relative; the search stops when the mean is this close. Times use `timing.TOLERANCE`.
        progress: show a bar if the console is a terminal.
        timed_batch_size: images per timed batch. threads: CPU threads for timing; None: leave them.

    Returns:
        What was found; the model already has it.

    Raises:
        UserError: no ATS in the model, no images, not exactly one budget, or one out of reach (the message has the
            range). The model's K are then unchanged.
    """
    name, value = _one_budget({"gflops": gflops, "keep": keep, "speedup": speedup, "latency_ms": latency_ms})
    by_time = _is_time(name, measure, refine_rounds)
    if accounting not in ACCOUNTINGS:
        raise UserError(f"accounting {accounting}: choose from {', '.join(ACCOUNTINGS)}.")
    batches = _to_batches(images, batch_size)
    for option, count in {"timed_batch_size": timed_batch_size, "threads": threads}.items():
        if count is not None and (type(count) is not int or count < 1):
            raise UserError(f"{option} {count}: give a whole number from 1.")
    network = Network(model, batches, accounting, progress=progress, compare=refine_rounds > 0)
    with network.restored_after_an_error():
        if by_time:
            return _search_time(network, Goal(name, value), batch_size=timed_batch_size, threads=threads)
        return _search(network, name, value, refine_rounds=refine_rounds, tolerance=tolerance)


def _to_batches(images: Tensor | Iterable, batch_size: int) -> list[Tensor]:
    """The batches on the CPU, images only."""
    wanted = "Give [N, 3, H, W] (clips: [N, 3, T, H, W]) or batches of that, as a DataLoader yields them"
    batches = []
    if isinstance(images, Mapping):  # of one batch
        images = images.get("pixel_values", images)
    for batch in images.split(batch_size) if isinstance(images, Tensor) else images:
        if isinstance(batch, Mapping):
            batch = batch.get("pixel_values", batch)
        x = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
        if not isinstance(x, Tensor):
            raise UserError(f"images: a {type(x).__name__} is not a batch of images. {wanted}.")
        if x.ndim not in (4, 5):
            hint = "; torch.stack makes a batch of single images" if x.ndim == 3 else ""
            raise UserError(f"images: a tensor of shape {list(x.shape)} is not a batch of images. {wanted}{hint}.")
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


def _is_time(name: str, measure: str | None, refine_rounds: int) -> bool:
    """Whether the budget is a time. Raises a UserError for arguments that do not go together."""
    if measure not in (None, *MEASURES):
        raise UserError(f"measure {measure}: choose from {', '.join(MEASURES)}.")
    if (name == "latency_ms" and measure == "gflops") or (name in ("gflops", "keep") and measure == "time"):
        raise UserError(f"measure {measure} does not go with {name}: leave it out.")
    by_time = name == "latency_ms" or measure == "time"
    if by_time and refine_rounds:
        raise UserError("Refining keeps the GFLOPs, not the time: leave it out with a time budget.")
    return by_time


def _search_time(network: Network, goal: Goal, *, batch_size: int, threads: int | None) -> Calibration:
    setting, found, timing = calibrate_time(network, goal, batch_size=batch_size, threads=threads)
    network.set(setting)
    return Calibration(
        setting=setting,
        depth=network.depth,
        found=found,
        dense=network.dense,
        least=None,
        most=None,
        accounting=network.accounting,
        passes=network.num_passes,
        timing=timing,
    )


def to_stages(setting: Sequence[Reduction], depth: int) -> list[dict[str, object]]:
    """Entries of ATS.STAGES that give the blocks these reductions."""
    groups = groupby(setting, key=lambda r: replace(r, block=0, **dict.fromkeys(_differing(r), 1)))  # type: ignore[arg-type]
    return [_stage(list(own), depth) for _, own in groups]


def _differing(reduction: Reduction) -> list[str]:
    """The options whose values may differ between the blocks of a stage."""
    return [option.name for option in options_of(type(reduction)) if option.about.per_block]


def _stage(setting: Sequence[Reduction], depth: int) -> dict[str, object]:
    """An entry of ATS.STAGES: blocks that differ only in options that take a list."""
    first = setting[0]
    options = {
        option.name.upper(): getattr(first, option.name)
        for option in options_of(type(first))
        if not option.about.networks or getattr(first, option.name) != option.default
    }
    if "SCHEDULE" in options:
        options["SCHEDULE"] = "flat"  # the amounts follow it already
    blocks = [reduction.block for reduction in setting]
    own = {name.upper(): values for name, values in lists(setting, depth).items()}
    return {"SAMPLER": first.name, "BLOCKS": blocks} | options | own


def nearest(
    model: nn.Module,
    x: Tensor,
    gflops: float,
    *,
    accounting: str = "run",
    batch_size: int = 128,
    together: bool = True,
) -> float:
    """Set the amounts of all blocks of `model`, in place, so that the mean over images x is as near as possible to a
    budget, in or out of reach. For comparisons at equal cost.

    Args:
        x: [N, 3, H, W] or clips. gflops: mean per image. together: one amount for all blocks; False: blocks may differ
            by one, which gets nearer.

    Returns:
        Mean GFLOPs reached.
    """
    network = Network(model, _to_batches(x, batch_size), accounting, progress=False, together=together)
    with network.restored_after_an_error():

        @cache
        def measure(setting: Setting) -> Trial:
            found = network.run(setting)
            return Trial(found.setting, found.gflops.mean().item())

        best = bisect(measure, network.knobs, gflops)[1]
    network.set(best.setting)
    return best.cost


def _search(network: Network, name: str, value: float, *, refine_rounds: int, tolerance: float) -> Calibration:
    dense = network.dense
    target = dense / value if name == "speedup" else value
    passes: dict[Setting, Pass] = {}

    @cache
    def measure(setting: Setting) -> Trial:
        result = network.run(setting)
        passes[result.setting] = result
        cost = (result.keep if name == "keep" else result.gflops).mean().item()
        return Trial(result.setting, cost, tuple(result.changes.tolist()))

    knobs = network.knobs
    least, most = measure(knobs.least), measure(knobs.most)
    if not least.cost * (1 - tolerance) <= target <= most.cost * (1 + tolerance):
        raise UserError(_out_of_reach(network, name, value, least.cost, most.cost))
    start = bisect(measure, knobs, target, tolerance=tolerance)
    if refine_rounds:
        knobs, start = _best_variant(measure, knobs, start, target, tolerance=tolerance)
    best = refine(measure, knobs, start, target, rounds=refine_rounds, tolerance=tolerance)
    network.set(best.setting)
    return Calibration(
        setting=best.setting,
        depth=network.depth,
        found=passes[best.setting],
        dense=dense,
        least=passes[least.setting].gflops.mean().item(),
        most=passes[most.setting].gflops.mean().item(),
        accounting=network.accounting,
        passes=len(passes),
    )


def _best_variant(
    measure: Measure, knobs: Knobs, start: tuple[float, Trial], target: float, *, tolerance: float
) -> tuple[Knobs, tuple[float, Trial]]:
    """The variant (`Reduction.variants`, or none) whose logits are surely nearest to the dense network's at the same
    cost.
    """
    kinds = {type(reduction) for reduction in knobs.reductions}
    for options in kinds.pop().variants() if len(kinds) == 1 else ():
        other = replace(knobs, reductions=tuple(replace(own, **options) for own in knobs.reductions))
        found = bisect(measure, other, target, tolerance=tolerance)
        if found[1].cost <= target * (1 + tolerance) and found[1].surely_nearer_than(start[1]):
            knobs, start = other, found
    return knobs, start


def _out_of_reach(network: Network, name: str, value: float, least: float, most: float) -> str:
    units = {"gflops": "mean GFLOPs", "keep": "as share of the tokens", "speedup": "times fewer GFLOPs than dense"}
    low, high = (network.dense / most, network.dense / least) if name == "speedup" else (least, most)
    dense = "" if name == "keep" else f" (dense: {rounded(network.dense)} GFLOPs)"
    return (
        f"{name} {rounded(value)} cannot be met with ATS in blocks {', '.join(map(str, network.blocks))}: on these "
        f"{network.num_images} images they reach {rounded(low)} to {rounded(high)} {units[name]}{dense}. "
        f"Give {name} in between; to spend less, {network.how_to_keep_less} (ATS.BLOCKS); to spend more, sample in "
        "fewer blocks or later ones."
    )
