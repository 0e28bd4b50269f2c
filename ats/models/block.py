"""A transformer block that drops or merges tokens, and the one loop that runs a network's blocks.

`ATSBlock` replaces a pre-norm ViT block with timm's names: norm1, attn.{qkv, q_norm, k_norm, proj}, ls1, drop_path1,
norm2, mlp, ... It differs from that block in three ways:

* tokens are packed (`RaggedTokens`): sequences have different lengths;
* it projects keys and values of all tokens, the query of CLS to score them, then the queries of the kept tokens only.
  Kept queries attend to all tokens of the block's input. The result equals "attend N x N, then drop rows", with fewer
  operations and no N x N matrix;
* stochastic depth still drops whole sequences, although packed tokens have no sequence axis.

It has no parameters or buffers of its own and keeps the base block's names, so state dicts do not change. Blocks of
other families (MViT, CvT, timm, transformers) override its hooks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ats.attention import ragged_attention
from ats.errors import UserError
from ats.models.activation_checkpoint import run_block
from ats.models.weights import Projected, linear_part, projects_parts
from ats.reduction import Candidates, Reduction, Step
from ats.reduction.merging import size_bias
from ats.reduction.scores import average_over_frames, score_candidates
from ats.restore import Places
from ats.tokens import BlockRecord, KeptTokens, Layout, RaggedTokens

Clock = Callable[[str], None]  # called at the start of each part of the block, with the part's name


class ATSBlock(nn.Module):
    """A ViT block on ragged tokens. Without a `reduction` it keeps all of them.

    Args:
        base_block: the block to replace. It shares its modules with this one; do not use it afterwards.
        reduction: how to drop or merge tokens; None for an ordinary block after an ATS block.
        index: index of the block in the network; by default the reduction's.
    """

    record_scores: bool = False  # keep each pass's `Candidates` in its `BlockRecord`
    record_places: bool = False  # and which token stands for each patch; set it in the first ATS block
    # (candidates, reduction) -> mask that replaces the reduction's selection, which still runs.
    imposed: Callable[[Candidates, Any], Tensor] | None = None
    clock: Clock | None = None  # set by `benchmark/breakdown.py`
    ats_classes: tuple[type, type] | None = None  # of the block it replaced, and its own, see `change_reductions`

    def __init__(self, base_block: nn.Module, reduction: Reduction | None, index: int | None = None) -> None:
        super().__init__()
        self.__dict__.update(base_block.__dict__)  # modules, and attributes from the block's configuration
        self.reduction = reduction
        self.index = index if index is not None else getattr(reduction, "block", 0)

    def forward(self, tokens: RaggedTokens) -> RaggedTokens:
        """Run the whole block: its input tokens -> its kept tokens."""
        if self.record_places and tokens.places is None:
            tokens = Places.begin(tokens.with_x(tokens.x), "nearest")
        step, attended = self.attend(self.prepare(tokens))
        record = self._record(step, attended)
        if tokens.places is not None:
            attended.places = tokens.places.after(step, attended, self.reduction)
            record.places = attended.places if self.record_places else None
        del step  # frees keys and values: the MLP needs the memory
        self._begin("rest")
        out = self.finish(attended)
        out.record = record
        return out

    def attend(self, tokens: RaggedTokens) -> tuple[Step, RaggedTokens]:
        """The first half of the block: score, select, attend from the kept tokens, add the residual.

        All tensor work before the data-dependent shape is in here, not in `forward`. torch.compile breaks both graphs
        there, and this leaves `forward` nothing to compile before the break.
        """
        self._begin("qkv")
        reduction = self.reduction
        if reduction is not None and tokens.size is not None and reduction.size_factor is not None:
            tokens = tokens.with_x(tokens.x)
            tokens.key_bias = size_bias(tokens.size, reduction.size_factor)
        step = self.project(tokens)
        if reduction is not None and reduction.selects:
            self._begin("scoring and sampling")
            step.mask, max_tokens = self.select(step)
            step.kept, step.index = step.queries.keep(step.mask, max_tokens=max_tokens)
        merges = reduction is not None and reduction.merges
        if merges and not reduction.after_attention:
            self._begin("scoring and sampling")
            step.kept = reduction.merge(step)
            step.kept_input, step.q = self.attention_input(step.kept.x), None  # queries come from the merged tokens
        self._begin("qkv")
        q = self.kept_queries(step)
        self._begin("attention")
        step.bias = self.attention_bias(step.kept, step.keys)
        out = self.weighted_values(q, step)  # A^s V: the kept queries over all tokens of the block's input, eq. (5)
        out = self.attention_output(out, step)
        kept = step.kept.with_x(self.residual(step) + self.drop_sequences(self.drop_path1, out, step.kept.layout))
        if merges and reduction.after_attention:
            self._begin("scoring and sampling")
            step.q, step.kept = q, kept
            kept = reduction.merge(step)
        return step, kept

    @torch.no_grad()
    def select(self, step: Step) -> tuple[Tensor, int]:
        """Score the keys' tokens and let the reduction choose: a mask [S, M] of the queries to keep, prefix tokens
        included, and the new bound `max_tokens`.
        """
        keys, reduction = step.keys, self.reduction
        num_prefix, frames = keys.num_prefix_tokens, keys.frames_per_clip if reduction.share_frames else 1
        q, bias = self.scoring_queries(step)
        candidates = score_candidates(
            reduction.score, keys, q, step.k, step.v, scale=step.scale, queries=step.queries.layout, bias=bias
        )
        if frames > 1:
            candidates = average_over_frames(candidates, frames)
        keep = reduction.select(candidates)
        if self.imposed is not None:
            self._begin("rest")  # not the reduction's work
            chosen, keep = keep, self.imposed(candidates, reduction)
            if torch.compiler.is_compiling():  # graphs drop unused results; `chosen` is never empty
                keep = keep & chosen.any(dim=1, keepdim=True)
            self._begin("scoring and sampling")
        step.candidates = candidates
        keep = keep.repeat_interleave(frames, dim=0) if frames > 1 else keep
        return self.spread(F.pad(keep, (num_prefix, 0), value=True), reduction.limit(keys.max_tokens), step)

    def _record(self, step: Step, out: RaggedTokens) -> BlockRecord:
        reduction = self.reduction
        return BlockRecord(
            block=-1,
            num_in=step.tokens.layout.lengths,
            num_queries=step.queries.layout.lengths,
            num_keys=step.keys.layout.lengths,
            num_out=out.layout.lengths,
            max_tokens=out.max_tokens,
            rows_in=step.tokens.layout.padded_rows,
            rows_out=out.layout.padded_rows,
            reduction=reduction,
            idle=out is step.kept,
            kept=None if reduction is None else KeptTokens.of(out, -1),
            candidates=step.candidates if self.record_scores else None,
            previous=step.tokens.record,
            source=self,
        )

    def _begin(self, part: str) -> None:
        if self.clock is not None:
            self.clock(part)

    # ---- hooks, overridden by other families of blocks

    def prepare(self, tokens: RaggedTokens) -> RaggedTokens:
        """Runs before the attention that samples."""
        return tokens

    def project(self, tokens: RaggedTokens) -> Step:
        """Normalise all tokens and project their keys and values."""
        x, q = self.attention_input(tokens.x), None
        if projects_parts(self.attn):
            k, v = self.project_kv(x, tokens)
        else:
            whole = Projected(self.joint_projection(x, slice(None)))
            q, (k, v) = self.project_q(whole, tokens), self.project_kv(whole, tokens)
        return Step(tokens, x, queries=tokens, keys=tokens, k=k, v=v, scale=self.attn.scale, kept=tokens, q=q)

    def scoring_queries(self, step: Step) -> tuple[Tensor, Tensor | None]:
        """Queries of CLS [S, H, D] (of all tokens for the score mean_attention) and the bias of their logits."""
        tokens, first_rows = step.tokens, step.queries.layout.first_rows
        if self.reduction.score == "mean_attention":
            q = self.project_q(step.x, tokens) if step.q is None else step.q
            return q, self.attention_bias(tokens, tokens)
        q = self.project_q(first_rows(step.x)) if step.q is None else first_rows(step.q)
        return q, self.attention_bias(None, tokens)

    def spread(self, keep: Tensor, max_tokens: int, step: Step) -> tuple[Tensor, int]:
        """The mask of kept keys [S, M] and their bound -> the same for queries, if these differ from keys."""
        return keep, max_tokens

    def kept_queries(self, step: Step) -> Tensor:
        """Queries [T', H, D] of the kept tokens."""
        if step.q is not None:
            return rows(step.q, step.index)
        if step.kept_input is None:
            step.kept_input = rows(step.x, step.index)
        return self.project_q(step.kept_input, step.kept)

    def weighted_values(self, q: Tensor, step: Step) -> Tensor:
        """softmax(q k^T scale + bias) v, [T', H*D]."""
        layouts = {"queries": step.kept.layout, "keys": step.keys.layout}
        dropout_p = self.attn.attn_drop.p if self.training else 0.0
        out = ragged_attention(q, step.k, step.v, **layouts, scale=step.scale, dropout_p=dropout_p, bias=step.bias)
        return out.flatten(1)

    def residual(self, step: Step) -> Tensor:
        """The residual path of the attention's branch, [T', C]."""
        return step.kept.x

    def finish(self, tokens: RaggedTokens) -> RaggedTokens:
        """The second half of the block: the MLP and its residual."""
        out = self.drop_sequences(self.drop_path2, self.mlp_output(tokens.x), tokens.layout)
        return tokens.with_x(tokens.x + out)

    def attention_input(self, x: Tensor) -> Tensor:
        """Input of the attention, [T, C], from tokens [T, C]."""
        return self.norm1(x)

    def attention_output(self, out: Tensor, step: Step) -> Tensor:
        """The heads' concatenated output [T', H*D] -> the attention's branch [T', C]."""
        return self.ls1(self.attn.proj_drop(self.attn.proj(out)))

    def mlp_output(self, x: Tensor) -> Tensor:
        """The MLP's branch [T, C] of tokens [T, C]."""
        return self.ls2(self.mlp(self.norm2(x)))

    def attention_bias(self, queries: RaggedTokens | None, keys: RaggedTokens) -> Tensor | None:
        """Bias on the attention's logits by position or size, [S, 1 or H, 1 or Mq, Mk], or None. No `queries`: CLS."""
        return None if keys.key_bias is None else keys.layout.pad(keys.key_bias)[:, None, None]

    def project_q(self, x: Tensor, tokens: RaggedTokens | None = None) -> Tensor:
        """Queries [T, H, D] of tokens [T, C] (the first third of the joint projection). `tokens` has their positions;
        None: x is CLS.
        """
        q = self.joint_projection(x, slice(self.attn.proj.in_features))
        return self.attn.q_norm(q.unflatten(-1, (self.attn.num_heads, -1)))

    def project_kv(self, x: Tensor, tokens: RaggedTokens) -> tuple[Tensor, Tensor]:
        """Keys and values, each [T, H, D], of tokens [T, C]. `tokens` has their positions."""
        kv = self.joint_projection(x, slice(self.attn.proj.in_features, None))
        k, v = kv.unflatten(-1, (2, self.attn.num_heads, -1)).unbind(1)
        return self.attn.k_norm(k), v

    def joint_projection(self, x: Tensor | Projected, part: slice) -> Tensor:
        """The outputs `part` of the joint projection to queries, keys and values."""
        return linear_part(self.attn.qkv, x, part)

    @staticmethod
    def drop_sequences(drop_path: nn.Module, x: Tensor, layout: Layout) -> Tensor:
        """The base block's stochastic depth for packed tokens [T, C]: one draw per sequence."""
        if not drop_path.training or getattr(drop_path, "drop_prob", 0.0) == 0.0:
            return x
        scale = drop_path(x.new_ones(layout.num_sequences, 1))
        return x * scale[layout.sequence]


def rows(x: Tensor, index: Tensor | None) -> Tensor:
    """The rows `index` of x, by default all. index_select always gathers whole rows; x[index] may not."""
    return x if index is None else x.index_select(0, index)


def unwrapped(block: nn.Module) -> nn.Module:
    """The ATSBlock inside wrappers of one module (torch.compile's, FSDP's, checkpointing's); other blocks unchanged."""
    inner = block
    while not isinstance(inner, ATSBlock):
        if len(inner._modules) != 1:
            return block
        (inner,) = inner._modules.values()
    return inner


def ats_blocks(model: nn.Module) -> list[ATSBlock]:
    """The blocks with a reduction, in order, of a network built here or patched."""
    found = [module for module in model.modules() if getattr(module, "reduction", None) is not None]
    return sorted(found, key=lambda block: block.index)


def change_reductions(model: nn.Module, reductions: Mapping[int, Reduction]) -> None:
    """Replace the reductions (block -> reduction) of a network built here, in place. Blocks before the first one become
    ordinary blocks again, as fast as in the dense network; `{}` gives the dense network. Only blocks that were
    ATSBlocks when the network was built can have a reduction.
    """
    first = min(reductions, default=math.inf)
    block: Any
    for block in model.modules():
        classes = vars(block).get("ats_classes")
        if classes is not None:
            block.__class__ = classes[block.index >= first]
        if classes is not None or isinstance(block, ATSBlock):
            block.reduction = reductions.get(block.index)


def run_blocks(
    blocks: Iterable[nn.Module],
    x: Any,
    begin: Callable[[Any], RaggedTokens],
    *,
    call: Callable[[nn.Module, Any, int], Any] | None = None,
    after: Callable[[int, RaggedTokens], None] | None = None,
) -> RaggedTokens:
    """Run ordinary blocks, then ATSBlocks: the kept tokens, with the trace.

    Args:
        x: input of the first block: dense tokens [S, N, C], or anything that `call` understands.
        begin: makes ragged tokens from an ordinary block's output, for the first ATSBlock or at the end.
        call: (block, x or tokens, place in the list) -> the block's output; by default this calls the block, with
            activation checkpointing if it is on.
        after: called after each block with its place in the list and the tokens.
    """
    call = call or (lambda block, x, _: run_block(block, x))
    tokens = None
    for place, block in enumerate(blocks):
        if isinstance(unwrapped(block), ATSBlock):
            tokens = call(block, begin(x) if tokens is None else tokens, place)
        elif tokens is None:
            x = call(block, x, place)
        else:
            raise UserError(f"Block {place} is a {type(block).__name__} without ATS after blocks with ATS.")
        if after is not None:
            after(place, begin(x) if tokens is None else tokens)
    return begin(x) if tokens is None else tokens
