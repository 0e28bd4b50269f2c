"""timm's vision transformers on ragged tokens: a subclass with ATS of every supported model class.

Tokens are packed from the first ATS block on. `forward_features` and `forward_intermediates` return the usual dense
shape [B, N, C]; `model.ats.restore` sets what dropped tokens hold, by default exact zeros. Pooling (average, maximum,
attention) reads present tokens only: `forward_head` treats tokens that are zero in every channel as absent, so it needs
no mask, and it pools restored tokens like any other.

Shapes: B images, N = P + grid tokens, P prefix tokens, C channels.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from timm.layers import AttentionPoolLatent, PatchEmbed
from timm.models import beit, eva, vision_transformer
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from ats.compat import timm_feature_indices
from ats.errors import UserError
from ats.models.block import ATSBlock, ats_blocks, run_blocks, unwrapped
from ats.models.cost import BlockGrid, conv_multiply_adds, linear_multiply_adds, linears_multiply_adds
from ats.models.weights import is_linear
from ats.plugin.handle import (
    Patched,
    attach_to,
    check_blocks,
    original_class,
    refusal_of_blocks,
    refuse_merging,
    version_of,
)
from ats.plugin.rotary import NO_FUSE, rotary_table
from ats.plugin.timm.blocks import NORMS, refusal_of_block
from ats.plugin.timm.blocks import VERSIONS as BLOCK_VERSIONS
from ats.reduction import Reduction
from ats.restore import Places, restored
from ats.tokens import SINGLE, KeptTokens, Layout, RaggedTokens, Trace


def network(model: nn.Module) -> dict[str, Any]:
    """What `plan_reductions` needs to know about a model."""
    num_prefix, has_cls = model.num_prefix_tokens, model.cls_token is not None
    return {"depth": len(model.blocks), "num_prefix_tokens": num_prefix, "has_cls": has_cls}


CLS_POOLS = ("token", "")  # "": the head gets all tokens
AVERAGES = "its head does not read CLS alone, but a merged token counts for several"


def default_score(model: nn.Module) -> str:
    """The paper's score if the head reads CLS, else the mean attention."""
    pools = model.global_pool not in CLS_POOLS or getattr(model, "attn_pool", None) is not None
    return "mean_attention" if pools or model.cls_token is None else "cls_attention_value_norm"


def no_merge(model: nn.Module) -> str:
    """Why this model's tokens cannot be merged; "" if they can."""
    return AVERAGES if default_score(model) == "mean_attention" else ""


def no_fuse(model: nn.Module) -> str:
    """Why this model's tokens cannot be fused; "" if they can."""
    is_vit = isinstance(model, VisionTransformer)
    return "" if is_vit else NO_FUSE


class TimmModel(Patched):
    """Base of the ATS versions of timm's models; never instantiated, see `attach`."""

    no_merge, no_fuse = property(no_merge), property(no_fuse)

    # ---- timm's interface

    def forward_features(self, x: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        """[B, 3, H, W] -> [B, N, C] after the final norm; dropped tokens hold what `model.ats.restore` says."""
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
        """Like the original's: features after the blocks `indices`; dropped tokens as in `forward_features`."""
        self._refuse_masks(attn_mask, is_causal)
        if output_fmt not in ("NCHW", "NLC"):
            raise UserError(f"output_fmt {output_fmt}: choose from NCHW, NLC.")
        take, last = timm_feature_indices(len(self.blocks), indices)
        tokens, taken = self._run(x, take=take, norm=norm, num_blocks=last + 1 if stop_early else None)
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
        """Features [B, N, C] of `forward_features` -> logits, by the original head over the present tokens."""
        present = None if getattr(self, "attn_pool", None) is not None else self._present(x)
        if present is None:
            return super().forward_head(x, pre_logits)
        if self.global_pool == "":  # every token by itself
            return super().forward_head(x, pre_logits).masked_fill(~present[..., None], 0)
        return super().forward_head(self._fill(x, present), pre_logits)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Like the original's. Raises a UserError if the blocks merge tokens and the new pooling does not allow it."""
        if global_pool not in (None, *CLS_POOLS):
            refuse_merging(self, [block.reduction for block in ats_blocks(self)], AVERAGES, "")
        super().reset_classifier(num_classes, global_pool)

    def pool(self, x: Tensor, pool_type: str | None = None) -> Tensor:
        """The original's pooling, with attention pooling over the present tokens."""
        present = None if getattr(self, "attn_pool", None) is None else self._present(x)
        if present is None:
            return super().pool(x, pool_type)
        if isinstance(self, VisionTransformer) and not self.pool_include_prefix:
            x, present = x[:, self.num_prefix_tokens :], present[:, self.num_prefix_tokens :]
        if self.layout != "static":  # drop the rows that no image uses
            layout = Layout.from_lengths(present.sum(dim=1))
            x, present = layout.pad(x[present]), layout.mask
        mask = x.new_zeros(present.shape).masked_fill(~present, -torch.inf)
        return self.attn_pool(x, attn_mask=mask[:, None, None])

    # ---- the interface of ats.models

    def forward_tokens(self, x: Tensor) -> tuple[Tensor, Trace]:
        """Images [B, 3, H, W] -> logits [B, classes] and the tokens that each block with a reduction kept."""
        tokens, _ = self._run(x)
        return self.forward_head(self._dense(tokens)), Trace(tokens.trace)

    def adapt_state_dict(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """A release's weights for this model, converted as timm does after a download."""
        if self.original is Eva and isinstance(self.fc_norm, nn.Identity):  # with a mask token, timm expects an fc_norm
            state = {key: value for key, value in state.items() if key != "mask_token"}
        return FILTERS[self.original](state, self)

    def block_grids(self, input_shape: Sequence[int]) -> list[BlockGrid]:
        return [BlockGrid.of(1, *self.patch_embed.dynamic_feat_size(tuple(input_shape[-2:])))] * len(self.blocks)

    def multiply_adds(self, trace: Sequence[KeptTokens], input_shape: Sequence[int], *, paper: bool) -> Tensor:
        """Like the base class's, plus pooling of padding: up to the longest image, or all positions if static."""
        pooled = trace
        if trace and not paper and self.layout != "packed":
            longest = trace[-1].num_tokens.amax().expand(len(trace[-1].num_tokens))
            pooled = [] if self.layout == "static" else [replace(trace[-1], num_tokens=longest)]
        blocks = self.block_multiply_adds(trace, input_shape, paper=paper)
        return sum(blocks[1:], blocks[0]) + self.stem_multiply_adds(pooled, input_shape)

    def stem_multiply_adds(self, trace: Sequence[KeptTokens], input_shape: Sequence[int]) -> Tensor | float:
        """Embedding, pooling and head of each image."""
        height, width = self.patch_embed.dynamic_feat_size(tuple(input_shape[-2:]))
        num_positions = self.num_prefix_tokens + height * width
        left = trace[-1].num_tokens.double() if trace else float(num_positions)
        pool = getattr(self, "attn_pool", None)
        total = self._embedding_multiply_adds(input_shape, height * width)
        if pool is not None:
            without_prefix = not getattr(self, "pool_include_prefix", True)
            pooled, latents = left - self.num_prefix_tokens * without_prefix, pool.latent_len
            per_latent = sum(linears_multiply_adds(part) for part in (pool.q, pool.proj, pool.mlp) if part is not None)
            total = total + latents * per_latent + pooled * linear_multiply_adds(pool.kv)
            total = total + 2 * latents * pooled * pool.kv.in_features
        num_rows = num_positions if self.global_pool == "" and pool is None else 1  # zeros for dropped tokens, too
        heads = [head for head in (self.head, getattr(self, "head_dist", None)) if is_linear(head)]
        return total + num_rows * sum(map(linear_multiply_adds, heads))

    def _embedding_multiply_adds(self, input_shape: Sequence[int], num_patches: int) -> int:
        """Of the patch embedding. A hybrid's is a convolutional network: run it on the meta device and count."""
        embed = self.patch_embed
        if type(embed) is PatchEmbed and isinstance(embed.proj, nn.Conv2d):
            return conv_multiply_adds(embed.proj, num_patches)
        counts, key = self.ats_state.embedding_costs, tuple(input_shape[1:])
        if key not in counts:
            shapes = copy.deepcopy(embed).to("meta").eval()
            x = torch.empty(1, *key, device="meta", dtype=next(embed.parameters()).dtype)
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                shapes(x)
            counts[key] = counter.get_total_flops() // 2
        return counts[key]

    def _run(
        self, x: Tensor, *, take: Sequence[int] = (), norm: bool = False, num_blocks: int | None = None
    ) -> tuple[RaggedTokens, list[Tensor]]:
        """Run images through the (first `num_blocks`) blocks. Returns the kept tokens before the final norm, and dense
        features after the blocks `take`, with the final norm if `norm`.
        """
        check_blocks(self, self.blocks)
        with self.fastest_kernels(x):
            return self._run_blocks(x, take=take, norm=norm, num_blocks=num_blocks)

    def _run_blocks(
        self, x: Tensor, *, take: Sequence[int], norm: bool, num_blocks: int | None
    ) -> tuple[RaggedTokens, list[Tensor]]:
        x, rope = self._embed(x)
        taken: list[Tensor] = []

        def call(block: nn.Module, x: Tensor | RaggedTokens, index: int) -> Tensor | RaggedTokens:
            own = rope[index] if getattr(self, "rope_mixed", False) and rope is not None else rope
            if own is None:
                return self._call(block, x)
            if isinstance(unwrapped(block), ATSBlock):
                return self._call(block, replace(x, rotary=rotary_table(own, self.num_prefix_tokens)))
            return self._call(block, x, rope=own)

        def after(index: int, tokens: RaggedTokens) -> None:
            if index in take:
                taken.append(restored(tokens, self.norm) if norm else restored(tokens))

        def begin(x: Tensor) -> RaggedTokens:
            tokens = RaggedTokens.from_dense(x, self.num_prefix_tokens, layout=self.layout)
            return Places.begin(tokens, self.restore)

        blocks = islice(self.blocks, num_blocks)
        tokens = run_blocks(blocks, x, begin, call=call, after=after if take else None)
        if self.ats_state.trace:
            self.ats_state.last = Trace(tokens.trace)
        return tokens, taken

    def _call(self, block: nn.Module, x: Tensor | RaggedTokens, **kwargs: Tensor) -> Tensor | RaggedTokens:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False, **kwargs)
        return block(x, **kwargs)

    def _dense(self, tokens: RaggedTokens) -> Tensor:
        """Tokens after the final norm, dense [B, N, C]; an adaptive export leaves out the dropped ones."""
        layout = tokens.layout
        if self._is_compact:
            return self.norm(tokens.x)[None]
        is_whole = layout.full and layout.total == layout.num_sequences * tokens.num_positions
        if is_whole and tokens.size is None and not tokens.has_fused:
            return self.norm(tokens.x).unflatten(0, (-1, tokens.num_positions))
        return restored(tokens, self.norm)

    def _embed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images -> input of the first block: tokens [B, N, C] and the rotary embedding, if any."""
        x, rope = self.patch_embed(x), None
        if isinstance(self, Beit):
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
            return self.pos_drop(x if self.pos_embed is None else x + self.pos_embed), None
        if isinstance(self, Eva):
            x, rope = self._pos_embed(x)
        else:
            x = self.patch_drop(self._pos_embed(x))
        return self.norm_pre(x), rope

    def _present(self, x: Tensor) -> Tensor | None:
        """[B, N] bool, True for present tokens; None if all are present, or only prefix tokens are read."""
        if x.ndim != 3 or (self.global_pool == "token" and getattr(self, "attn_pool", None) is None):
            return None
        if self._is_compact or not isinstance(unwrapped(self.blocks[-1]), ATSBlock):
            return None
        present = x.ne(0).any(dim=-1)
        present[:, : self.num_prefix_tokens] = True
        # In a graph: no data-dependent branch.
        return None if self.layout not in ("static", SINGLE) and bool(present.all()) else present

    @property
    def _is_compact(self) -> bool:
        """Whether `forward_head` gets only present tokens: in an adaptive export, unless it returns all of them."""
        return self.layout == SINGLE and self.global_pool != ""

    def _fill(self, x: Tensor, present: Tensor) -> Tensor:
        """Set dropped tokens to the mean of the present, pooled ones, so that the original's mean and maximum over all
        tokens are those over the present ones.
        """
        pooled = present.clone()
        pooled[:, : self.num_prefix_tokens] &= getattr(self, "pool_include_prefix", False)
        count = pooled.sum(dim=1, keepdim=True).clamp_min(1)
        mean = (x * pooled[..., None]).sum(dim=1) / count
        return torch.where(present[..., None], x, mean[:, None].to(x.dtype))

    @staticmethod
    def _refuse_masks(attn_mask: object, is_causal: bool) -> None:
        if attn_mask is not None or is_causal:
            raise UserError("attn_mask and is_causal do not work with ATS: leave them out, or ats.unpatch(model).")


FILTERS = {  # convert released state dicts
    VisionTransformer: partial(vision_transformer.checkpoint_filter_fn, adapt_layer_scale=True),
    VisionTransformerDistilled: vision_transformer.checkpoint_filter_fn,
    Beit: beit.checkpoint_filter_fn,
    Eva: eva.checkpoint_filter_fn,
}
VERSIONS: dict[type[nn.Module], type[TimmModel]] = {kind: version_of(kind, TimmModel) for kind in FILTERS}


def attach(model: nn.Module, reductions: dict[int, Reduction]) -> None:
    """Change `model` to its ATS version with these reductions (none: the dense network with the interface of
    `ats.models`). Raises a UserError if they merge or fuse tokens and the model does not allow it.
    """
    refuse_merging(model, reductions.values(), no_merge(model), no_fuse(model))
    attach_to([model], model.blocks, reductions, VERSIONS | BLOCK_VERSIONS)


# Why ATS refuses these related classes. It refuses all other classes as unknown.
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
    if original_class(model) not in VERSIONS:
        known = ", ".join(kind.__name__ for kind in VERSIONS)
        reason = REASONS.get(original_class(model).__name__)
        if original_class(model).__module__.startswith("torchvision."):
            reason = "torchvision's attention is nn.MultiheadAttention; use a timm ViT, e.g. vit_base_patch16_224"
        return (
            f"{reason + '; ' if reason else ''}ATS supports timm's {known} (no subclasses), "
            "and transformers' ViT, DeiT, DINOv2, DINOv3, CLIP, SigLIP, VideoMAE and ViTMAE"
        )
    if not isinstance(getattr(model, "patch_drop", None), (nn.Identity, type(None))):
        return "patch_drop removes tokens of its own; build it with patch_drop_rate=0"
    pool = getattr(model, "attn_pool", None)
    if pool is not None and (type(pool) is not AttentionPoolLatent or pool.pos_embed is not None):
        return f"it pools by {type(pool).__name__}{' with positions' if hasattr(pool, 'pos_embed') else ''}"
    if getattr(model, "rel_pos_bias", None) is not None:
        return "its blocks share one relative position bias"
    if original_class(model.norm) not in NORMS:
        return f"its final norm is a {type(model.norm).__name__}"
    return refusal_of_blocks(model, model.blocks, refusal_of_block)
