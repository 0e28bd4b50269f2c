"""timm's vision transformers over ragged tokens: for every model class that is understood, a subclass with ATS.

As with the blocks (`timm_blocks.py`), a model becomes its ATS version by its `__class__` alone (`host.py`). What the
versions change in the host:

* from the first ATS block on tokens are packed; `forward_features` and `forward_intermediates` give the host's dense
  layout [B, N, C] with exact zeros where a token was dropped;
* pooling (average, maximum, attention) looks at the tokens that are there, and a token that is zero in every channel is
  not, so `forward_head` needs nothing but its input.

Shapes: B images, N = P + grid tokens, P prefix tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice

import torch
from timm.layers import AttentionPoolLatent
from timm.models import beit, eva, vision_transformer
from timm.models._features import feature_take_indices
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ats.errors import UserError
from ats.models.block import ATSBlock
from ats.plugin.handle import Patched, State, with_sampler
from ats.plugin.timm.blocks import BLOCKS, NORMS, refusal_of_block
from ats.plugin.timm.cost import model_multiply_adds
from ats.reduction.sampling import BlockSampler, TokenReducer
from ats.tokens import KeptTokens, Layout, RaggedTokens


class ATSModel(Patched):
    """What the ATS versions of timm's models have in common; never instantiated, see `adopt`."""

    head_keys: tuple[str, ...] = ("head",)

    # ---- the host's interface

    def forward_features(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        """[B, 3, H, W] -> [B, N, C] after the final norm, zeros where a token was dropped."""
        self._refuse_masks(attn_mask, is_causal)
        return self._dense(self._run(x)[0])

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: None = None,
        is_causal: bool = False,
    ) -> list | tuple | dict:
        """As the host's: features behind the blocks `indices`; zeros where a token was dropped."""
        self._refuse_masks(attn_mask, is_causal)
        if output_fmt not in ("NCHW", "NLC"):
            raise UserError(f"output_fmt {output_fmt}: choose from NCHW, NLC.")
        take, last = feature_take_indices(len(self.blocks), indices)
        tokens, _, taken = self._run(x, take=take, norm=norm, num_blocks=last + 1 if stop_early else None)
        num_prefix, grid = self.num_prefix_tokens, self.patch_embed.dynamic_feat_size(tuple(x.shape[-2:]))
        prefix, maps = [t[:, :num_prefix] for t in taken], [t[:, num_prefix:] for t in taken]
        if output_fmt == "NCHW":
            maps = [t.transpose(1, 2).unflatten(2, grid).contiguous() for t in maps]
        if output_dict:
            out = {"image_intermediates": maps}
            if return_prefix_tokens and num_prefix:
                out["image_intermediates_prefix"] = prefix
            return out if intermediates_only else out | {"image_features": self._dense(tokens)}
        if return_prefix_tokens and num_prefix:
            maps = list(zip(maps, prefix, strict=True))
        return maps if intermediates_only else (self._dense(tokens), maps)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features [B, N, C] of `forward_features` -> logits, by the host's head over the tokens that are there."""
        present = None if attention_pool(self) is not None else self._present(x)
        if present is None:
            return super().forward_head(x, pre_logits)
        if self.global_pool == "":  # every token by itself
            return super().forward_head(x, pre_logits).masked_fill(~present[..., None], 0)
        return super().forward_head(self._fill(x, present), pre_logits)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """The host's pooling, with attention pooling over the tokens that are there."""
        present = None if attention_pool(self) is None else self._present(x)
        if present is None:
            return super().pool(x, pool_type)
        if isinstance(self, VisionTransformer) and not self.pool_include_prefix:
            x, present = x[:, self.num_prefix_tokens :], present[:, self.num_prefix_tokens :]
        if self.ats_state.layout == "static":
            mask = x.new_zeros(present.shape).masked_fill(~present, -torch.inf)
            return self.attn_pool(x, attn_mask=mask[:, None, None])
        layout = Layout.from_lengths(present.sum(dim=1))
        mask = x.new_zeros(layout.mask.shape).masked_fill(~layout.mask, -torch.inf)
        return self.attn_pool(layout.pad(x[present]), attn_mask=mask[:, None, None])

    # ---- the interface of ats.models

    def forward_tokens(self, x: Tensor) -> tuple[Tensor, list[KeptTokens]]:
        """Images [B, 3, H, W] -> logits [B, classes] and, for every ATS block in order, the tokens it kept."""
        tokens, trace, _ = self._run(x)
        return self.forward_head(self._dense(tokens)), trace

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a release as this model's: what timm does to them when it downloads them."""
        return FILTERS[HOSTS[type(self)]](state, self)

    def multiply_adds(self, trace: list[KeptTokens], input_shape: tuple[int, ...], *, paper: bool) -> Tensor:
        """Multiply-adds of each image [B] (float64) of a batch of `input_shape`; see `ats/flops.py`."""
        return model_multiply_adds(self, trace, input_shape, paper=paper)

    # ---- how

    def _run(
        self, x: Tensor, *, take: Sequence[int] = (), norm: bool = False, num_blocks: int | None = None
    ) -> tuple[RaggedTokens, list[KeptTokens], list[Tensor]]:
        """Images through the (first `num_blocks`) blocks: the tokens that are left, before the final norm; the trace;
        and dense features behind the blocks `take`, after the final norm if `norm`.
        """
        x, rope = self._embed(x)
        from_dense = partial(RaggedTokens.from_dense, layout=self.ats_state.layout)
        tokens, trace, taken = from_dense(x, self.num_prefix_tokens), [], []
        for index, block in enumerate(islice(self.blocks, num_blocks)):
            block_rope = rope[index] if getattr(self, "rope_mixed", False) and rope is not None else rope
            if isinstance(block, ATSBlock):
                rotary = None if block_rope is None else rotary_table(block_rope, self.num_prefix_tokens)
                tokens = self._call(block, replace(tokens, rotary=rotary))
                if block.sampler is not None:
                    trace.append(KeptTokens.of(tokens, index))
            else:
                kwargs = {} if block_rope is None else {"rope": block_rope}
                x = self._call(block, x, **kwargs)
                tokens = from_dense(x, self.num_prefix_tokens)
            if index in take:
                taken.append(tokens.to_grid(self.norm(tokens.x) if norm else None))
        if self.ats_state.trace:
            self.ats_state.last = trace
        return tokens, trace, taken

    def _call(self, block: nn.Module, x: Tensor | RaggedTokens, **kwargs: Tensor) -> Tensor | RaggedTokens:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False, **kwargs)
        return block(x, **kwargs)

    def _dense(self, tokens: RaggedTokens) -> Tensor:
        """The final norm of the tokens that are left, [B, N, C]."""
        x = self.norm(tokens.x)
        layout = tokens.layout
        is_whole = layout.full and layout.total == layout.num_sequences * tokens.num_positions
        if is_whole and not tokens.has_fused:
            return x.unflatten(0, (-1, tokens.num_positions))
        return tokens.to_grid(x)

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images -> what the host's first block gets: tokens [B, N, C], and its rotary embedding if it has one."""
        return self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x)))), None

    def _present(self, x: Tensor) -> Tensor | None:
        """[B, N] bool, True where there is a token; None where all are there, or only prefix tokens are read."""
        if x.ndim != 3 or (self.global_pool == "token" and attention_pool(self) is None):
            return None
        if not isinstance(self.blocks[-1], ATSBlock):
            return None
        present = x.ne(0).any(dim=-1)
        present[:, : self.num_prefix_tokens] = True
        # In the layout static nothing may depend on what the numbers are, so not even this is asked.
        return None if self.ats_state.layout != "static" and bool(present.all()) else present

    def _fill(self, x: Tensor, present: Tensor) -> Tensor:
        """Every dropped token as the mean of those that are there and pooled. So the host's mean and maximum over all
        of them are the mean and the maximum over those that are there.
        """
        pooled = present
        if not getattr(self, "pool_include_prefix", False):
            pooled = present.clone()
            pooled[:, : self.num_prefix_tokens] = False
        count = pooled.sum(dim=1, keepdim=True).clamp_min(1)
        mean = (x * pooled[..., None]).sum(dim=1) / count
        return torch.where(present[..., None], x, mean[:, None].to(x.dtype))

    @staticmethod
    def _refuse_masks(attn_mask: object, is_causal: bool) -> None:
        if attn_mask is not None or is_causal:
            raise UserError("attn_mask and is_causal are not understood with ATS: call without, or ats.unpatch(model).")


class ATSVisionTransformer(ATSModel, VisionTransformer):
    """ViT, DeiT, DeiT-III, CLIP, SigLIP, DINO, DINOv2, AIMv2, hybrids, ViTamin, ..."""


class ATSVisionTransformerDistilled(ATSModel, VisionTransformerDistilled):
    """DeiT with a distillation token."""

    head_keys = ("head.", "head_dist.")


class ATSBeit(ATSModel, Beit):
    """BEiT, BEiT v2."""

    def _embed(self, x: Tensor) -> tuple[Tensor, None]:
        x = self.patch_embed(x)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        return self.pos_drop(x if self.pos_embed is None else x + self.pos_embed), None


class ATSEva(ATSModel, Eva):
    """EVA, EVA-02, Perception Encoder, DINOv3, ViTs with rotary embedding."""

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        x, rope = self._pos_embed(self.patch_embed(x))
        return self.norm_pre(x), rope


MODELS: dict[type[nn.Module], type[ATSModel]] = {
    VisionTransformer: ATSVisionTransformer,
    VisionTransformerDistilled: ATSVisionTransformerDistilled,
    Beit: ATSBeit,
    Eva: ATSEva,
}
HOSTS = {version: host for host, version in MODELS.items()}
FILTERS = {
    VisionTransformer: partial(vision_transformer.checkpoint_filter_fn, adapt_layer_scale=True),
    VisionTransformerDistilled: vision_transformer.checkpoint_filter_fn,
    Beit: beit.checkpoint_filter_fn,
    Eva: eva.checkpoint_filter_fn,
}


def adopt(model: nn.Module, samplers: dict[int, BlockSampler | TokenReducer], *, layout: str = "packed") -> None:
    """Make `model` its ATS version with these samplers (none: the dense network with the interface of `ats.models`).

    Raises:
        UserError: tokens are to be merged or fused, and the model is not made for that.
    """
    refuse_reducers(model, samplers)
    if type(model) in MODELS:
        model.ats_state = State(layout=layout)
        model.__class__ = MODELS[type(model)]
    with_sampler(model.blocks, samplers, BLOCKS)


def refuse_reducers(model: nn.Module, samplers: dict[int, BlockSampler | TokenReducer]) -> None:
    """Merged and fused tokens have no position of their own and count for several: they need a model that adds its
    positions before the blocks and reads CLS alone.
    """
    if all(isinstance(sampler, BlockSampler) for sampler in samplers.values()):
        return
    reason = ""
    if not isinstance(model, VisionTransformer):
        reason = "its blocks look positions up, and merged or fused tokens have none"
    elif default_score(model) == "mean_attention":
        reason = "its head does not read CLS alone"
    if reason:
        host = HOSTS.get(type(model), type(model))
        raise UserError(f"The samplers tome and evit cannot take a {host.__name__} such as this: {reason}.")


def release(model: nn.Module) -> None:
    """Make `model` its host again."""
    with_sampler(model.blocks, {}, BLOCKS)
    model.__class__ = HOSTS[type(model)]
    del model.ats_state


def rotary_table(rope: Tensor, num_prefix_tokens: int) -> Tensor:
    """Rotary embedding of patches, [n, 2D] or [H, n, 2D], as [P + n, 1 or H, 2D]; prefix tokens are turned by nothing
    (sine 0, cosine 1).
    """
    table = rope[:, None] if rope.ndim == 2 else rope.transpose(0, 1)
    prefix = torch.zeros_like(table[:1]).expand(num_prefix_tokens, -1, -1).clone()
    prefix[..., table.shape[-1] // 2 :] = 1
    return torch.cat([prefix, table])


def has_cls(model: nn.Module) -> bool:
    """Whether the first token is a CLS token."""
    return model.cls_token is not None


def num_blocks(model: nn.Module) -> int:
    """Blocks of the network."""
    return len(model.blocks)


def num_prefix_tokens(model: nn.Module) -> int:
    """Tokens that are always kept if the first of them is CLS; 0 if none of them is one that can score."""
    return model.num_prefix_tokens if has_cls(model) else 0


def attention_pool(model: nn.Module) -> nn.Module | None:
    """The attention pooling in the model's head, None where it pools otherwise."""
    return getattr(model, "attn_pool", None)


def default_score(model: nn.Module) -> str:
    """The paper's score where CLS is what the head reads, else the mean attention."""
    reads_cls = has_cls(model) and model.global_pool in ("token", "") and attention_pool(model) is None
    return "cls_attention_value_norm" if reads_cls else "mean_attention"


# Why transformers that come near are refused; any other class is refused as one that is not known.
REASONS = {
    "NaFlexVit": "packs images of several sizes and masks its attention itself",
    "VisionTransformerRelPos": "its relative position modules are tied to the full grid",
    "VisionTransformerSAM": "attends in windows and by decomposed relative positions",
    "SwinTransformer": "attends in windows of a full grid",
    "SwinTransformerV2": "attends in windows of a full grid",
    "MultiScaleVit": "pools its grid; MODEL.NAME MViT is MViT with ATS",
    "Hiera": "pools its grid in mask units",
    "Cait": "its CLS token comes in only after the patches' blocks, with talking heads before",
    "Xcit": "attends over channels, not over tokens",
    "ConVit": "its gated positional attention is tied to the full grid",
    "CrossVit": "two branches of tokens attend to each other",
    "PoolingVisionTransformer": "pools its grid by convolutions",
    "VOLO": "its outlooker attention is tied to the full grid",
    "TNT": "a second transformer runs inside every patch",
}


def refusal(model: nn.Module) -> str:
    """Why ATS cannot be put into this model; "" if it can."""
    if type(model) not in MODELS and type(model) not in HOSTS:
        known = ", ".join(host.__name__ for host in MODELS)
        reason = REASONS.get(type(model).__name__)
        return (
            f"{reason + '; ' if reason else ''}the classes understood are timm's {known}, themselves and no subclass, "
            "and of transformers ViT, DeiT, Dinov2 and Dinov2WithRegisters"
        )
    if len(model.blocks) == 0:
        return "it has no blocks"
    if not isinstance(getattr(model, "patch_drop", None), (nn.Identity, type(None))):
        return "patch_drop removes tokens of its own; build it with patch_drop_rate=0"
    pool = attention_pool(model)
    if pool is not None and (type(pool) is not AttentionPoolLatent or pool.pos_embed is not None):
        return f"it pools by {type(pool).__name__}{' with positions' if hasattr(pool, 'pos_embed') else ''}"
    if getattr(model, "rel_pos_bias", None) is not None:
        return "its blocks share one relative position bias"
    if type(model.norm) not in NORMS:
        return f"its final norm is a {type(model.norm).__name__}"
    for index, block in enumerate(model.blocks):
        reason = "" if isinstance(block, ATSBlock) else refusal_of_block(block)
        if reason:
            return f"block {index} {reason}"
    return ""
