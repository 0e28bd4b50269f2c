"""Hugging Face models made small, with random weights: every class that `ats.patch` accepts, and what differs in it."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from ats.tokens import KeptTokens

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}
VIT = {"intermediate_size": 64}
DINO = {"mlp_ratio": 2, "layerscale_value": 1.0}
VIDEO = {"num_frames": 4, "tubelet_size": 2}
# Name -> (class, what its config has beside SIZES).
CONTRACT: dict[str, tuple[str, dict]] = {
    "vit": ("ViTModel", VIT),
    "vit classifier": ("ViTForImageClassification", VIT),
    "vit classifier, eager, no bias": (
        "ViTForImageClassification",
        VIT | {"attn_implementation": "eager", "qkv_bias": False},
    ),
    "deit": ("DeiTModel", VIT),
    "deit classifier": ("DeiTForImageClassification", VIT),
    "deit with teacher": ("DeiTForImageClassificationWithTeacher", VIT),
    "dinov2": ("Dinov2Model", DINO),
    "dinov2 classifier": ("Dinov2ForImageClassification", DINO),
    "dinov2 giant": ("Dinov2ForImageClassification", DINO | {"use_swiglu_ffn": True}),
    "registers": ("Dinov2WithRegistersModel", DINO | {"num_register_tokens": 3}),
    "registers classifier": ("Dinov2WithRegistersForImageClassification", DINO | {"num_register_tokens": 3}),
    "dinov3": ("DINOv3ViTModel", VIT | {"num_register_tokens": 3, "layerscale_value": 1.0}),
    "dinov3, gated": ("DINOv3ViTModel", VIT | {"use_gated_mlp": True, "layerscale_value": 1.0}),
    "clip": ("CLIPVisionModel", VIT),
    "clip with projection": ("CLIPVisionModelWithProjection", VIT | {"projection_dim": 5}),
    "siglip": ("SiglipVisionModel", VIT),
    "siglip, no head": ("SiglipVisionModel", VIT | {"vision_use_head": False}),
    "siglip 2": ("Siglip2VisionModel", VIT | {"num_patches": 16}),
    "mae": ("ViTMAEModel", VIT | {"mask_ratio": 0.0}),
    "mae, masked": ("ViTMAEModel", VIT | {"mask_ratio": 0.25}),
    "videomae": ("VideoMAEModel", VIT | VIDEO | {"use_mean_pooling": False}),
    "videomae, no norm": ("VideoMAEModel", VIT | VIDEO),
    "videomae classifier": ("VideoMAEForVideoClassification", VIT | VIDEO),
}
# ViT's and DeiT's eager attention takes the softmax in float32, whatever the weights are in; ATS and the rest do not.
TOLERANCE = {"vit classifier, eager, no bias": 1e-4}
# What differs in everything: one prefix token, two with two heads, LayerScale and pooled patches, registers, videos
# without CLS.
LAWS = ["vit classifier", "deit with teacher", "dinov2 giant", "registers classifier", "videomae classifier"]


def small_model(name: str, **settings: object) -> nn.Module:
    """The model in float64 and evaluation mode, with weights that make tokens differ."""
    kind, own = CONTRACT.get(name, (name, {}))
    torch.manual_seed(0)
    host = getattr(transformers, kind)
    model = host(host.config_class(**SIZES | own | settings)).double().eval()
    for key, parameter in model.named_parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.2)
        if parameter.ndim == 1 and not key.endswith("bias"):  # of a norm or LayerScale
            parameter.data += 1
    return model


def images(count: int = 3, side: int = 32) -> Tensor:
    """Random images."""
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def batch(model: nn.Module, count: int = 3, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Random images, or videos, with all that the model's `forward` needs of them."""
    x, base = images(count).to(dtype), base_of(model)
    if type(base).__name__.startswith("VideoMAE"):
        generator = torch.Generator().manual_seed(1)
        return {"pixel_values": torch.randn(count, 4, 3, 32, 32, generator=generator, dtype=x.dtype)}
    if isinstance(base, transformers.Siglip2VisionModel):
        patches = nn.functional.unfold(x, 8, stride=8).mT
        mask = torch.ones(patches.shape[:2], dtype=torch.int64)
        return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": torch.full((count, 2), 4)}
    if isinstance(base, transformers.ViTMAEModel):
        return {"pixel_values": x, "noise": torch.rand(count, 16, generator=torch.Generator().manual_seed(2))}
    return {"pixel_values": x}


def first_output(model: nn.Module, x: Tensor | dict[str, Tensor], **kwargs: object) -> Tensor:
    """Logits, or the last hidden state of a base model."""
    return (model(**x, **kwargs) if isinstance(x, dict) else model(x, **kwargs))[0]


def base_of(model: nn.Module) -> nn.Module:
    """The base model in a classifier, or the model itself."""
    if hasattr(model, "rope_embeddings"):  # DINOv3, in which `model` is the encoder
        return model
    return getattr(model, model.base_model_prefix, model)


def layers_of(model: nn.Module) -> nn.ModuleList:
    """The layers of the transformer."""
    base = base_of(model)
    holder = base.model if hasattr(base, "rope_embeddings") else getattr(base, "encoder", base)
    return holder.layer if hasattr(holder, "layer") else holder.layers


def embedded(base: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """The tokens [B, N, C] that enter the first layer."""
    inputs = {name: value for name, value in inputs.items() if name != "pixel_attention_mask"}
    if type(base).__name__.startswith("VideoMAE"):
        inputs["bool_masked_pos"] = None
    x = base.embeddings(*inputs.values())
    x = x[0] if isinstance(x, tuple) else x  # ViTMAE's, with its mask
    return getattr(base, "pre_layrnorm", nn.Identity())(x)  # CLIP's name


def layer_seeing(layer: nn.Module, x: Tensor, present: Tensor, **kwargs: object) -> Tensor:
    """A layer of the host whose attention sees the tokens `present` [B, N] alone."""
    mask = torch.zeros(present.shape, dtype=x.dtype).masked_fill(~present, -torch.inf)[:, None, None]
    if not isinstance(getattr(layer.attention if hasattr(layer, "attention") else None, "attention", None), nn.Module):
        return layer(x, mask, **kwargs)

    def masked(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, _: None, scaling: float, **__: object):
        out = nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scaling)
        return out.transpose(1, 2), None

    with pytest.MonkeyPatch.context() as patch:  # VideoMAE's, which takes no mask
        transformers.AttentionInterface.register("masked", masked)
        patch.setattr(layer.attention.attention.config, "_attn_implementation_internal", "masked")
        return layer(x, **kwargs)


def masked_host(
    host: nn.Module, inputs: dict[str, Tensor], trace: list[KeptTokens]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The same kept tokens by the host's own layers, which go on with all tokens but cannot see the dropped ones.

    Returns:
        Features [B, N, C] after the final norm; which tokens are left [B, N]; of the hidden states before and behind
        every layer.
    """
    base = base_of(host)
    rope = {"position_embeddings": base.rope_embeddings(*inputs.values())} if hasattr(base, "rope_embeddings") else {}
    x = embedded(base, inputs)
    present = torch.ones(x.shape[:2], dtype=torch.bool)
    kept, states = {entry.block: entry for entry in trace}, [x]
    for index, layer in enumerate(layers_of(host)):
        x = layer_seeing(layer, x, present, **rope)
        if index in kept:
            present = torch.zeros_like(present)
            positions = kept[index].position.split(kept[index].num_tokens.tolist())
            for row, columns in zip(present, positions, strict=True):
                row[columns] = True
        states.append(x.masked_fill(~present[..., None], 0))
    if hasattr(base, "pre_layrnorm"):  # its final norm is for CLS alone
        return x, present, states
    norm = next(getattr(base, name) for name in ("layernorm", "post_layernorm", "norm") if hasattr(base, name))
    return x if norm is None else norm(x), present, states


def head_on(host: nn.Module, tokens: Tensor) -> Tensor:
    """The host's head on these tokens [N, C] of one image: logits [classes]."""
    if hasattr(host, "visual_projection"):
        return host.visual_projection(base_of(host).post_layernorm(tokens[0]))
    with pytest.MonkeyPatch.context() as patch:
        out = BaseModelOutputWithPooling(last_hidden_state=tokens[None])
        patch.setattr(base_of(host), "forward", lambda *args, **kwargs: out)
        return host(**batch(host, 1)).logits[0]
