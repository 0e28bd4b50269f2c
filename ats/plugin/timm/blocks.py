"""timm's transformer blocks on ragged tokens: for every block class that is understood, a subclass with ATS.

A host block becomes its ATS version by its `__class__` alone (`host.with_sampler`), so it stays the same object with
the same children, parameters and hooks, and becomes itself again the same way. What the versions add to `ATSBlock`:

* projections that are joint, joint with separate biases (BEiT, EVA), or apart, also with fewer key than query heads;
* norm and gate behind the attention, LayerScale as a module or as `gamma_1`, `gamma_2`, norms behind the branches;
* rotary embedding: rows of the kept positions, taken from the host's table;
* relative position bias (BEiT): rows and columns of the kept positions.
"""

from __future__ import annotations

from itertools import chain

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionRope, GluMlp, LayerNormFp32, Mlp, RmsNorm, RmsNormFp32, SwiGLU
from timm.layers import LayerNorm as TimmLayerNorm
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from timm.models import beit, eva
from timm.models.vision_transformer import Block, ResPostBlock
from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn

from ats.models.block import ATSBlock
from ats.tokens import RaggedTokens

# Classes whose forward pass is known, compared exactly: a subclass may compute something else.
ATTENTIONS = (Attention, AttentionRope, eva.EvaAttention, beit.Attention)
MLPS = (Mlp, GluMlp, SwiGLU, GeGluMlp)
NORMS = (nn.Identity, nn.LayerNorm, TimmLayerNorm, LayerNormFp32, RmsNorm, RmsNormFp32)


class TimmBlock(ATSBlock):
    """What the ATS versions of timm's blocks have in common; never instantiated, see `host.with_sampler`."""

    def attention_output(self, out: Tensor, x: Tensor) -> Tensor:
        """Heads' joint output [T, H*D] and attention input [T, C] -> the attention's branch [T, C]."""
        attn = self.attn
        out = getattr(attn, "norm", _identity)(out)
        if getattr(attn, "gate", None) is not None:
            out = out * attn.gate(x).sigmoid()
        return self.scale_branch(attn.proj_drop(attn.proj(out)), 1)

    def mlp_output(self, x: Tensor) -> Tensor:
        """The MLP's branch [T, C] of tokens [T, C]."""
        return self.scale_branch(self.mlp(self.norm2(x)), 2)

    def scale_branch(self, x: Tensor, branch: int) -> Tensor:
        """LayerScale of branch 1 (attention) or 2 (MLP)."""
        return (self.ls1, self.ls2)[branch - 1](x)

    def project_q(self, x: Tensor, tokens: RaggedTokens | None = None) -> Tensor:
        """Queries [T, H, D]; `tokens` None: of CLS, which rotary embedding leaves as it is."""
        attn = self.attn
        q = attn.q_proj(x) if attn.qkv is None else self._joint_projection(x, slice(attn.proj.in_features))
        return self._place(getattr(attn, "q_norm", _identity)(q.unflatten(-1, (attn.num_heads, -1))), tokens)

    def project_kv(self, x: Tensor, tokens: RaggedTokens) -> tuple[Tensor, Tensor]:
        """Keys and values, each [T, H, D]."""
        attn = self.attn
        if attn.qkv is None:
            num_heads = getattr(attn, "num_kv_heads", attn.num_heads)
            k, v = (projection(x).unflatten(-1, (num_heads, -1)) for projection in (attn.k_proj, attn.v_proj))
        else:
            kv = self._joint_projection(x, slice(attn.proj.in_features, None))
            k, v = kv.unflatten(-1, (2, attn.num_heads, -1)).unbind(1)
        k = self._place(getattr(attn, "k_norm", _identity)(k), tokens)
        groups = getattr(attn, "num_kv_groups", 1)
        return (k, v) if groups == 1 else tuple(t.repeat_interleave(groups, dim=1) for t in (k, v))

    def attention_bias(self, queries: RaggedTokens | None, keys: RaggedTokens) -> Tensor | None:
        """BEiT's relative position bias [S, H, Mq, Mk] of the tokens that are there."""
        if getattr(self.attn, "relative_position_bias_table", None) is None:
            return super().attention_bias(queries, keys)
        table = self.attn._get_rel_pos_bias()[0]
        column = keys.layout.pad(keys.lookup())[:, None]
        row = torch.zeros_like(column[:, :, :1]) if queries is None else queries.layout.pad(queries.lookup())[..., None]
        return table[:, row, column].transpose(0, 1)

    def _joint_projection(self, x: Tensor, part: slice) -> Tensor:
        """The outputs `part` of the projection to queries, keys and values."""
        attn = self.attn
        bias = attn.qkv.bias
        if getattr(attn, "q_bias", None) is not None:
            bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        return F.linear(x, attn.qkv.weight[part], None if bias is None else bias[part])

    def _place(self, x: Tensor, tokens: RaggedTokens | None) -> Tensor:
        """Queries or keys [T, h, D] with the rotary embedding of their positions."""
        if tokens is None or tokens.rotary is None:
            return x
        embedding = tokens.rotary.index_select(0, tokens.lookup())
        return apply_rot_embed_cat(x, embedding, half=getattr(self.attn, "rotate_half", False)).type_as(x)


class GammaScale:
    """LayerScale kept as parameters `gamma_1` and `gamma_2` of the block, or absent."""

    def scale_branch(self, x: Tensor, branch: int) -> Tensor:
        """LayerScale of branch 1 (attention) or 2 (MLP)."""
        gamma = (self.gamma_1, self.gamma_2)[branch - 1]
        return x if gamma is None else gamma * x


class PostNorm:
    """Norms behind the branches instead of before them: scores look at the tokens as they come."""

    def attention_input(self, x: Tensor) -> Tensor:
        """What the attention reads of tokens [T, C]."""
        return x

    def mlp_output(self, x: Tensor) -> Tensor:
        """The MLP's branch [T, C] of tokens [T, C]."""
        return self.norm2(self.mlp(x))

    def scale_branch(self, x: Tensor, branch: int) -> Tensor:
        """The norm behind the attention."""
        return self.norm1(x)


class ATSViTBlock(TimmBlock, Block):
    """ViT, DeiT, CLIP, DINOv2, SigLIP, ..."""


class ATSResPostBlock(PostNorm, TimmBlock, ResPostBlock):
    """ViT with norms behind the branches."""


class ATSBeitBlock(GammaScale, TimmBlock, beit.Block):
    """BEiT and BEiT v2."""


class ATSEvaBlock(GammaScale, TimmBlock, eva.EvaBlock):
    """EVA, EVA-02, Perception Encoder, DINOv3, ViTs with rotary embedding."""


class ATSEvaBlockPostNorm(PostNorm, TimmBlock, eva.EvaBlockPostNorm):
    """EVA-02 enormous."""


BLOCKS: dict[type[nn.Module], type[TimmBlock]] = {
    Block: ATSViTBlock,
    ResPostBlock: ATSResPostBlock,
    beit.Block: ATSBeitBlock,
    eva.EvaBlock: ATSEvaBlock,
    eva.EvaBlockPostNorm: ATSEvaBlockPostNorm,
}


def refusal_of_block(block: nn.Module) -> str:
    """What in a block is not understood; "" if everything is."""
    if type(block) not in BLOCKS:
        known = ", ".join(f"{host.__module__.removeprefix('timm.models.')}.{host.__name__}" for host in BLOCKS)
        return f"is a {type(block).__name__}; understood are {known}"
    if type(block.attn) not in ATTENTIONS:
        return f"has attention of class {type(block.attn).__name__}"
    if block.attn.qkv is not None and type(block.attn.qkv) is not nn.Linear:
        return f"has attn.qkv of class {type(block.attn.qkv).__name__} instead of Linear"
    if type(block.mlp) not in MLPS or any(isinstance(module, nn.Conv2d) for module in block.mlp.modules()):
        return f"has an MLP of class {type(block.mlp).__name__}"
    norms = chain((block.norm1, block.norm2), (getattr(block.attn, n, None) for n in ("q_norm", "k_norm", "norm")))
    for norm in norms:
        if norm is not None and type(norm) not in NORMS:
            return f"has a norm of class {type(norm).__name__}"
    return ""


def _identity(x: Tensor) -> Tensor:
    return x
