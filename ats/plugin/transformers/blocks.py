"""Layers of Hugging Face transformers (ViT, DeiT, DINOv2) on ragged tokens, each a subclass of its host (`host.py`).

The host's own forward pass runs its layers one after the other. The first ATS layer packs what it gets, the others hand
the packed tokens on, and the host's final norm, as `FinalNorm`, makes them dense again. So embedding, pooling, heads,
losses and outputs are the host's own code. What the versions change in a host layer:

* the attention's projections are used in parts, so hooks on the attention do not fire and it has no matrix to return;
* dropout and stochastic depth draw for packed tokens, the latter once per image;
* activation checkpointing is torch's non-reentrant one, whatever was asked for: the other sees no gradient through
  packed tokens.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.models.deit import modeling_deit as deit
from transformers.models.dinov2 import modeling_dinov2 as dinov2
from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers as registers
from transformers.models.vit import modeling_vit as vit

from ats.models.block import ATSBlock
from ats.plugin.handle import State
from ats.tokens import KeptTokens, RaggedTokens

# Classes whose forward pass is known, compared exactly: a subclass may compute something else.
ATTENTIONS = (vit.ViTAttention, deit.DeiTAttention, dinov2.Dinov2Attention, registers.Dinov2WithRegistersAttention)
MLPS = (
    vit.ViTMLP,
    deit.DeiTMLP,
    dinov2.Dinov2MLP,
    dinov2.Dinov2SwiGLUFFN,
    registers.Dinov2WithRegistersMLP,
    registers.Dinov2WithRegistersSwiGLUFFN,
)
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
NO_DROP_PATH = nn.Identity()
# Whether FinalNorm is to fill in dropped patches: of a call, not of a model, which may run in several threads.
FILL_DROPPED: ContextVar[bool] = ContextVar("FILL_DROPPED", default=False)


@dataclass
class TracedTokens(RaggedTokens):
    """Tokens that say what the ATS layers before kept."""

    trace: tuple[KeptTokens, ...] = ()


def by_timms_names(attention: nn.Module) -> SimpleNamespace:
    """The parts of a transformers attention by the names that `ATSBlock` and `cost.py` use, which are timm's."""
    return SimpleNamespace(
        qkv=None,
        q_proj=attention.q_proj,
        k_proj=attention.k_proj,
        v_proj=attention.v_proj,
        proj=attention.o_proj,
        num_heads=attention.num_attention_heads,
        scale=attention.scaling,
        attn_drop=SimpleNamespace(p=attention.attention_dropout),
    )


class TransformersBlock(ATSBlock):
    """What the ATS versions of the layers have in common; never instantiated, see `host.with_sampler`."""

    def __init_subclass__(cls, **kwargs: object) -> None:
        # Not the host's, which would wrap `forward` in its own checkpointing.
        pass

    def forward(self, tokens: Tensor | TracedTokens, attention_mask: object = None, **kwargs: object) -> TracedTokens:
        """Dense [B, N, C] or packed tokens in, packed ones out. Nothing else is looked at: the model has refused what
        would make a difference, and flex attention's mask, which is always there, masks nothing.
        """
        if not isinstance(tokens, TracedTokens):
            tokens = TracedTokens.from_dense(tokens, num_prefix_tokens(self))
        if self.gradient_checkpointing and self.training and torch.is_grad_enabled():
            tokens = checkpoint(super().forward, tokens, use_reentrant=False)
        else:
            tokens = super().forward(tokens)
        if self.sampler is None:
            return tokens
        return replace(tokens, trace=(*tokens.trace, KeptTokens.of(tokens, self.sampler.block)))

    @property
    def attn(self) -> SimpleNamespace:
        """The attention by timm's names."""
        return by_timms_names(self.attention)

    def project_q(self, x: Tensor, tokens: RaggedTokens | None = None) -> Tensor:
        """Queries [T, H, D] of tokens [T, C]."""
        return self.attention.q_proj(x).unflatten(-1, (self.attention.num_attention_heads, -1))

    def project_kv(self, x: Tensor, tokens: RaggedTokens) -> tuple[Tensor, Tensor]:
        """Keys and values, each [T, H, D]."""
        heads = (self.attention.num_attention_heads, -1)
        return self.attention.k_proj(x).unflatten(-1, heads), self.attention.v_proj(x).unflatten(-1, heads)


class DropoutBranches(TransformersBlock):
    """ViT and DeiT: dropout behind both branches, no LayerScale, no stochastic depth."""

    drop_path1 = drop_path2 = NO_DROP_PATH

    def attention_input(self, x: Tensor) -> Tensor:
        """What the attention reads of tokens [T, C]."""
        return self.layernorm_before(x)

    def attention_output(self, out: Tensor, x: Tensor) -> Tensor:
        """Heads' joint output [T, H*D] -> the attention's branch [T, C]."""
        return self.dropout(self.attention.o_proj(out))

    def mlp_output(self, x: Tensor) -> Tensor:
        """The MLP's branch [T, C] of tokens [T, C]."""
        return self.dropout(self.mlp(self.layernorm_after(x)))


class ScaledBranches(TransformersBlock):
    """DINOv2: LayerScale and stochastic depth in both branches; `norm1`, `norm2` and `mlp` have timm's names."""

    @property
    def drop_path1(self) -> nn.Module:
        """Stochastic depth, which the host has once for both branches."""
        return self._modules["drop_path"]  # the name is that of a method of ATSBlock

    drop_path2 = drop_path1

    def attention_output(self, out: Tensor, x: Tensor) -> Tensor:
        """Heads' joint output [T, H*D] -> the attention's branch [T, C]."""
        return self.layer_scale1(self.attention.o_proj(out))

    def mlp_output(self, x: Tensor) -> Tensor:
        """The MLP's branch [T, C] of tokens [T, C]."""
        return self.layer_scale2(self.mlp(self.norm2(x)))


class ATSViTLayer(DropoutBranches, vit.ViTLayer):
    """ViT."""


class ATSDeiTLayer(DropoutBranches, deit.DeiTLayer):
    """DeiT."""


class ATSDinov2Layer(ScaledBranches, dinov2.Dinov2Layer):
    """DINOv2, with the giant's SwiGLU too."""


class ATSDinov2WithRegistersLayer(ScaledBranches, registers.Dinov2WithRegistersLayer):
    """DINOv2 with registers."""


BLOCKS: dict[type[nn.Module], type[TransformersBlock]] = {
    vit.ViTLayer: ATSViTLayer,
    deit.DeiTLayer: ATSDeiTLayer,
    dinov2.Dinov2Layer: ATSDinov2Layer,
    registers.Dinov2WithRegistersLayer: ATSDinov2WithRegistersLayer,
}


class FinalNorm(nn.LayerNorm):
    """The host's final norm, of packed tokens too: [B, N, C] with zeros where a token was dropped."""

    ats_state: State

    def forward(self, tokens: Tensor | TracedTokens) -> Tensor:
        """The normalised tokens. With FILL_DROPPED a dropped patch is the mean of the image's patches that
        are left, so the mean over all of them is the mean over those.
        """
        if not isinstance(tokens, TracedTokens):
            return super().forward(tokens)
        if self.ats_state.trace:
            self.ats_state.last = list(tokens.trace)
        x = tokens.to_grid(super().forward(tokens.x))
        if not FILL_DROPPED.get():
            return x
        present = tokens.to_grid(tokens.x.new_ones(tokens.layout.total, 1, dtype=torch.bool))
        num_prefix = tokens.num_prefix_tokens
        count = present[:, num_prefix:].sum(dim=1, keepdim=True).clamp_min(1)
        mean = x[:, num_prefix:].sum(dim=1, keepdim=True) / count
        return torch.where(present, x, mean.to(x.dtype))


def num_prefix_tokens(layer: nn.Module) -> int:
    """CLS and, with it, DeiT's distillation token or DINOv2's registers."""
    if isinstance(layer, deit.DeiTLayer):
        return 2
    if isinstance(layer, registers.Dinov2WithRegistersLayer):
        return 1 + layer.attention.config.num_register_tokens
    return 1


def refusal_of_block(layer: nn.Module) -> str:
    """What in a layer is not understood; "" if everything is."""
    if type(layer) not in BLOCKS:
        return f"is a {type(layer).__name__}; understood are {', '.join(host.__name__ for host in BLOCKS)}"
    attention = layer.attention
    if type(attention) not in ATTENTIONS:
        return f"has attention of class {type(attention).__name__}"
    for name in PROJECTIONS:
        projection = getattr(attention, name, None)
        if type(projection) is not nn.Linear:
            return f"has attention.{name} of class {type(projection).__name__} instead of Linear"
    if type(layer.mlp) not in MLPS:
        return f"has an MLP of class {type(layer.mlp).__name__}"
    for name in ("norm1", "norm2", "layernorm_before", "layernorm_after"):
        norm = getattr(layer, name, None)
        if norm is not None and type(norm) is not nn.LayerNorm:
            return f"has {name} of class {type(norm).__name__} instead of LayerNorm"
    return ""
