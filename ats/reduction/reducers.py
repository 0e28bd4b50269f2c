"""Two other parameter-free ways to have fewer tokens, for comparison: ToMe merges tokens, EViT fuses those it drops.

    ToMe   Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023
    EViT   Liang et al., Not All Patches are What You Need: Expediting Vision Transformers via Token Reorganizations,
           ICLR 2022

Both let every token attend as in the dense block and have fewer of them from behind the attention's residual on. How
many is a matter of the configuration alone, the same for every image. A reducer is `ATS.SAMPLER tome` or `evit` and
stands where a `BlockSampler` stands; `ATSBlock` calls `reduce`.

Shapes: S sequences, N tokens of each, P prefix tokens (CLS, distillation), H heads, D channels of a head, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ats.attention import cls_attention
from ats.errors import UserError
from ats.reduction.sampling import register_reducer
from ats.tokens import Layout, RaggedTokens


class Matching(NamedTuple):
    """Which tokens merge: r of N in each sequence.

    Attributes:
        left: [S, N - r] positions of the tokens that are left, in their new order.
        source: [S, r] positions of the tokens that go.
        target: [S, r] where they go, as an index into `left`.
    """

    left: Tensor
    source: Tensor
    target: Tensor


@torch.no_grad()
def bipartite_soft_matching(metric: Tensor, r: int, *, num_prefix_tokens: int = 1) -> Matching:
    """ToMe, section 3 and its appendix D: tokens at even positions (A) and at odd ones (B); each of A proposes to the
    one of B it is most similar to (cosine), and the r best proposals merge. Prefix tokens neither propose nor are
    proposed to. The new order is the prefix, the rest of A, the rest of B: not spatial, and it decides the next split.

    Args:
        metric: [S, N, D] what is compared.
        r: 0 <= r <= (N - P) // 2.
    """
    num_a, num_b = (metric.shape[1] + 1) // 2, metric.shape[1] // 2
    prefix_a, prefix_b = (num_prefix_tokens + 1) // 2, num_prefix_tokens // 2
    unit = metric / metric.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(metric.dtype).tiny)
    similarity = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)  # [S, A, B]
    similarity[:, :prefix_a] = -torch.inf
    similarity[:, :, :prefix_b] = -torch.inf
    best, partner = similarity.max(dim=2)
    order = best.argsort(dim=1, descending=True, stable=True)
    merged, rest = order[:, :r], order[:, r:].sort(dim=1).values  # the prefix of A comes first in `rest`
    positions = torch.arange(metric.shape[1], device=metric.device).expand(len(metric), -1)
    b = positions[:, 1::2]
    left = torch.cat([positions[:, :num_prefix_tokens], 2 * rest[:, prefix_a:], b[:, prefix_b:]], dim=1)
    target = partner.gather(1, merged) - prefix_b + left.shape[1] - (num_b - prefix_b)
    assert r <= num_a - prefix_a
    return Matching(left, 2 * merged, target)


def merge_tokens(x: Tensor, size: Tensor, matching: Matching) -> tuple[Tensor, Tensor]:
    """The mean of every group of tokens that become one, weighted by how many original tokens each stands for.

    Args:
        x: [S, N, C]. size: [S, N], float32 or better.

    Returns:
        [S, N - r, C] and the new sizes [S, N - r].
    """
    num_sequences, num_tokens, _ = x.shape
    num_left = num_tokens - matching.source.shape[1]
    sequences = torch.arange(num_sequences, device=x.device)[:, None]
    left, source = ((sequences * num_tokens + index).flatten() for index in (matching.left, matching.source))
    target = (sequences * num_left + matching.target).flatten()
    flat, weight = x.flatten(0, 1), size.flatten()
    weight_left, weight_source = weight[left], weight[source]
    total = flat.index_select(0, left) * weight_left[:, None]
    total = total.index_add(0, target, flat.index_select(0, source) * weight_source[:, None])
    new_size = weight_left.index_add(0, target, weight_source)
    merged = (total / new_size[:, None]).to(x.dtype)
    return merged.unflatten(0, (num_sequences, -1)), new_size.unflatten(0, (num_sequences, -1))


@register_reducer("tome")
@dataclass(frozen=True)
class ToMe:
    """Token merging in one block.

    Attributes:
        block: index of the block in the network.
        num_prefix_tokens: P.
        r: tokens that merge away; at most half of those that are not prefix tokens.
        prop_attn: proportional attention: from the first merge on the logarithm of a key's size is added to its logits.
    """

    block: int
    num_prefix_tokens: int
    r: int = 8
    prop_attn: bool = True

    @classmethod
    def plan(
        cls,
        *,
        block: int,
        depth: int,
        num_prefix_tokens: int,
        options: Mapping[str, object],
        spell: Callable[[str], str],
    ) -> ToMe:
        """See `REDUCERS`; options `r`, an int or a list with one per block of the network, `prop_attn`."""
        r = _of_block(spell("r"), options.get("r", cls.r), block, depth)
        if isinstance(r, bool) or r < 0 or r != int(r):
            raise UserError(f"{spell('r')} {r} (block {block}): give the number of tokens to merge away, 0 or more.")
        return cls(block, num_prefix_tokens, int(r), options.get("prop_attn", cls.prop_attn))

    def num_merged(self, num_tokens: int) -> int:
        """Tokens that merge away of `num_tokens`, prefix tokens counted."""
        return max(min(self.r, (num_tokens - self.num_prefix_tokens) // 2), 0)

    def reduce(self, tokens: RaggedTokens, q: Tensor, k: Tensor, *, scale: float, bias: Tensor | None) -> RaggedTokens:
        """Merge tokens that are similar in their keys' mean over the heads; see `TokenReducer`."""
        num_tokens = tokens.layout.longest
        r = self.num_merged(num_tokens)
        if r == 0:
            return tokens
        dtype = torch.promote_types(k.dtype, torch.float32)
        with torch.autocast(k.device.type, enabled=False):
            metric = tokens.layout.pad(k.detach().to(dtype).mean(dim=1))
            matching = bipartite_soft_matching(metric, r, num_prefix_tokens=self.num_prefix_tokens)
            x = tokens.layout.pad(tokens.x)
            size = x.new_ones(x.shape[:2], dtype=dtype) if tokens.size is None else tokens.layout.pad(tokens.size)
            x, size = merge_tokens(x, size, matching)
        position = tokens.layout.pad(tokens.position).gather(1, matching.left)
        return replace(
            _with_rows(tokens, x, position), size=size.flatten(), key_bias=size.log() if self.prop_attn else None
        )

    def multiply_adds(self, num_tokens: Tensor, head_dim: int, num_heads: int) -> Tensor:
        """Of the similarities, [S] for `num_tokens` [S]."""
        num_a = torch.ceil(num_tokens / 2)
        merges = (num_tokens - self.num_prefix_tokens >= 2) & (self.r > 0)
        return merges * num_a * (num_tokens - num_a) * head_dim


@register_reducer("evit")
@dataclass(frozen=True)
class EViT:
    """The tokens that CLS attends to most in one block, and one that is the weighted sum of the others.

    Attributes:
        block: index of the block in the network.
        num_prefix_tokens: P.
        keep_rate: share of the tokens present, prefix tokens not counted, that stay.
        fuse_token: add up the others, each times the attention CLS pays to it, in a token behind the last; it counts
            as any other in the blocks behind. False: drop them.
    """

    block: int
    num_prefix_tokens: int
    keep_rate: float = 0.7
    fuse_token: bool = True

    @classmethod
    def plan(
        cls,
        *,
        block: int,
        depth: int,
        num_prefix_tokens: int,
        options: Mapping[str, object],
        spell: Callable[[str], str],
    ) -> EViT:
        """See `REDUCERS`; options `keep_rate`, a number or a list with one per block of the network, and
        `fuse_token`.
        """
        if num_prefix_tokens == 0:
            raise UserError(f"{spell('sampler')} evit needs a CLS token and this network has none.")
        keep_rate = _of_block(spell("keep_rate"), options.get("keep_rate", cls.keep_rate), block, depth)
        if not 0 < keep_rate <= 1:
            raise UserError(f"{spell('keep_rate')} {keep_rate} (block {block}): give a share in (0, 1].")
        return cls(block, num_prefix_tokens, keep_rate, options.get("fuse_token", cls.fuse_token))

    def num_kept(self, num_tokens: int) -> int:
        """Tokens that stay of `num_tokens`, prefix tokens counted in both, the fused token in neither."""
        return self.num_prefix_tokens + math.ceil(self.keep_rate * (num_tokens - self.num_prefix_tokens))

    def reduce(self, tokens: RaggedTokens, q: Tensor, k: Tensor, *, scale: float, bias: Tensor | None) -> RaggedTokens:
        """Keep by the attention of CLS, in descending order; see `TokenReducer`.

        Gradients flow through the weights of the fused token. Dropout on the attention weights does not reach them.
        """
        layout, num_prefix = tokens.layout, self.num_prefix_tokens
        num_kept = self.num_kept(layout.longest)
        if num_kept == layout.longest:
            return tokens
        dtype = torch.promote_types(k.dtype, torch.float32)
        with torch.autocast(k.device.type, enabled=False):
            row_bias = None if bias is None else bias[:, :, 0]
            cls_row = cls_attention(q[layout.start].to(dtype), k.to(dtype), keys=layout, scale=scale, bias=row_bias)
        score = cls_row[:, :, num_prefix:].mean(dim=1)  # [S, N - P]
        order = score.detach().sort(dim=1, descending=True, stable=True).indices
        kept, others = order[:, : num_kept - num_prefix], order[:, num_kept - num_prefix :]
        x, position = layout.pad(tokens.x), layout.pad(tokens.position)
        prefix = torch.arange(num_prefix, device=x.device).expand(len(x), -1)
        stay = torch.cat([prefix, kept + num_prefix], dim=1)
        new_x, new_position = _rows(x, stay), position.gather(1, stay)
        if self.fuse_token:
            fused = (_rows(x, others + num_prefix) * score.gather(1, others)[..., None]).sum(dim=1, keepdim=True)
            new_x = torch.cat([new_x, fused.to(x.dtype)], dim=1)
            new_position = torch.cat([new_position, new_position.new_full((len(x), 1), -1)], dim=1)
        return replace(_with_rows(tokens, new_x, new_position), has_fused=tokens.has_fused or self.fuse_token)

    def multiply_adds(self, num_tokens: Tensor, head_dim: int, num_heads: int) -> Tensor:
        """Of the row of CLS, [S] for `num_tokens` [S]."""
        candidates = num_tokens - self.num_prefix_tokens
        return (torch.ceil(self.keep_rate * candidates) < candidates) * num_tokens * head_dim * num_heads


def _of_block(name: str, value: object, block: int, depth: int) -> object:
    """The entry of a value per block, or the one value of all blocks."""
    if isinstance(value, (int, float)):
        return value
    if len(value) != depth:
        raise UserError(f"{name} has {len(value)} entries, the network {depth} blocks: give one number, or {depth}.")
    return value[block]


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """[S, N, C] -> [S, M, C], the rows `index` [S, M] of each sequence."""
    start = torch.arange(len(x), device=x.device)[:, None] * x.shape[1]
    return x.flatten(0, 1).index_select(0, (start + index).flatten()).unflatten(0, index.shape)


def _with_rows(tokens: RaggedTokens, x: Tensor, position: Tensor) -> RaggedTokens:
    """Sequences of one length that are left of `tokens`: x [S, M, C], position [S, M]."""
    num_sequences, length = position.shape
    lengths = torch.full_like(tokens.layout.lengths, length)
    layout = Layout(lengths, total=num_sequences * length, longest=length, kind=tokens.layout.kind)
    return replace(tokens, x=x.flatten(0, 1), layout=layout, position=position.flatten(), slots=length)
