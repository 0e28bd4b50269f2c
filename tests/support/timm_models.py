"""timm models made small: every kind that `ats.patch` accepts, and what tells the kinds apart."""

from __future__ import annotations

import timm
import torch
from plugin_models import small_settings
from torch import Tensor, nn

from ats.plugin.timm.model import VERSIONS
from ats.tokens import KeptTokens

# One or more of every kind; test_every_accepted_model_is_of_a_tested_kind says when one is missing.
CONTRACT = [
    "vit_tiny_patch16_224",
    "vit_base_patch16_224_miil",
    "vit_base_patch16_rpn_224",
    "vit_base_patch16_gap_224",
    "vit_base_patch16_clip_224",
    "vit_base_patch16_clip_quickgelu_224",
    "vit_base_patch16_siglip_224",
    "vit_base_patch16_siglip_gap_224",
    "vit_small_patch14_dinov2",
    "vit_small_patch14_reg4_dinov2",
    "vit_giant_patch14_dinov2",
    "vit_medium_patch16_reg4_gap_256",
    "vit_so150m_patch16_reg4_map_256",
    "deit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "deit3_small_patch16_224",
    "flexivit_small",
    "eva_large_patch14_196",
    "beit3_base_patch16_224",
    "aimv2_large_patch14_224",
    "beit_base_patch16_224",
    "beitv2_base_patch16_224",
    "eva_giant_patch14_224",
    "eva02_tiny_patch14_224",
    "eva02_base_patch14_224",
    "eva02_base_patch16_clip_224",
    "eva02_enormous_patch14_clip_224",
    "vit_small_patch16_dinov3",
    "vit_small_patch16_rope_224",
    "vit_small_patch16_rope_mixed_ape_224",
    "vit_medium_patch16_rope_reg1_gap_256",
    "vit_pe_core_tiny_patch16_384",
    "vit_pe_spatial_tiny_patch16_512",
    "vit_base_patch16_sapiens2",
    "test_vit3",
    "test_vit4",
    "vitamin_small_224",
    "vit_tiny_r_s16_p8_224",
]  # fmt: skip
# A few that differ in everything: CLS, distilled, registers, no CLS, attention pooling, bias, rotary, post-norm.
LAWS = [
    "deit3_small_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_base_patch16_siglip_gap_224",
    "vit_base_patch16_siglip_224",
    "beit_base_patch16_224",
    "vit_small_patch16_rope_mixed_ape_224",
    "vit_base_patch16_rpn_224",
]


def small_model(name: str, **settings: object) -> nn.Module:
    """timm's model in float64 and evaluation mode, with 5 classes and weights that make tokens differ."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{"num_classes": 5, **small_settings(name), **settings}).double().eval()
    for key, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.2)
        if parameter.ndim == 1 and key.endswith("weight"):  # of a norm
            parameter.data += 1
    return model


def images(model: nn.Module, count: int = 3) -> Tensor:
    """Random images of the model's size."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, *model.patch_embed.img_size, generator=generator, dtype=torch.float64)


def kinds(model: nn.Module) -> set[tuple[str, object]]:
    """What a model is made of, as far as ATS has to understand it."""
    block = model.blocks[0]
    attn = block.attn
    described = {
        "model": type(model),
        "patch embedding": type(model.patch_embed),
        "block": type(block),
        "attention": type(attn),
        "mlp": type(block.mlp),
        "norm": type(block.norm1),
        "final norm": type(model.norm),
        "qkv": "apart" if attn.qkv is None else "joint",
        "qkv bias": (attn.qkv is not None and attn.qkv.bias is not None, getattr(attn, "q_bias", None) is not None),
        "key heads": any(getattr(b.attn, "num_kv_groups", 1) > 1 for b in model.blocks),
        "q norm": type(getattr(attn, "q_norm", None)),
        "norm of heads": type(getattr(attn, "norm", None)),
        "gate": getattr(attn, "gate", None) is not None,
        "layer scale": (type(getattr(block, "ls1", None)), getattr(block, "gamma_1", None) is not None),
        "layer scale of the MLP": getattr(block, "gamma_2", None) is not None,
        "CLS": model.cls_token is not None,
        "registers": getattr(model, "reg_token", None) is not None,
        "pool": (model.global_pool, getattr(model, "pool_include_prefix", False)),
        "attention pool": type(getattr(model, "attn_pool", None)),
        "norm behind the pool": type(model.fc_norm),
        "rotary": (type(getattr(model, "rope", None)), getattr(model, "rope_mixed", False)),
        "rotate half": getattr(attn, "rotate_half", False),
        "relative bias": getattr(attn, "relative_position_bias_table", None) is not None,
        "pre-norm": type(getattr(model, "norm_pre", None)),
        "positions": getattr(model, "pos_embed", None) is not None,
    }
    return set(described.items())


def masked_host(host: nn.Module, x: Tensor, trace: list[KeptTokens]) -> tuple[Tensor, Tensor, Tensor]:
    """The same kept tokens by the host's own blocks, which go on with all tokens but cannot see the dropped ones.

    Returns:
        Features [B, N, C] after the final norm, which tokens are left [B, N], logits: the host's head on each image's
        remaining tokens alone.
    """
    x, rope = VERSIONS[type(host)]._embed(host, x)
    present = torch.ones(x.shape[:2], dtype=torch.bool)
    kept = {entry.block: entry for entry in trace}
    for index, block in enumerate(host.blocks):
        mask = torch.zeros(present.shape, dtype=x.dtype).masked_fill(~present, -torch.inf)[:, None, None]
        kwargs = {"shared_rel_pos_bias" if hasattr(host, "rel_pos_bias") else "attn_mask": mask}
        if rope is not None:
            kwargs["rope"] = rope[index] if host.rope_mixed else rope
        x = block(x, **kwargs)
        if index in kept:
            present = torch.zeros_like(present)
            positions = kept[index].position.split(kept[index].num_tokens.tolist())
            for row, columns in zip(present, positions, strict=True):
                row[columns] = True
    features = host.norm(x)
    logits = torch.cat([host.forward_head(image[left][None]) for image, left in zip(features, present, strict=True)])
    return features, present, logits
