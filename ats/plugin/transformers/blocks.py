"""Layers of Hugging Face transformers on ragged tokens, each a subclass of its original.

The model's own forward pass runs its layers. The first ATS layer packs its input, later layers pass packed tokens on,
and the final norm, a `FinalNorm`, makes them dense again. Three things differ from the originals:

* they call the attention's projections, not the attention: its hooks do not fire, and there is no attention matrix;
* dropout and stochastic depth draw for packed tokens, stochastic depth once per image;
* activation checkpointing is always torch's non-reentrant one: the reentrant one loses gradients of packed tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.clip import modeling_clip as clip
from transformers.models.deit import modeling_deit as deit
from transformers.models.dinov2 import modeling_dinov2 as dinov2
from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers as registers
from transformers.models.dinov3_vit import modeling_dinov3_vit as dinov3
from transformers.models.siglip import modeling_siglip as siglip
from transformers.models.siglip2 import modeling_siglip2 as siglip2
from transformers.models.videomae import modeling_videomae as videomae
from transformers.models.vit import modeling_vit as vit
from transformers.models.vit_mae import modeling_vit_mae as vit_mae

from ats.models.block import ATSBlock
from ats.models.weights import is_linear
from ats.plugin.handle import State, original_class, version_of
from ats.plugin.rotary import rotary_table, rotated
from ats.reduction import Step
from ats.restore import Places, restored
from ats.tokens import RaggedTokens, Trace

# Classes whose forward pass is known, compared exactly: a subclass may compute something else.
ATTENTIONS: tuple[type, ...] = (vit.ViTAttention, deit.DeiTAttention, dinov2.Dinov2Attention)
ATTENTIONS += (registers.Dinov2WithRegistersAttention, clip.CLIPAttention, siglip.SiglipAttention)
ATTENTIONS += (siglip2.Siglip2Attention, dinov3.DINOv3ViTAttention, vit_mae.ViTMAEAttention, videomae.VideoMAEAttention)
MLPS: tuple[type, ...] = (vit.ViTMLP, deit.DeiTMLP, dinov2.Dinov2MLP, dinov2.Dinov2SwiGLUFFN)
MLPS += (registers.Dinov2WithRegistersMLP, registers.Dinov2WithRegistersSwiGLUFFN)
MLPS += (clip.CLIPMLP, siglip.SiglipMLP, siglip2.Siglip2MLP, dinov3.DINOv3ViTMLP, dinov3.DINOv3ViTGatedMLP)
MLPS += (vit_mae.ViTMAEMLP, videomae.VideoMAEIntermediate, videomae.VideoMAEOutput)
SIGLIP_LAYERS = (siglip.SiglipEncoderLayer, siglip2.Siglip2EncoderLayer)
NO_DROP_PATH = nn.Identity()
# Whether FinalNorm fills in dropped patches. A property of the call: a model may run in several threads.
FILL_DROPPED: ContextVar[bool] = ContextVar("FILL_DROPPED", default=False)


def attention_of(layer: Any) -> nn.Module:
    """The attention of a layer, with ATS or without."""
    return layer.self_attn if hasattr(layer, "self_attn") else layer.attention


def by_timms_names(attention: nn.Module) -> SimpleNamespace:
    """The parts of a transformers attention under timm's names, which `ATSBlock` and `cost.py` use."""
    if isinstance(attention, videomae.VideoMAEAttention):
        inner = attention.attention
        return SimpleNamespace(
            qkv=None,
            q_proj=inner.query,
            k_proj=inner.key,
            v_proj=inner.value,
            proj=attention.output.dense,
            num_heads=inner.num_attention_heads,
            scale=inner.scaling,
            attn_drop=SimpleNamespace(p=inner.dropout_prob),
        )
    is_tower = isinstance(attention, (clip.CLIPAttention, siglip.SiglipAttention, siglip2.Siglip2Attention))
    own_names = is_tower or isinstance(attention, dinov3.DINOv3ViTAttention)
    return SimpleNamespace(
        qkv=None,
        q_proj=attention.q_proj,
        k_proj=attention.k_proj,
        v_proj=attention.v_proj,
        proj=attention.out_proj if is_tower else attention.o_proj,
        num_heads=attention.num_heads if own_names else attention.num_attention_heads,
        scale=attention.scale if is_tower else attention.scaling,
        attn_drop=SimpleNamespace(p=attention.dropout if own_names else attention.attention_dropout),
    )


def mlp_of(layer: nn.Module) -> nn.ModuleList:
    """The modules of a layer's MLP."""
    if isinstance(layer, videomae.VideoMAELayer):
        return nn.ModuleList([layer.intermediate, layer.output])
    return nn.ModuleList([layer.mlp])


class TransformersBlock(ATSBlock):
    """Base of the ATS versions of the layers; never instantiated, see `handle.attach_to`."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        pass  # transformers' own would wrap `forward` in its checkpointing

    def forward(self, tokens: Tensor | RaggedTokens, attention_mask: object = None, **kwargs: object) -> RaggedTokens:
        """Dense [B, N, C] or packed tokens in, packed ones out."""
        # Ignore the other arguments: the model refuses those that matter; flex attention's mask is passed, but empty.
        rotary = kwargs.get("position_embeddings")
        if not isinstance(tokens, RaggedTokens):
            tokens = Places.begin(RaggedTokens.from_dense(tokens, num_prefix_of(self)), self.ats_state.restore)
        if rotary is not None:
            tokens = replace(tokens, rotary=rotary_table(torch.cat(rotary[::-1], dim=-1), tokens.num_prefix_tokens))
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(super().forward, tokens, use_reentrant=False)
        return super().forward(tokens)

    @property
    def attn(self) -> SimpleNamespace:
        return by_timms_names(attention_of(self))

    def project_q(self, x: Tensor, tokens: RaggedTokens | None = None) -> Tensor:
        attn = self.attn
        return attn.q_proj(x).unflatten(-1, (attn.num_heads, -1))

    def project_kv(self, x: Tensor, tokens: RaggedTokens) -> tuple[Tensor, Tensor]:
        attn = self.attn
        heads = (attn.num_heads, -1)
        return attn.k_proj(x).unflatten(-1, heads), attn.v_proj(x).unflatten(-1, heads)


class DropoutBranches(TransformersBlock):
    """ViT, DeiT and ViTMAE: dropout after both branches, no LayerScale, no stochastic depth."""

    drop_path1 = drop_path2 = NO_DROP_PATH

    def attention_input(self, x: Tensor) -> Tensor:
        return self.layernorm_before(x)

    def attention_output(self, out: Tensor, step: Step) -> Tensor:
        return self.dropout(self.attention.o_proj(out))

    def mlp_output(self, x: Tensor) -> Tensor:
        return self.dropout(self.mlp(self.layernorm_after(x)))


class ScaledBranches(TransformersBlock):
    """DINOv2: LayerScale and stochastic depth in both branches; `norm1`, `norm2` and `mlp` have timm's names."""

    drop_path1 = drop_path2 = property(attrgetter("drop_path"))  # one module for both branches

    def attention_output(self, out: Tensor, step: Step) -> Tensor:
        return self.layer_scale1(self.attention.o_proj(out))

    def mlp_output(self, x: Tensor) -> Tensor:
        return self.layer_scale2(self.mlp(self.norm2(x)))


class RotaryBranches(ScaledBranches):
    """DINOv3: as DINOv2, with rotary embedding of the patches."""

    def project_q(self, x: Tensor, tokens: RaggedTokens | None = None) -> Tensor:
        return rotated(super().project_q(x, tokens), tokens, half=True)

    def project_kv(self, x: Tensor, tokens: RaggedTokens) -> tuple[Tensor, Tensor]:
        k, v = super().project_kv(x, tokens)
        return rotated(k, tokens, half=True), v


class PlainBranches(TransformersBlock):
    """The towers of CLIP and SigLIP: no dropout outside the attention, no LayerScale, no stochastic depth."""

    drop_path1 = drop_path2 = NO_DROP_PATH

    def attention_input(self, x: Tensor) -> Tensor:
        return self.layer_norm1(x)

    def attention_output(self, out: Tensor, step: Step) -> Tensor:
        return self.self_attn.out_proj(out)

    def mlp_output(self, x: Tensor) -> Tensor:
        return self.mlp(self.layer_norm2(x))


class VideoBranches(TransformersBlock):
    """VideoMAE: as ViT, with the MLP in two modules."""

    drop_path1 = drop_path2 = NO_DROP_PATH
    mlp = property(mlp_of)  # for its cost

    def attention_input(self, x: Tensor) -> Tensor:
        return self.layernorm_before(x)

    def attention_output(self, out: Tensor, step: Step) -> Tensor:
        return self.attention.output(out, None)

    def mlp_output(self, x: Tensor) -> Tensor:
        return self.output.dropout(self.output.dense(self.intermediate(self.layernorm_after(x))))


DROPOUT = (vit.ViTLayer, deit.DeiTLayer, vit_mae.ViTMAELayer)
SCALED = (dinov2.Dinov2Layer, registers.Dinov2WithRegistersLayer)
VERSIONS: dict[type[nn.Module], type[TransformersBlock]] = {
    **{kind: version_of(kind, DropoutBranches) for kind in DROPOUT},
    **{kind: version_of(kind, ScaledBranches) for kind in SCALED},
    dinov3.DINOv3ViTLayer: version_of(dinov3.DINOv3ViTLayer, RotaryBranches),
    **{kind: version_of(kind, PlainBranches) for kind in (clip.CLIPEncoderLayer, *SIGLIP_LAYERS)},
    videomae.VideoMAELayer: version_of(videomae.VideoMAELayer, VideoBranches),
}


def dense_tokens(tokens: RaggedTokens, norm: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """[B, N, C] after the last layer. With FILL_DROPPED, dropped patches that are not restored become the mean of the
    image's kept patches, so the mean of all patches is the mean of the kept ones.
    """
    x = restored(tokens, norm)
    if not FILL_DROPPED.get() or tokens.places is not None:
        return x
    present = tokens.to_grid(tokens.x.new_ones(tokens.layout.total, 1, dtype=torch.bool))
    num_prefix = tokens.num_prefix_tokens
    count = present[:, num_prefix:].sum(dim=1, keepdim=True).clamp_min(1)
    mean = x[:, num_prefix:].sum(dim=1, keepdim=True) / count
    return torch.where(present, x, mean.to(x.dtype))


class FinalNorm(nn.LayerNorm):
    """The model's final norm. Packed tokens come out dense, [B, N, C]; see `ats/restore.py` for dropped ones."""

    original = nn.LayerNorm
    ats_state: State

    def forward(self, tokens: Tensor | RaggedTokens) -> Tensor:
        """The normalised tokens, see `dense_tokens`."""
        if not isinstance(tokens, RaggedTokens):
            return super().forward(tokens)
        if self.ats_state.trace:
            self.ats_state.last = Trace(tokens.trace)
        return dense_tokens(tokens, super().forward)


class DenseEncoder(nn.Module):
    """CLIP's encoder, and VideoMAE's without a final norm: what follows reads dense tokens, before any norm."""

    ats_state: State

    def forward(self, *args: object, **kwargs: object) -> object:
        """Like the original's."""
        out = super().forward(*args, **kwargs)
        tokens = out.last_hidden_state
        if isinstance(tokens, RaggedTokens):
            if self.ats_state.trace:
                self.ats_state.last = Trace(tokens.trace)
            out.last_hidden_state = dense_tokens(tokens)
        return out


class PresentPoolingHead(nn.Module):
    """SigLIP's attention pooling, over the tokens that are present: those that are not zero in every channel."""

    def forward(self, hidden_state: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """[B, N, C] -> [B, C]. The mask, SigLIP 2's, has no padding: `model.dense_outputs` refuses it."""
        gone = (hidden_state == 0).all(dim=2)
        probe = self.probe.expand(hidden_state.shape[0], -1, -1)
        x = self.attention(probe, hidden_state, hidden_state, key_padding_mask=gone, need_weights=False)[0]
        return (x + self.mlp(self.layernorm(x)))[:, 0]


POOLING_HEADS = (siglip.SiglipMultiheadAttentionPoolingHead, siglip2.Siglip2MultiheadAttentionPoolingHead)
# What reads the tokens after the last layer.
BEHIND_VERSIONS = {
    nn.LayerNorm: FinalNorm,
    **{kind: version_of(kind, DenseEncoder) for kind in (clip.CLIPEncoder, videomae.VideoMAEEncoder)},
    **{kind: version_of(kind, PresentPoolingHead) for kind in POOLING_HEADS},
}


def num_prefix_of(layer: nn.Module) -> int:
    """CLS plus DeiT's distillation token or DINOv2's and DINOv3's registers; SigLIP and VideoMAE have none."""
    if isinstance(layer, deit.DeiTLayer):
        return 2
    if isinstance(layer, (*SIGLIP_LAYERS, videomae.VideoMAELayer)):
        return 0
    if isinstance(layer, (registers.Dinov2WithRegistersLayer, dinov3.DINOv3ViTLayer)):
        return 1 + layer.attention.config.num_register_tokens
    return 1


def refusal_of_block(layer: nn.Module) -> str:
    """What ATS does not support in this layer; "" if it supports everything."""
    if original_class(layer) not in VERSIONS:
        return f"is a {type(layer).__name__}; supported are {', '.join(kind.__name__ for kind in VERSIONS)}"
    attention = attention_of(layer)
    if "forward" in vars(attention):
        return "has an attention whose forward was replaced"
    if original_class(attention) not in ATTENTIONS:
        return f"has attention of class {type(attention).__name__}"
    parts = by_timms_names(attention)
    for projection in (parts.q_proj, parts.k_proj, parts.v_proj, parts.proj):
        if not is_linear(projection):
            name = next((name for name, module in attention.named_modules() if module is projection), "projection")
            return f"has attention.{name} of class {type(projection).__name__} instead of Linear"
    for mlp in mlp_of(layer):
        if original_class(mlp) not in MLPS:
            return f"has an MLP of class {type(mlp).__name__}"
    for name in ("norm1", "norm2", "layernorm_before", "layernorm_after", "layer_norm1", "layer_norm2"):
        norm = getattr(layer, name, None)
        if norm is not None and original_class(norm) is not nn.LayerNorm:
            return f"has {name} of class {type(norm).__name__} instead of LayerNorm"
    return ""
