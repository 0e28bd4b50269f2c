"""A reduction in one file: what inverse transform sampling drops is merged into the nearest kept token."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ats.reduction import Step, register
from ats.reduction.inverse_transform import InverseTransform
from ats.reduction.merging import nearest_kept, sizes, weighted_mean
from ats.tokens import RaggedTokens


@register("merge_dropped")
@dataclass(frozen=True)
class MergeDropped(InverseTransform):
    """Inverse transform sampling; a dropped token is merged into the kept one with the nearest key."""

    def merge(self, step: Step) -> RaggedTokens:
        """Kept tokens become the size-weighted mean of their group; behind, a key counts as often as its size says."""
        size = sizes(step.tokens, torch.promote_types(step.tokens.x.dtype, torch.float32))
        step.taken_by = nearest_kept(step)
        x, size = weighted_mean(step.tokens.x, size, step.taken_by, step.index)
        return replace(step.kept, x=x, size=size, key_bias=size.log())

    def multiply_adds(self, num_in: Tensor, num_out: Tensor, *, head_dim: int, num_heads: int) -> Tensor:
        """The cosines of all tokens with the kept ones."""
        return num_in * num_out * head_dim * num_heads
