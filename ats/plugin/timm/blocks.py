"""timm's transformer blocks on ragged tokens: a subclass with ATS of every supported block class.

`handle.attach_to` changes a block's `__class__`. The versions add to `ATSBlock`:

* joint projections, joint ones with separate biases (BEiT, EVA), separate ones, and grouped keys;
* a norm and a gate after the attention, LayerScale as a module or as `gamma_1` and `gamma_2`, post-norm;
* rotary embedding: the rows of the kept positions, from the model's table;
* relative position bias (BEiT): the rows and columns of the kept positions.
"""

from __future__ import annotations

import torch
from timm.layers import Attention, AttentionRope, GluMlp, LayerNormFp32, Mlp, RmsNorm, RmsNormFp32, SwiGLU
from timm.layers import LayerNorm as TimmLayerNorm
from timm.models import beit, eva
from timm.models.vision_transformer import Block, ResPostBlock
from timm.models.vitamin import GeGluMlp
from torch import Tensor, nn

from ats.errors import UserError
from ats.models.block import ATSBlock
from ats.models.weights import Projected, is_linear, is_plain, linear_part, refuse_stale, stale
from ats.plugin.handle import original_class, version_of
from ats.plugin.rotary import rotated
from ats.reduction import Step
from ats.tokens import RaggedTokens

# Classes whose forward pass is known, compared exactly: a subclass may compute something else.
ATTENTIONS = (Attention, AttentionRope, eva.EvaAttention, beit.Attention)
MLPS = (Mlp, GluMlp, SwiGLU, GeGluMlp)
NORMS = (nn.Identity, nn.LayerNorm, TimmLayerNorm, LayerNormFp32, RmsNorm, RmsNormFp32)
NO_NORM = nn.Identity()


class TimmBlock(ATSBlock):
    """Base of the ATS versions of timm's blocks; never instantiated, see `handle.attach_to`."""

    def forward(self, tokens: RaggedTokens, **kwargs: object) -> RaggedTokens:
        if isinstance(tokens, Tensor):  # a model without ATS calls it
            raise UserError(
                "This block has ATS, but the model that runs it does not: it shares the block with another model, "
                "which ats.patch changed. Give each its own with copy.deepcopy, or ats.unpatch the other one."
            )
        return super().forward(tokens)

    def attention_output(self, out: Tensor, step: Step) -> Tensor:
        attn = self.attn
        out = getattr(attn, "norm", NO_NORM)(out)
        if getattr(attn, "gate", None) is not None:
            out = out * attn.gate(step.kept_input).sigmoid()
        return self.scale_branch(attn.proj_drop(attn.proj(out)), 1)

    def mlp_output(self, x: Tensor) -> Tensor:
        return self.scale_branch(self.mlp(self.norm2(x)), 2)

    def scale_branch(self, x: Tensor, branch: int) -> Tensor:
        """LayerScale of branch 1 (attention) or 2 (MLP)."""
        return (self.ls1, self.ls2)[branch - 1](x)

    def project_q(self, x: Tensor, tokens: RaggedTokens | None = None) -> Tensor:
        """Queries [T, H, D]; `tokens` None: of CLS, which rotary embedding does not change."""
        attn = self.attn
        q = attn.q_proj(x) if attn.qkv is None else self.joint_projection(x, slice(attn.proj.in_features))
        return self._place(getattr(attn, "q_norm", NO_NORM)(q.unflatten(-1, (attn.num_heads, -1))), tokens)

    def project_kv(self, x: Tensor, tokens: RaggedTokens) -> tuple[Tensor, Tensor]:
        attn = self.attn
        refuse_stale(attn)
        if attn.qkv is None:
            num_heads = getattr(attn, "num_kv_heads", attn.num_heads)
            k, v = (projection(x).unflatten(-1, (num_heads, -1)) for projection in (attn.k_proj, attn.v_proj))
        else:
            kv = self.joint_projection(x, slice(attn.proj.in_features, None))
            k, v = kv.unflatten(-1, (2, attn.num_heads, -1)).unbind(1)
        k = self._place(getattr(attn, "k_norm", NO_NORM)(k), tokens)
        groups = getattr(attn, "num_kv_groups", 1)
        return (k, v) if groups == 1 else (k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1))

    def attention_bias(self, queries: RaggedTokens | None, keys: RaggedTokens) -> Tensor | None:
        """BEiT's relative position bias [S, H, Mq, Mk] of the present tokens."""
        by_size = super().attention_bias(queries, keys)
        if getattr(self.attn, "relative_position_bias_table", None) is None:
            return by_size
        table = self.attn._get_rel_pos_bias()[0]
        column = keys.layout.pad(keys.lookup())[:, None]
        row = torch.zeros_like(column[:, :, :1]) if queries is None else queries.layout.pad(queries.lookup())[..., None]
        bias = table[:, row, column].transpose(0, 1)
        return bias if by_size is None else bias + by_size

    def joint_projection(self, x: Tensor | Projected, part: slice) -> Tensor:
        attn, bias = self.attn, None
        if getattr(attn, "q_bias", None) is not None:
            bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        return linear_part(attn.qkv, x, part, bias)

    def _place(self, x: Tensor, tokens: RaggedTokens | None) -> Tensor:
        return rotated(x, tokens, half=getattr(self.attn, "rotate_half", False))


class GammaScale:
    """LayerScale as parameters `gamma_1` and `gamma_2` of the block, or none."""

    def scale_branch(self, x: Tensor, branch: int) -> Tensor:
        gamma = (self.gamma_1, self.gamma_2)[branch - 1]
        return x if gamma is None else gamma * x


class PostNorm:
    """Norms after the branches, not before: scores are computed from unnormalised tokens."""

    def attention_input(self, x: Tensor) -> Tensor:
        return x

    def mlp_output(self, x: Tensor) -> Tensor:
        return self.norm2(self.mlp(x))

    def scale_branch(self, x: Tensor, branch: int) -> Tensor:
        """The norm after the attention."""
        return self.norm1(x)


VERSIONS: dict[type[nn.Module], type[TimmBlock]] = {
    Block: version_of(Block, TimmBlock, name="ATSViTBlock"),  # ViT, DeiT, CLIP, DINOv2, SigLIP, ...
    ResPostBlock: version_of(ResPostBlock, PostNorm, TimmBlock),
    beit.Block: version_of(beit.Block, GammaScale, TimmBlock, name="ATSBeitBlock"),  # BEiT, BEiT v2
    eva.EvaBlock: version_of(eva.EvaBlock, GammaScale, TimmBlock),  # EVA, PE, DINOv3, ViTs with rotary embedding
    eva.EvaBlockPostNorm: version_of(eva.EvaBlockPostNorm, PostNorm, TimmBlock),  # EVA-02 enormous
}


def refusal_of_block(block: nn.Module) -> str:
    """What ATS does not support in this block; "" if it supports everything."""
    if original_class(block) not in VERSIONS:
        known = ", ".join(f"{kind.__module__.removeprefix('timm.models.')}.{kind.__name__}" for kind in VERSIONS)
        return f"is a {type(block).__name__}; supported are {known}"
    if original_class(block.attn) not in ATTENTIONS:
        return f"has attention of class {type(block.attn).__name__}"
    if "forward" in vars(block.attn):
        return "has an attn whose forward was replaced"
    qkv = block.attn.qkv
    if qkv is not None and not is_linear(qkv):
        return f"has attn.qkv of class {type(qkv).__name__}, which is not a linear layer"
    if qkv is not None and getattr(block.attn, "q_bias", None) is not None and not is_plain(qkv):
        return f"has attn.qkv of class {type(qkv).__name__}, but its attention reads the weight, not the output"
    for name, layer in (("attn", block.attn), ("attn.qkv", block.attn.qkv)):
        if layer is not None and (reason := stale(layer)):
            return f"has {name} {reason}"
    if original_class(block.mlp) not in MLPS or any(isinstance(module, nn.Conv2d) for module in block.mlp.modules()):
        return f"has an MLP of class {type(block.mlp).__name__}"
    for norm in (block.norm1, block.norm2, *(getattr(block.attn, name, None) for name in ("q_norm", "k_norm", "norm"))):
        if norm is not None and original_class(norm) not in NORMS:
            return f"has a norm of class {type(norm).__name__}"
    return ""
