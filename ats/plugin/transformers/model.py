"""Hugging Face transformers' ViT, DeiT and DINOv2 with ATS: base models and image classifiers.

A classifier and its base model change their class together (`handle.py`) and share one state. Hidden states keep their
usual shape [B, N, C]; what dropped tokens hold is `model.ats.restore`, by default exact zeros. DINOv2's classifiers
average the kept patches, or all that are restored.

Shapes: B images, N = P + grid tokens, P prefix tokens, C channels.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import wraps
from types import SimpleNamespace

from torch import Tensor, nn
from transformers.models.deit import modeling_deit as deit
from transformers.models.dinov2 import modeling_dinov2 as dinov2
from transformers.models.dinov2_with_registers import modeling_dinov2_with_registers as registers
from transformers.models.vit import modeling_vit as vit

from ats.compat import transformers_record_registry
from ats.errors import UserError
from ats.models.block import ATSBlock
from ats.models.cost import BlockGrid, conv_multiply_adds, linear_multiply_adds, vit_block_multiply_adds
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
from ats.plugin.transformers.blocks import (
    FILL_DROPPED,
    FinalNorm,
    by_timms_names,
    num_prefix_of,
    refusal_of_block,
)
from ats.plugin.transformers.blocks import VERSIONS as BLOCK_VERSIONS
from ats.reduction import Reduction
from ats.restore import restored
from ats.tokens import BlockRecord, KeptTokens, RaggedTokens

HEADS = ("classifier", "cls_classifier", "distillation_classifier")


def dense_outputs(forward: Callable) -> Callable:
    """A base model's `forward` that returns dense hidden states and refuses arguments that ATS does not support."""
    signature = inspect.signature(forward)

    @wraps(forward)
    def wrapped(self: nn.Module, *args: object, **kwargs: object) -> object:
        asked, config = signature.bind(self, *args, **kwargs).arguments, self.config
        asked |= asked.get("kwargs", {})
        if asked.get("attention_mask") is not None or asked.get("is_causal", getattr(config, "is_causal", False)):
            raise UserError("attention_mask, is_causal: not supported with ATS. Call without, or ats.unpatch(model).")
        if asked.get("output_attentions", getattr(config, "output_attentions", False)):
            raise UserError(
                "output_attentions: ATS never computes the whole attention matrix. Call without it, or "
                "ats.unpatch(model); what ATS keeps is in model.ats.last after model.ats.trace = True."
            )
        check_blocks(self, _layers(self))
        images = asked.get("pixel_values")
        with self.fastest_kernels(images) if isinstance(images, Tensor) else nullcontext():
            return _dense(forward(self, *args, **kwargs))

    return wrapped


def over_kept_patches(forward: Callable) -> Callable:
    """A classifier's `forward` that averages the kept patches, not all."""

    @wraps(forward)
    def wrapped(self: nn.Module, *args: object, **kwargs: object) -> object:
        before = FILL_DROPPED.set(True)
        try:
            return forward(self, *args, **kwargs)
        finally:
            FILL_DROPPED.reset(before)

    return wrapped


def _dense(out: object) -> object:
    if isinstance(out, RaggedTokens):
        return restored(out)
    if isinstance(out, tuple):
        return tuple(_dense(part) for part in out)
    if isinstance(out, dict):  # transformers' outputs
        for key, value in out.items():
            out[key] = _dense(value)
    return out


def _base(model: nn.Module) -> nn.Module:
    """The base model in a classifier, or the model itself."""
    return getattr(model, model.base_model_prefix, model)


def _layers(model: nn.Module) -> nn.ModuleList:
    base = _base(model)
    return base.encoder.layer if hasattr(base, "encoder") else base.layers


def network(model: nn.Module) -> dict[str, object]:
    """What `plan_reductions` needs to know about a model."""
    layers = _layers(model)
    return {"depth": len(layers), "num_prefix_tokens": num_prefix_of(layers[0]), "has_cls": True}


def default_score(model: nn.Module) -> str:
    """The paper's: all heads read CLS."""
    return "cls_attention_value_norm"


class HubModel(Patched):
    """Base of the ATS versions; never instantiated, see `attach`."""

    layouts = ("packed",)
    num_prefix_tokens = property(lambda self: num_prefix_of(_layers(self)[0]))
    _patch_projection = property(lambda self: _base(self).embeddings.patch_embeddings.projection)

    def forward_tokens(self, pixel_values: Tensor) -> tuple[Tensor, list[KeptTokens]]:
        """Images [B, 3, H, W] -> logits [B, classes] (of a base model: last hidden state [B, N, C]) and the tokens that
        every block with a reduction kept, in order.
        """
        state = self.ats_state
        trace, state.trace, state.last = state.trace, True, []
        try:
            out, kept = self(pixel_values, return_dict=True), state.last
        finally:
            state.trace = trace
        if not trace:
            state.last = None
        return out.last_hidden_state if _base(self) is self else out.logits, kept

    def block_list(self) -> list[nn.Module]:
        return list(_layers(self))

    def block_grids(self, input_shape: Sequence[int]) -> list[BlockGrid]:
        return [BlockGrid.of(1, *self._patch_grid(input_shape))] * len(_layers(self))

    def _patch_grid(self, input_shape: Sequence[int]) -> tuple[int, int]:
        sides = zip(input_shape[2:], self._patch_projection.kernel_size, strict=True)
        return tuple(side // patch for side, patch in sides)

    def block_cost(self, block: nn.Module, record: BlockRecord, grid: BlockGrid, *, paper: bool, frames: int) -> Tensor:
        if not isinstance(block, ATSBlock):
            block = SimpleNamespace(attn=by_timms_names(block.attention), mlp=block.mlp)
        return vit_block_multiply_adds(block, record, paper=paper)

    def stem_multiply_adds(self, trace: Sequence[KeptTokens], input_shape: Sequence[int]) -> float:
        height, width = self._patch_grid(input_shape)
        pooler = getattr(_base(self), "pooler", None)
        heads = [getattr(self, name, None) for name in HEADS] + [getattr(pooler, "dense", None)]
        heads = [head for head in heads if is_linear(head)]
        return conv_multiply_adds(self._patch_projection, height * width) + sum(map(linear_multiply_adds, heads))


BASES = (vit.ViTModel, deit.DeiTModel, dinov2.Dinov2Model, registers.Dinov2WithRegistersModel)
READING_PREFIX = (  # classifiers of CLS, or of CLS and the distillation token
    vit.ViTForImageClassification,
    deit.DeiTForImageClassification,
    deit.DeiTForImageClassificationWithTeacher,
)
AVERAGES = "its head averages the patches, but a merged token counts for several"
AVERAGING = (dinov2.Dinov2ForImageClassification, registers.Dinov2WithRegistersForImageClassification)
VERSIONS: dict[type[nn.Module], type[HubModel]] = {
    **{kind: version_of(kind, HubModel, forward=dense_outputs(kind.forward)) for kind in BASES},
    **{kind: version_of(kind, HubModel) for kind in READING_PREFIX},
    **{
        kind: version_of(kind, HubModel, forward=over_kept_patches(kind.forward), no_merge=AVERAGES)
        for kind in AVERAGING
    },
}
for _original, _version in VERSIONS.items():
    # save_pretrained writes the class's name into config.json, and pipelines look it up: keep the original's.
    _version.__name__ = _original.__name__
    dict.__setitem__(transformers_record_registry(), str(_version), _original._can_record_outputs)


def attach(model: nn.Module, reductions: dict[int, Reduction]) -> None:
    """Make `model` its ATS version with these reductions. Raises a UserError if they merge tokens, but the model
    averages its patches.
    """
    refuse_merging(model, reductions.values(), VERSIONS[original_class(model)].no_merge, "")
    parts = dict.fromkeys([model, _base(model), _base(model).layernorm])  # a base model is its own base
    attach_to(list(parts), _layers(model), reductions, VERSIONS | BLOCK_VERSIONS | {nn.LayerNorm: FinalNorm})


# Why ATS refuses these related classes. It refuses all other classes as unknown.
REASONS = dict.fromkeys(
    ("ViTForMaskedImageModeling", "DeiTForMaskedImageModeling"),
    "reconstructs every patch, also those that ATS would drop",
) | dict.fromkeys(
    ("Dinov2Backbone", "Dinov2WithRegistersBackbone"), "gives feature maps to a head that needs every patch"
)


def refusal(model: nn.Module) -> str:
    """Why ATS cannot be put into this model; "" if it can."""
    if original_class(model) not in VERSIONS:
        known = ", ".join(kind.__name__ for kind in VERSIONS)
        reason = REASONS.get(original_class(model).__name__)
        return f"{reason + '; ' if reason else ''}ATS supports transformers' {known}, and no subclass"
    base, prefix = _base(model), model.base_model_prefix
    if isinstance(base, Patched) and not isinstance(model, Patched):
        return f"its {prefix} has ATS already; remove it first: ats.unpatch(model.{prefix})"
    if original_class(base) not in VERSIONS:
        return f"its {prefix} is a {type(base).__name__}"
    if isinstance(base.layernorm, FinalNorm) and not isinstance(model, Patched):
        return "it shares its final norm with another model, which has ATS; give it its own by copy.deepcopy"
    if original_class(base.layernorm) is not nn.LayerNorm:
        return f"its final norm is a {type(base.layernorm).__name__}"
    return refusal_of_blocks(model, _layers(model), refusal_of_block)
