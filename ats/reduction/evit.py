"""EViT (Liang et al., Not All Patches are What You Need, ICLR 2022): keep a share of the present tokens, those that CLS
attends to most, and fuse the others into one token, their weighted sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ats.lazy import torch
from ats.options import SHARE, option
from ats.reduction.base import Scheduled, Step, register
from ats.reduction.merging import cls_row, inverse, only, repack, rows_of

if TYPE_CHECKING:
    from torch import Tensor

    from ats.tokens import RaggedTokens


@register("evit")
@dataclass(frozen=True)
class EViT(Scheduled):
    """Keep tokens by the attention of CLS, after the attention."""

    title = "EViT"
    amount = "keep_rate"
    after_attention = True

    keep_rate: float = option(
        0.7,
        "Of ATS.SAMPLER evit: share of the present tokens, prefix tokens excluded, that each of ATS.BLOCKS keeps; or a "
        "list with one entry per block of the network.",
        within=SHARE,
        types=(float, list),
        per_block=True,
        give="a share in (0, 1]",
    )
    fuse_token: bool = option(
        True, "Of ATS.SAMPLER evit: fuse the others into one token, weighted by CLS's attention; False: drop them."
    )

    needs_cls = True

    @property
    def makes_fused(self) -> bool:  # type: ignore[override]
        return self.fuse_token

    @property
    def drops(self) -> bool:
        return not self.fuse_token

    def num_kept(self, lengths: Tensor) -> Tensor:
        """How many of `lengths` tokens are kept; both include prefix tokens but not the fused token."""
        share = self.keep_rate * (lengths.double() - self.num_prefix_tokens)
        return self.num_prefix_tokens + share.ceil().to(lengths.dtype)

    def most_kept(self, max_tokens: int) -> int:
        """`num_kept` of an integer."""
        return self.num_prefix_tokens + math.ceil(self.keep_rate * (max_tokens - self.num_prefix_tokens))

    def limit(self, max_tokens: int) -> int:
        kept = self.most_kept(max_tokens)
        return kept + (self.fuse_token and kept < max_tokens)

    def merge(self, step: Step) -> RaggedTokens:
        """Kept tokens in descending order of CLS's attention, then the fused token.

        Later blocks treat the fused token like any other. If tokens have sizes, its size is the sum of theirs, for
        later reductions that weight by size. Gradients flow through the fusion weights; dropout on the attention
        weights does not affect them.
        """
        tokens, layout, num_prefix = step.kept, step.kept.layout, self.num_prefix_tokens
        num_patches = tokens.max_tokens - num_prefix
        if math.ceil(self.keep_rate * num_patches) == num_patches:  # depends on the configuration only
            return tokens  # every sequence keeps all tokens, in any batch
        score = cls_row(step).mean(dim=1)  # [S, N]
        ranked = score[:, num_prefix:].detach().masked_fill(~layout.mask[:, num_prefix:], -1)
        order = ranked.sort(dim=1, descending=True, stable=True).indices + num_prefix
        order = torch.cat([torch.arange(num_prefix, device=order.device).expand(order.shape[0], -1), order], dim=1)
        x, position, size, key_bias = (
            None if t is None else rows_of(layout.pad(t), order)
            for t in (tokens.x, tokens.position, tokens.size, tokens.key_bias)
        )
        if torch.compiler.is_compiling():  # engines would compute this in float32, where some shares round differently
            table = [self.most_kept(length) for length in range(tokens.max_tokens + 1)]
            lengths = torch.tensor(table, device=order.device)[layout.lengths]
        else:
            lengths = self.num_kept(layout.lengths)
        num_kept = lengths
        if self.fuse_token:
            column = torch.arange(layout.longest, device=order.device)
            fuses = (column >= lengths[:, None]) & layout.mask
            last = (column == lengths[:, None]) & fuses  # the row after the last kept one
            weight = (score.gather(1, order) * fuses)[..., None]
            x = torch.where(last[..., None], (x * weight).sum(dim=1, keepdim=True).to(x.dtype), x)
            position = position.masked_fill(last, -1)
            size = None if size is None else torch.where(last, (size * fuses).sum(dim=1, keepdim=True), size)
            key_bias = None if key_bias is None else key_bias.masked_fill(last, 0)
            lengths = lengths + last.sum(dim=1)
        limit = self.limit(layout.longest) if isinstance(layout.longest, int) else only(lengths, layout.longest)
        kept = repack(
            tokens,
            None if layout.uniform and layout.full else lengths,
            max_tokens=self.limit(tokens.max_tokens),
            x=x[:, :limit],
            position=position[:, :limit],
            size=None if size is None else size[:, :limit],
            key_bias=None if key_bias is None else key_bias[:, :limit],
        )
        if step.follows:
            place, start = inverse(order), kept.layout.start[:, None]
            others = start + num_kept[:, None] if self.fuse_token else torch.full_like(start, -1)
            step.taken_by = layout.unpad(torch.where(place < num_kept[:, None], start + place, others))
        return replace(kept, has_fused=tokens.has_fused or self.fuse_token)

    def multiply_adds(self, num_in: Tensor, num_out: Tensor, *, head_dim: int, num_heads: int) -> Tensor:
        """Of the attention row of CLS."""
        return num_in * head_dim * num_heads

    @classmethod
    def usual_blocks(cls, depth: int) -> list[int]:
        """After a quarter, a half and three quarters of the depth."""
        return sorted({depth * quarter // 4 for quarter in (1, 2, 3)})

    def scaled(self, scale: float, max_tokens: int, stagger: float) -> EViT:
        return replace(self, keep_rate=min(max(1 - (1 - scale) * self.schedule_factor, 1e-3), 1.0))
