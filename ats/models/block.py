"""A transformer block that samples its tokens, and the loop that runs a network of such blocks.

`ATSBlock` takes over a pre-norm ViT block (timm's names: norm1, attn.{qkv, q_norm, k_norm, proj}, ls1, drop_path1,
norm2, mlp, ...). What it changes in the host:

* tokens are packed (`RaggedTokens`), sequences have different lengths;
* keys and values are projected for all tokens, queries first for CLS alone, which scores the tokens; the other queries
  only for the tokens that stay. The kept queries attend to all tokens of the block's input. These are the numbers of
  "attend N x N, then drop rows" with fewer operations and no N x N matrix;
* stochastic depth drops whole sequences, as in the host, though they no longer have an axis of their own.

It has no parameters or buffers of its own and registers the host's children under the host's names, so state dicts do
not change.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import Tensor, nn

import ats.reduction.reducers  # noqa: F401  registers tome and evit
from ats import kernels
from ats.attention import cls_attention, mean_attention, ragged_attention
from ats.errors import UserError
from ats.models.activation_checkpoint import run_block
from ats.reduction.plan import plan_samplers
from ats.reduction.sampling import (
    BlockSampler,
    Candidates,
    TokenReducer,
    share_scores,
    significance_score,
)
from ats.tokens import KeptTokens, Layout, RaggedTokens


class ATSBlock(nn.Module):
    """A ViT block on ragged tokens; with a `sampler` it keeps some of them, without it all.

    Args:
        host: the block whose children are used. It must not be used otherwise afterwards.
        sampler: what to keep, or how to merge; None for an ordinary block behind an ATS block.
    """

    def __init__(self, host: nn.Module, sampler: BlockSampler | TokenReducer | None) -> None:
        super().__init__()
        for name, child in host.named_children():
            self.add_module(name, child)
        self.sampler = sampler

    def forward(self, tokens: RaggedTokens) -> RaggedTokens:
        """Tokens in, the kept ones out, both after a full block."""
        kept = self.attend(tokens)
        return kept.with_x(kept.x + self.drop_path(self.drop_path2, self.mlp_output(kept.x), kept.layout))

    def attend(self, tokens: RaggedTokens) -> RaggedTokens:
        """The first half of the block: score, sample, and the kept tokens' attention with its residual."""
        x = self.attention_input(tokens.x)
        k, v = self.project_kv(x, tokens)
        samples = isinstance(self.sampler, BlockSampler)
        if not samples:
            kept, kept_x = tokens, x
        else:
            mask = self.sample(tokens, x, k, v)
            kept, index = tokens.keep(mask, slots=min(self.sampler.budget(tokens.slots), tokens.slots))
            kept_x = x.index_select(0, index)
        q, bias = self.project_q(kept_x, kept), self.attention_bias(kept, tokens)
        out = ragged_attention(
            q,
            k,
            v,
            queries=kept.layout,
            keys=tokens.layout,
            scale=self.attn.scale,
            dropout_p=self.attn.attn_drop.p if self.training else 0.0,
            bias=bias,
        )
        out = self.attention_output(out.flatten(1), kept_x)
        attended = kept.with_x(kept.x + self.drop_path(self.drop_path1, out, kept.layout))
        return attended if samples or self.sampler is None else self.reduce(attended, q, k, bias)

    def reduce(self, tokens: RaggedTokens, q: Tensor, k: Tensor, bias: Tensor | None) -> RaggedTokens:
        """Merge or fuse tokens, with the queries, keys and bias that their attention had."""
        return self.sampler.reduce(tokens, q, k, scale=self.attn.scale, bias=bias)

    # What a block computes per token and where it looks up positions: the methods that hosts of other make override.

    def attention_input(self, x: Tensor) -> Tensor:
        """What the attention reads of tokens [T, C]."""
        return self.norm1(x)

    def attention_output(self, out: Tensor, x: Tensor) -> Tensor:
        """The attention's branch [T, C] from its heads' joint output [T, H*D]; x [T, C] is the kept tokens' input."""
        return self.ls1(self.attn.proj_drop(self.attn.proj(out)))

    def mlp_output(self, x: Tensor) -> Tensor:
        """The MLP's branch [T, C] of tokens [T, C]."""
        return self.ls2(self.mlp(self.norm2(x)))

    def attention_bias(self, queries: RaggedTokens | None, keys: RaggedTokens) -> Tensor | None:
        """What is added to the attention's logits, [S, H, Mq, Mk], by position or size; None: nothing. No `queries`:
        of CLS alone.
        """
        return None if keys.key_bias is None else keys.key_bias[:, None, None]

    def project_q(self, x: Tensor, tokens: RaggedTokens | None = None) -> Tensor:
        """Queries [T, H, D] of tokens [T, C], from the first third of the host's joint projection; `tokens` says where
        they are, None that they are CLS.
        """
        qkv, size = self.attn.qkv, self.attn.proj.in_features
        q = F.linear(x, qkv.weight[:size], None if qkv.bias is None else qkv.bias[:size])
        return self.attn.q_norm(q.unflatten(-1, (self.attn.num_heads, -1)))

    def project_kv(self, x: Tensor, tokens: RaggedTokens) -> tuple[Tensor, Tensor]:
        """Keys and values, each [T, H, D], of tokens [T, C]; `tokens` says where they are, for hosts that look at
        neighbours.
        """
        qkv, size = self.attn.qkv, self.attn.proj.in_features
        kv = F.linear(x, qkv.weight[size:], None if qkv.bias is None else qkv.bias[size:])
        k, v = kv.unflatten(-1, (2, self.attn.num_heads, -1)).unbind(1)
        return self.attn.k_norm(k), v

    @torch.no_grad()
    def sample(self, tokens: RaggedTokens, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Score and sample: a mask [S, M] of the tokens to keep, prefix tokens included.

        Args:
            x: [T, C], the normalised tokens. k, v: [T, H, D].
        """
        sampler, layout, num_prefix = self.sampler, tokens.layout, tokens.num_prefix_tokens
        if sampler.score == "mean_attention":
            q, bias = self.project_q(x, tokens), self.attention_bias(tokens, tokens)
        else:
            q, bias = self.project_q(layout.first_rows(x)), self.attention_bias(None, tokens)
        candidates = score_candidates(sampler.score, tokens, q, k, v, scale=self.attn.scale, bias=bias)
        group = tokens.group if sampler.share_frames else 1
        candidates = share_scores(candidates, group) if group > 1 else candidates
        keep = sampler(candidates, slots=tokens.slots, num_prefix_tokens=num_prefix)
        keep = keep.repeat_interleave(group, dim=0) if group > 1 else keep
        return F.pad(keep, (num_prefix, 0), value=True)

    @staticmethod
    def drop_path(host: nn.Module, x: Tensor, layout: Layout) -> Tensor:
        """The host's stochastic depth for packed tokens [T, C]: one draw per sequence."""
        if not host.training or getattr(host, "drop_prob", 0.0) == 0.0:
            return x
        scale = host(x.new_ones(layout.num_sequences, 1))
        return x * scale[layout.sequence]


def score_candidates(
    score: str,
    keys: RaggedTokens,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    queries: Layout | None = None,
    bias: Tensor | None = None,
) -> Candidates:
    """The tokens behind the keys as candidates, with their scores in float32 or better, also under autocast.

    Args:
        score: name in `sampling.SCORES`.
        keys: the tokens that are scored; their values are not looked at.
        q: of CLS [S, H, D]; of all queries [T_q, H, D] for the score mean_attention.
        k, v: [T, H, D].
        queries: layout of q for mean_attention, by default that of the keys.
        bias: added to the logits, [S, H, Mq, M]; Mq is 1 for CLS.
    """
    layout, num_prefix = keys.layout, keys.num_prefix_tokens
    scores = _scores_by_kernels(score, layout, q, k, v, scale) if bias is None else None
    if scores is not None:
        scores = scores[:, num_prefix:]
    else:
        scores = _plain_scores(score, keys, q, k, v, scale=scale, queries=queries, bias=bias)
        if not (layout.full and layout.uniform):
            scores = scores.masked_fill(~layout.mask[:, num_prefix:], 0)
    return Candidates(
        scores,
        lengths=layout.lengths - num_prefix,
        slots=keys.slots - num_prefix,
        num_positions=keys.num_positions,
        position=lambda: layout.pad(keys.position)[:, num_prefix:],
    )


def _scores_by_kernels(score: str, layout: Layout, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor | None:
    """[S, M] of all tokens, prefix tokens included; None where no kernels apply."""
    if score == "mean_attention":
        return None
    value = v if score == "cls_attention_value_norm" else None
    return kernels.cls_scores(q, k, value, keys=layout, scale=scale)


def _plain_scores(
    score: str,
    keys: RaggedTokens,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    queries: Layout | None,
    bias: Tensor | None,
) -> Tensor:
    """[S, M] of the candidates; anything behind the end of a sequence."""
    layout, num_prefix = keys.layout, keys.num_prefix_tokens
    dtype = torch.promote_types(k.dtype, torch.float32)
    with torch.autocast(k.device.type, enabled=False):  # which token wins must not hang on half precision
        q, k = q.to(dtype), k.to(dtype)
        if score == "mean_attention":
            attention = mean_attention(q, k, layout=layout, queries=queries, scale=scale, bias=bias)
        else:
            attention = cls_attention(q, k, keys=layout, scale=scale, bias=None if bias is None else bias[:, :, 0])
        value_norm = None
        if score == "cls_attention_value_norm":
            value_norm = layout.pad(torch.linalg.vector_norm(v.flatten(1), dim=1, dtype=dtype))[:, num_prefix:]
        return significance_score(attention[:, :, num_prefix:], value_norm)


def insert_ats(blocks: nn.ModuleList, samplers: dict[int, BlockSampler], block_type: type[ATSBlock] = ATSBlock) -> None:
    """Replace, in place, the first block with a sampler and all blocks behind it by ATSBlocks of `block_type`; those
    before stay as they are.
    """
    for index in range(min(samplers, default=len(blocks)), len(blocks)):
        blocks[index] = block_type(blocks[index], samplers.get(index))


def run_blocks(
    blocks: Iterable[nn.Module], x: Tensor, *, num_prefix_tokens: int, group: int = 1, layout: str = "packed"
) -> tuple[RaggedTokens, list[KeptTokens]]:
    """Dense tokens [S, N, C] through ordinary blocks, then ATSBlocks.

    Args:
        group: see `RaggedTokens`. layout: name in `tokens.LAYOUTS`.

    Returns:
        The tokens that are left, and the trace: one entry per block with a sampler, in order.
    """
    trace: list[KeptTokens] = []
    tokens = None
    for index, block in enumerate(blocks):
        if not isinstance(block, ATSBlock):
            x = run_block(block, x)
            continue
        if tokens is None:
            tokens = RaggedTokens.from_dense(x, num_prefix_tokens, group=group, layout=layout)
        tokens = run_block(block, tokens)
        if block.sampler is not None:
            trace.append(KeptTokens.of(tokens, index))
    return RaggedTokens.from_dense(x, num_prefix_tokens, group=group) if tokens is None else tokens, trace


def samplers_from_cfg(cfg: CfgNode, *, depth: int, num_prefix_tokens: int) -> dict[int, BlockSampler | TokenReducer]:
    """The samplers that the ATS keys describe for a network of `depth` blocks; none if ATS.ENABLE is off."""
    if not cfg.ATS.ENABLE:
        return {}
    if not cfg.ATS.BLOCKS:
        raise UserError("ATS.BLOCKS is empty: give blocks, e.g. ATS.BLOCKS [3,4,5]; ATS.ENABLE False is without ATS.")
    return plan_samplers(
        depth=depth,
        blocks=cfg.ATS.BLOCKS,
        num_tokens=cfg.ATS.NUM_TOKENS,
        num_prefix_tokens=num_prefix_tokens,
        min_tokens=cfg.ATS.MIN_TOKENS,
        sampler=cfg.ATS.SAMPLER,
        score=cfg.ATS.SCORE,
        rule=cfg.ATS.RULE,
        seed=cfg.ATS.SEED,
        share_frames=cfg.ATS.SHARE_FRAMES,
        reducer_options={
            "r": cfg.TOME.R,
            "prop_attn": cfg.TOME.PROP_ATTN,
            "keep_rate": cfg.EVIT.KEEP_RATE,
            "fuse_token": cfg.EVIT.FUSE_TOKEN,
        },
    )
