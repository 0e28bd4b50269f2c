"""ToMe (Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023): similar tokens merge after the attention.

The configuration fixes how many, the same for all sequences of one length.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ats.lazy import torch
from ats.options import FROM_0, option
from ats.reduction.base import Scheduled, Step, register
from ats.reduction.merging import bipartite_soft_matching, repack_matched, sizes

if TYPE_CHECKING:
    from torch import Tensor

    from ats.tokens import RaggedTokens


@register("tome")
@dataclass(frozen=True)
class ToMe(Scheduled):
    """Token merging in one block."""

    title = "ToMe"
    amount = "r"
    after_attention = True

    r: int = option(
        8,
        "Of ATS.SAMPLER tome: tokens to merge away in each of ATS.BLOCKS (at most half of those present); or a list "
        "with one entry per block of the network.",
        within=FROM_0,
        types=(int, list),
        per_block=True,
        give="the number of tokens to merge away, 0 or more",
    )
    prop_attn: bool = option(
        True, "Of ATS.SAMPLER tome: proportional attention, which adds the log of a key's size to its logits."
    )

    @property
    def size_factor(self) -> float:
        return float(self.prop_attn)

    def num_merged(self, num_tokens: int) -> int:
        """How many of `num_tokens` tokens, prefix tokens included, merge away."""
        return max(min(self.r, (num_tokens - self.num_prefix_tokens) // 2), 0)

    def limit(self, max_tokens: int) -> int:
        return max_tokens - self.num_merged(max_tokens)

    def merge(self, step: Step) -> RaggedTokens:
        """Merge tokens whose keys, averaged over the heads, are similar."""
        tokens, layout = step.kept, step.kept.layout
        if self.num_merged(tokens.max_tokens) == 0:
            return tokens  # no sequence has any to merge, in any batch
        lengths = None if layout.uniform and layout.full else layout.lengths
        dtype = torch.promote_types(step.k.dtype, torch.float32)
        with torch.autocast(step.k.device.type, enabled=False):
            metric = layout.pad(step.k.detach().to(dtype).mean(dim=1))
            matching = bipartite_soft_matching(
                metric, self.r, num_prefix_tokens=self.num_prefix_tokens, lengths=lengths
            )
            return repack_matched(
                step,
                matching,
                layout.pad(sizes(tokens, dtype)),
                max_tokens=self.limit(tokens.max_tokens),
                size_factor=self.size_factor,
                uniform=lengths is None,
            )

    def multiply_adds(self, num_in: Tensor, num_out: Tensor, *, head_dim: int, num_heads: int) -> Tensor:
        """Of the similarities."""
        num_a = torch.ceil(num_in / 2)
        return num_a * (num_in - num_a) * head_dim

    @classmethod
    def usual_blocks(cls, depth: int) -> list[int]:
        return list(range(depth))

    def scaled(self, scale: float, max_tokens: int, stagger: float) -> ToMe:
        r = (1 - scale) * (max_tokens // 2) * self.schedule_factor
        return replace(self, r=max(math.floor(r + stagger), 0))
