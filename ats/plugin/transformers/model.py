"""Hugging Face transformers' ViT, DeiT and DINOv2 with ATS: base models and image classifiers (`host.py` says how).

A classifier and the base model inside it change their class together and share one state. What the versions change:

* hidden states and `last_hidden_state` have the host's shape [B, N, C], with exact zeros where a token was dropped;
* DINOv2's classifiers average the patches that are left.

Shapes: B images, N = P + grid tokens, P prefix tokens, C channels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from types import SimpleNamespace

from torch import Tensor, nn
from transformers.models.deit import modeling_deit as deit
from transformers.models.dinov2 import modeling_dinov2 as dinov2
from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers as registers
from transformers.models.vit import modeling_vit as vit
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from ats.errors import UserError
from ats.models.block import ATSBlock
from ats.models.cost import blocks_multiply_adds, conv_multiply_adds, linear_multiply_adds
from ats.plugin.handle import Patched, State, with_sampler
from ats.plugin.transformers import blocks as transformers_blocks
from ats.plugin.transformers.blocks import BLOCKS, FILL_DROPPED, FinalNorm, by_timms_names, refusal_of_block
from ats.reduction.sampling import BlockSampler
from ats.tokens import KeptTokens, RaggedTokens

HEADS = ("classifier", "cls_classifier", "distillation_classifier")


def dense_outputs(forward: Callable) -> Callable:
    """A base model's `forward`, with hidden states that are still packed made dense.

    Raises:
        UserError: the caller asks for what ATS does not have.
    """
    signature = inspect.signature(forward)

    @wraps(forward)
    def wrapped(self: nn.Module, *args: object, **kwargs: object) -> object:
        asked = signature.bind(self, *args, **kwargs).arguments
        refuse_arguments(self.config, asked | asked.get("kwargs", {}))
        return _dense(forward(self, *args, **kwargs))

    return wrapped


def over_kept_patches(forward: Callable) -> Callable:
    """The `forward` of a classifier that averages all patches: over those that are left."""

    @wraps(forward)
    def wrapped(self: nn.Module, *args: object, **kwargs: object) -> object:
        before = FILL_DROPPED.set(True)
        try:
            return forward(self, *args, **kwargs)
        finally:
            FILL_DROPPED.reset(before)

    return wrapped


def refuse_arguments(config: object, asked: dict) -> None:
    """Raise a UserError for an argument of a base model's forward pass that is not understood with ATS."""
    if asked.get("attention_mask") is not None or asked.get("is_causal", getattr(config, "is_causal", False)):
        raise UserError("attention_mask, is_causal: not understood with ATS. Call without, or ats.unpatch(model).")
    if asked.get("output_attentions", getattr(config, "output_attentions", False)):
        raise UserError(
            "output_attentions: ATS never computes the whole attention matrix. Call without it, or ats.unpatch(model); "
            "what ATS keeps is in model.ats.last after model.ats.trace = True."
        )


def _dense(out: object) -> object:
    if isinstance(out, RaggedTokens):
        return out.to_grid()
    if isinstance(out, tuple):
        return tuple(_dense(part) for part in out)
    if isinstance(out, dict):  # transformers' outputs
        for key, value in out.items():
            out[key] = _dense(value)
    return out


class ATSModel(Patched):
    """What the ATS versions have in common; never instantiated, see `adopt`."""

    def forward_tokens(self, pixel_values: Tensor) -> tuple[Tensor, list[KeptTokens]]:
        """Images [B, 3, H, W] -> logits [B, classes] (of a base model: last hidden state [B, N, C]) and, for every ATS
        block in order, the tokens it kept.
        """
        state = self.ats_state
        trace, state.trace = state.trace, True
        try:
            out = self(pixel_values, return_dict=True)
            kept = state.last
        finally:
            state.trace = trace
        if not trace:
            state.last = None
        return out.last_hidden_state if _base(self) is self else out.logits, kept

    def multiply_adds(self, trace: list[KeptTokens], input_shape: tuple[int, ...], *, paper: bool) -> Tensor:
        """Multiply-adds of each image [B] (float64) of a batch of `input_shape`; see `ats/flops.py`."""
        base = _base(self)
        projection = base.embeddings.patch_embeddings.projection
        sides = zip(input_shape[2:], projection.kernel_size, strict=True)
        grid = [side // patch for side, patch in sides]
        blocks = [
            layer
            if isinstance(layer, ATSBlock)
            else SimpleNamespace(attn=by_timms_names(layer.attention), mlp=layer.mlp)
            for layer in _layers(base)
        ]
        num_patches = grid[0] * grid[1]
        num_tokens = transformers_blocks.num_prefix_tokens(_layers(base)[0]) + num_patches
        total = blocks_multiply_adds(blocks, trace, num_tokens, input_shape[0], paper=paper)
        heads = [getattr(self, name, None) for name in HEADS] + [getattr(getattr(base, "pooler", None), "dense", None)]
        heads = [head for head in heads if isinstance(head, nn.Linear)]
        return total + conv_multiply_adds(projection, num_patches) + sum(map(linear_multiply_adds, heads))


class ATSViTModel(ATSModel, vit.ViTModel):
    """ViT."""

    forward = dense_outputs(vit.ViTModel.forward)


class ATSDeiTModel(ATSModel, deit.DeiTModel):
    """DeiT: a CLS and a distillation token."""

    forward = dense_outputs(deit.DeiTModel.forward)


class ATSDinov2Model(ATSModel, dinov2.Dinov2Model):
    """DINOv2."""

    forward = dense_outputs(dinov2.Dinov2Model.forward)


class ATSDinov2WithRegistersModel(ATSModel, registers.Dinov2WithRegistersModel):
    """DINOv2 with registers."""

    forward = dense_outputs(registers.Dinov2WithRegistersModel.forward)


class ATSViTForImageClassification(ATSModel, vit.ViTForImageClassification):
    """ViT, read out at CLS."""


class ATSDeiTForImageClassification(ATSModel, deit.DeiTForImageClassification):
    """DeiT, read out at CLS."""


class ATSDeiTForImageClassificationWithTeacher(ATSModel, deit.DeiTForImageClassificationWithTeacher):
    """DeiT, read out at CLS and at the distillation token."""


class ATSDinov2ForImageClassification(ATSModel, dinov2.Dinov2ForImageClassification):
    """DINOv2, read out at CLS and the mean of the patches."""

    forward = over_kept_patches(dinov2.Dinov2ForImageClassification.forward)


class ATSDinov2WithRegistersForImageClassification(ATSModel, registers.Dinov2WithRegistersForImageClassification):
    """DINOv2 with registers, read out at CLS and the mean of the patches."""

    forward = over_kept_patches(registers.Dinov2WithRegistersForImageClassification.forward)


MODELS: dict[type[nn.Module], type[ATSModel]] = {
    vit.ViTModel: ATSViTModel,
    vit.ViTForImageClassification: ATSViTForImageClassification,
    deit.DeiTModel: ATSDeiTModel,
    deit.DeiTForImageClassification: ATSDeiTForImageClassification,
    deit.DeiTForImageClassificationWithTeacher: ATSDeiTForImageClassificationWithTeacher,
    dinov2.Dinov2Model: ATSDinov2Model,
    dinov2.Dinov2ForImageClassification: ATSDinov2ForImageClassification,
    registers.Dinov2WithRegistersModel: ATSDinov2WithRegistersModel,
    registers.Dinov2WithRegistersForImageClassification: ATSDinov2WithRegistersForImageClassification,
}
HOSTS = {version: host for host, version in MODELS.items()}
for _host, _version in MODELS.items():
    # save_pretrained writes the class's name into config.json, and pipelines look it up: it stays the host's.
    _version.__name__ = _host.__name__
    # transformers finds what it can record (output_hidden_states) by the class, noted when a model is built.
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(_version), _host._can_record_outputs)


def _base(model: nn.Module) -> nn.Module:
    """The base model in a classifier, or the model itself."""
    return getattr(model, model.base_model_prefix, model)


def _layers(base: nn.Module) -> nn.ModuleList:
    return base.encoder.layer if hasattr(base, "encoder") else base.layers


def adopt(model: nn.Module, samplers: dict[int, BlockSampler]) -> None:
    """Make `model` its ATS version with these samplers.

    Raises:
        UserError: they merge or fuse tokens.
    """
    if not all(isinstance(sampler, BlockSampler) for sampler in samplers.values()):
        raise UserError("The samplers tome and evit are for timm's models and MODEL.NAME ViT, not for transformers'.")
    base = _base(model)
    parts = [model] if base is model else [model, base]
    state = next((part.ats_state for part in parts if type(part) in HOSTS), None) or State()
    for part in parts:
        part.ats_state = state
        part.__class__ = MODELS.get(type(part), type(part))
    base.layernorm.ats_state = state
    base.layernorm.__class__ = FinalNorm
    with_sampler(_layers(base), samplers, BLOCKS)


def release(model: nn.Module) -> None:
    """Make `model` its host again."""
    base = _base(model)
    with_sampler(_layers(base), {}, BLOCKS)
    for part in [model] if base is model else [model, base]:
        if type(part) in HOSTS:
            part.__class__ = HOSTS[type(part)]
            del part.ats_state
    if type(base.layernorm) is FinalNorm:
        base.layernorm.__class__ = nn.LayerNorm
        del base.layernorm.ats_state


def num_blocks(model: nn.Module) -> int:
    """Blocks of the network."""
    return len(_layers(_base(model)))


def num_prefix_tokens(model: nn.Module) -> int:
    """Tokens that are always kept; the first of them is CLS."""
    return transformers_blocks.num_prefix_tokens(_layers(_base(model))[0])


def default_score(model: nn.Module) -> str:
    """The paper's: all of them read CLS."""
    return "cls_attention_value_norm"


_MASKED = "reconstructs every patch, also those that ATS would drop"
_BACKBONE = "gives feature maps to a head that needs every patch"
# Why classes that come near are refused; any other class is refused as one that is not known.
REASONS = {
    "ViTForMaskedImageModeling": _MASKED,
    "DeiTForMaskedImageModeling": _MASKED,
    "Dinov2Backbone": _BACKBONE,
    "Dinov2WithRegistersBackbone": _BACKBONE,
}


def refusal(model: nn.Module) -> str:
    """Why ATS cannot be put into this model; "" if it can."""
    if type(model) not in MODELS:
        known = ", ".join(host.__name__ for host in MODELS)
        reason = REASONS.get(type(model).__name__)
        return f"{reason + '; ' if reason else ''}the classes understood are transformers' {known}, and no subclass"
    base, prefix = _base(model), model.base_model_prefix
    if type(base) in HOSTS:
        return f"its {prefix} has ATS already; take that out first: ats.unpatch(model.{prefix})"
    if type(base) not in MODELS:
        return f"its {prefix} is a {type(base).__name__}"
    if len(_layers(base)) == 0:
        return "it has no blocks"
    if type(base.layernorm) is not nn.LayerNorm:
        return f"its final norm is a {type(base.layernorm).__name__}"
    for index, layer in enumerate(_layers(base)):
        reason = refusal_of_block(layer)
        if reason:
            return f"block {index} {reason}"
    return ""
