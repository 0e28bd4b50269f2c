"""Baselines for inverse transform sampling: the K highest scores, K random tokens, and your own functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from ats.lazy import torch
from ats.options import SEED, option
from ats.reduction.base import REDUCTIONS, Candidates, Reduction, register
from ats.reduction.inverse_transform import InverseTransform
from ats.reduction.sampler import Sampler
from ats.reduction.scores import usable

if TYPE_CHECKING:
    from torch import Tensor


@register("topk")
@dataclass(frozen=True)
class TopK(Sampler):
    """The K highest scores, or all candidates if there are fewer; the earlier token wins a tie."""

    title = "ATS (topk)"

    def choose(self, candidates: Candidates, num_points: int) -> Tensor:
        rank = _descending_rank(usable(candidates.scores, candidates.valid).masked_fill(~candidates.valid, -1))
        return (rank < num_points) & candidates.valid


@register("random")
@dataclass(frozen=True)
class Random(Sampler):
    """K random candidates, uniform. The choice depends on seed, block and original position only, not on the batch."""

    section, title = "ATS", "ATS (random)"
    graphable = False

    seed: int = option(0, "Seed of ATS.SAMPLER random.", within=SEED)

    def choose(self, candidates: Candidates, num_points: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1009 + self.block)
        priority = torch.rand(candidates.num_positions, generator=generator, dtype=torch.float64)
        priority = priority.to(candidates.position.device)
        drawn = priority[candidates.position.clamp(0, candidates.num_positions - 1)]  # padding has no position
        rank = _descending_rank(drawn.masked_fill(~candidates.valid, -1))
        return (rank < num_points) & candidates.valid


def _descending_rank(values: Tensor) -> Tensor:
    order = values.sort(dim=1, descending=True, stable=True).indices
    rank = torch.arange(values.shape[1], device=values.device).repeat(values.shape[0], 1)
    return torch.empty_like(order).scatter(1, order, rank)


def _of_name(name: str, values: dict[str, Any]) -> Reduction:
    """Unpickle a reduction whose class `register_sampler` made."""
    return REDUCTIONS[name](**values)


# A sampler as a function: (candidates, number of sample points, the block's reduction) -> [S, M] bool, True where kept.
SamplerFunction = Callable[[Candidates, int, Sampler], "Tensor"]


def register_sampler(name: str) -> Callable[[SamplerFunction], SamplerFunction]:
    """Make a function available as `ATS.SAMPLER name`: a shortcut for a `Sampler` subclass without options of its own.
    It has the options of all samplers.
    """

    def add(function: SamplerFunction) -> SamplerFunction:
        def choose(self: Sampler, candidates: Candidates, num_points: int) -> Tensor:
            return function(candidates, num_points, self)

        def __reduce__(self: Sampler) -> tuple:
            return _of_name, (name, {f.name: getattr(self, f.name) for f in fields(self)})

        methods: dict[str, Any] = {"choose": choose, "__reduce__": __reduce__, "__doc__": function.__doc__}
        methods |= {"graphable": True, "title": f"ATS ({name})"}
        register(name)(dataclass(frozen=True)(type(name, (InverseTransform, Random), methods)))
        return function

    return add
