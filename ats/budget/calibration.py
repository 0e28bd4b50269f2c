"""Which K meets a budget? `calibrate` finds K of every ATS block for a mean cost on images you give; no labels needed.

    ats.patch(model, blocks=range(3, 12))
    found = ats.calibrate(model, images, gflops=2.9)      # or keep=0.5, or speedup=1.6; the model now has these K
    print(found.yaml())                                   # the same for a config

From the command line: `python tools/calibrate.py --help`. The search itself is `budget.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ats.budget.search import Knobs, NumTokens, Trial, bisect, refine, remembered
from ats.errors import UserError
from ats.flops import dense_gflops
from ats.flops import gflops as count_gflops
from ats.plugin.handle import Patched
from ats.plugin.patch import library_of
from ats.reduction.sampling import REDUCERS, BlockSampler, Candidates

ACCOUNTINGS = ("run", "paper")


@dataclass(frozen=True)
class _KeepAll(BlockSampler):
    """Drops nothing, and remembers how many candidates there are to choose from."""

    slots_seen: dict[int, int] = field(default_factory=dict)

    def __call__(self, candidates: Candidates, *, slots: int, num_prefix_tokens: int) -> Tensor:
        self.slots_seen[self.block] = slots
        return candidates.valid


@dataclass(frozen=True)
class Pass:
    """What one pass over N images measured.

    Attributes:
        gflops: [N] of each image, in the chosen accounting. keep: [N] share of tokens left, mean over the ATS blocks.
        tokens: mean tokens kept in each ATS block. changes: [N] total variation distance between each image's class
            distribution and the dense network's, 0 to 1; empty where it was not asked for.
    """

    gflops: Tensor
    keep: Tensor
    tokens: tuple[float, ...]
    changes: Tensor


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found.

    Attributes:
        blocks: the ATS blocks. num_tokens: K of each of them. depth: blocks of the network.
        found: the pass over the images with these K.
        dense: GFLOPs of the dense network. least, most: mean GFLOPs in reach. accounting: "run" or "paper".
        passes: over the images, that the search took.
    """

    blocks: tuple[int, ...]
    num_tokens: NumTokens
    depth: int
    found: Pass
    dense: float
    least: float
    most: float
    accounting: str
    passes: int

    @property
    def per_block(self) -> list[int | float]:
        """ATS.NUM_TOKENS: an entry for each block of the network, 1.0 where nothing is sampled."""
        return [dict(zip(self.blocks, self.num_tokens, strict=True)).get(block, 1.0) for block in range(self.depth)]

    def yaml(self) -> str:
        """The lines for a config."""
        return f"ATS:\n  ENABLE: true\n  BLOCKS: {list(self.blocks)}\n  NUM_TOKENS: {self.per_block}\n"

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
    wanted = _the_one({"gflops": gflops, "keep": keep, "speedup": speedup})
    if accounting not in ACCOUNTINGS:
        raise UserError(f"accounting {accounting}: choose from {', '.join(ACCOUNTINGS)}.")
    batches = _to_batches(images, batch_size)
    network = _Network(model, batches, accounting, progress=progress, compare=refine_rounds > 0)
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


def _the_one(budgets: dict[str, float | None]) -> tuple[str, float]:
    given = [(name, value) for name, value in budgets.items() if value is not None]
    if len(given) != 1:
        raise UserError(f"Give one budget, not {len(given)}: {', '.join(budgets)}.")
    name, value = given[0]
    if not value > 0:
        raise UserError(f"{name} {value:g}: a budget is above 0.")
    if name == "keep" and value > 1:
        raise UserError(f"keep {value:g}: a share of the tokens is from 0 to 1, and 0.5 is half of them.")
    return name, value


def _search(network: _Network, name: str, value: float, *, refine_rounds: int, tolerance: float) -> Calibration:
    dense = network.dense
    target = dense / value if name == "speedup" else value
    passes: dict[NumTokens, Pass] = {}

    def measure(num_tokens: NumTokens) -> Trial:
        passes[num_tokens] = result = network.run(num_tokens)
        return Trial(
            num_tokens, (result.keep if name == "keep" else result.gflops).mean().item(), tuple(result.changes.tolist())
        )

    measure = remembered(measure)
    knobs = network.knobs
    least, most = measure(knobs.least).cost, measure(knobs.most).cost
    if not least * (1 - tolerance) <= target <= most * (1 + tolerance):
        raise UserError(_out_of_reach(network, name, value, least, most))
    start = bisect(measure, knobs, target, tolerance=tolerance)
    best = refine(measure, knobs, start, target, rounds=refine_rounds, tolerance=tolerance)
    network.set(best.num_tokens)
    return Calibration(
        blocks=network.blocks,
        num_tokens=best.num_tokens,
        depth=network.depth,
        found=passes[best.num_tokens],
        dense=dense,
        least=passes[knobs.least].gflops.mean().item(),
        most=passes[knobs.most].gflops.mean().item(),
        accounting=network.accounting,
        passes=len(passes),
    )


def _out_of_reach(network: _Network, name: str, value: float, least: float, most: float) -> str:
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


def _why_not(model: nn.Module) -> str:
    """Why a network has no K."""
    if any(isinstance(getattr(m, "sampler", None), tuple(REDUCERS.values())) for m in model.modules()):
        return f"The samplers {' and '.join(REDUCERS)} have no K to calibrate: choose another ATS.SAMPLER."
    if hasattr(model, "forward_tokens"):
        return "This network has no ATS block: build it with ATS.ENABLE True and the blocks in ATS.BLOCKS."
    return "This network has no ATS block: call ats.patch(model, blocks=...) first."


def num_blocks(model: nn.Module) -> int:
    """Blocks of a network of this package, as ATS.BLOCKS counts them."""
    if hasattr(model, "stages"):
        return sum(len(stage.blocks) for stage in model.stages)
    if hasattr(model, "ps_layers"):
        return len(model.ps_layers) + len(model.trans_layers)
    return len(getattr(model, "base_model", model).blocks)


class _Network:
    """A network, its knobs, and passes over the images.

    Attributes:
        blocks: the ATS blocks. depth: blocks of the network. knobs: of `budget.py`. dense: GFLOPs of the dense network.
        compare: measure how far the logits are from the dense network's.
    """

    def __init__(
        self, model: nn.Module, batches: list[Tensor], accounting: str, *, progress: bool, compare: bool
    ) -> None:
        self.model, self.batches, self.accounting, self.progress = model, batches, accounting, progress
        modules = [m for m in model.modules() if isinstance(getattr(m, "sampler", None), BlockSampler)]
        if not modules or not hasattr(model, "forward_tokens"):
            raise UserError(_why_not(model))
        self.modules = sorted(modules, key=lambda module: module.sampler.block)
        self.original = [module.sampler for module in self.modules]
        self.blocks = tuple(sampler.block for sampler in self.original)
        self.depth = library_of(model).num_blocks(model) if isinstance(model, Patched) else num_blocks(model)
        self.num_images = sum(map(len, batches))
        self.num_passes = 0
        self.dense = dense_gflops(model, batches[0].shape)
        self.dense_probs: list[Tensor] = []
        self.device = next(model.parameters()).device
        self._probe(compare)

    def _probe(self, compare: bool) -> None:
        """Run with nothing dropped: what the blocks choose from, how many tokens dense is, and the dense logits."""
        seen: dict[int, int] = {}
        with self.restored_after_an_error():
            for module, sampler in zip(self.modules, self.original, strict=True):
                settings = asdict(sampler) | {"num_tokens": 1.0, "slots_seen": seen}
                module.sampler = _KeepAll(**settings)
            for _, logits, trace in self._forward("dense", self.batches if compare else [self.batches[0][:1]]):
                self.dense_probs.append(logits.double().softmax(dim=-1))
                self.dense_tokens = [entry.num_tokens[0].item() for entry in trace]
        self.restore()
        self.knobs = Knobs(
            tuple(seen[block] for block in self.blocks), tuple(sampler.min_tokens for sampler in self.original)
        )
        self.compare = compare

    def set(self, num_tokens: NumTokens) -> None:
        """Give the blocks these K, for good."""
        for module, sampler, k in zip(self.modules, self.original, num_tokens, strict=True):
            module.sampler = replace(sampler, num_tokens=k)
        if isinstance(self.model, Patched) and self.model.ats_state.settings:
            per_block = dict(zip(self.blocks, num_tokens, strict=True))
            settings = [per_block.get(block, 1.0) for block in range(self.depth)]
            self.model.ats_state.settings["num_tokens"] = settings

    def restore(self) -> None:
        """The samplers as they were."""
        for module, sampler in zip(self.modules, self.original, strict=True):
            module.sampler = sampler

    @contextmanager
    def restored_after_an_error(self) -> Iterator[None]:
        """Within it an exception leaves the network's K as they were."""
        try:
            yield
        except BaseException:
            self.restore()
            raise

    def run(self, num_tokens: NumTokens) -> Pass:
        """One pass over all images with these K."""
        for module, sampler, k in zip(self.modules, self.original, num_tokens, strict=True):
            module.sampler = replace(sampler, num_tokens=k)
        self.num_passes += 1
        costs, shares, tokens, changes = [], [], [], []
        for index, (x, logits, trace) in enumerate(self._forward(f"pass {self.num_passes}", self.batches)):
            cost = count_gflops(self.model, trace, x.shape)
            costs.append((cost.as_run if self.accounting == "run" else cost.paper).cpu())
            kept = torch.stack([entry.num_tokens for entry in trace], dim=1).double().cpu()  # [S, blocks]
            tokens.append(kept)
            share = (kept / torch.tensor(self.dense_tokens, dtype=torch.float64)).mean(dim=1)
            shares.append(share.reshape(len(x), -1).mean(dim=1))  # of a clip's frames
            if self.compare:
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
