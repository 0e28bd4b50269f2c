"""Hugging Face transformers' ViT, DeiT, DINOv2, DINOv3, VideoMAE, the encoder of ViTMAE, and the image towers of CLIP
and SigLIP with ATS.

A classifier and its base model change their class together (`handle.py`) and share one state. Hidden states keep their
usual shape [B, N, C]; `model.ats.restore` sets what dropped tokens hold, by default exact zeros. Classifiers of DINOv2
and VideoMAE average the kept patches, or all patches if dropped ones are restored.

Shapes: B images, N = P + grid tokens, P prefix tokens, C channels. Where patches are hidden from the model (ViTMAE,
bool_masked_pos), N counts those it sees, in the order it sees them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import wraps
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
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

from ats.compat import transformers_record_registry
from ats.errors import UserError
from ats.models.block import ATSBlock
from ats.models.cost import (
    BlockGrid,
    conv_multiply_adds,
    linear_multiply_adds,
    linears_multiply_adds,
    size,
    vit_block_multiply_adds,
)
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
from ats.plugin.patch import save_settings
from ats.plugin.rotary import NO_FUSE
from ats.plugin.transformers.blocks import (
    BEHIND_VERSIONS,
    FILL_DROPPED,
    POOLING_HEADS,
    attention_of,
    by_timms_names,
    mlp_of,
    num_prefix_of,
    refusal_of_block,
)
from ats.plugin.transformers.blocks import VERSIONS as BLOCK_VERSIONS
from ats.reduction import Reduction
from ats.restore import restored
from ats.tokens import BlockRecord, KeptTokens, RaggedTokens

HEADS = ("classifier", "cls_classifier", "distillation_classifier", "visual_projection")


def dense_outputs(forward: Callable) -> Callable:
    """A base model's `forward` that returns dense hidden states and refuses arguments that ATS does not support."""
    signature = inspect.signature(forward)

    @wraps(forward)
    def wrapped(self: nn.Module, *args: object, **kwargs: object) -> object:
        asked, config = signature.bind(self, *args, **kwargs).arguments, self.config
        asked |= asked.get("kwargs", {})
        if asked.get("attention_mask") is not None or asked.get("is_causal", getattr(config, "is_causal", False)):
            raise UserError("attention_mask and is_causal do not work with ATS: omit them, or ats.unpatch(model).")
        mask = asked.get("pixel_attention_mask")
        if isinstance(mask, Tensor) and not mask.all():
            raise UserError(
                "pixel_attention_mask hides padding, which ATS does not support: give images that fill it (processor("
                "..., max_num_patches=N) with N the patches of every image), one size at a time, or ats.unpatch(model)."
            )
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


def _base(model: Any) -> Any:
    """The base model in a classifier, or the model itself."""
    if isinstance(model, dinov3.DINOv3ViTModel):  # whose `model` is the encoder
        return model
    return getattr(model, model.base_model_prefix, model)


def _layers(model: nn.Module) -> nn.ModuleList:
    base = _base(model)
    holder = base.model if isinstance(base, dinov3.DINOv3ViTModel) else getattr(base, "encoder", base)
    return holder.layer if hasattr(holder, "layer") else holder.layers


def _behind(model: nn.Module) -> list[nn.Module]:
    """The modules after the last layer that read tokens; they have ATS versions too."""
    base = _base(model)
    if isinstance(base, clip.CLIPVisionModel):
        return [base.encoder]
    if isinstance(base, (siglip.SiglipVisionModel, siglip2.Siglip2VisionModel)):
        return [base.post_layernorm, *([base.head] if base.use_head else [])]
    if isinstance(base, videomae.VideoMAEModel):
        return [base.encoder if base.layernorm is None else base.layernorm]
    return [base.norm if isinstance(base, dinov3.DINOv3ViTModel) else base.layernorm]


def network(model: nn.Module) -> dict[str, Any]:
    """What `plan_reductions` needs to know about a model."""
    layers = _layers(model)
    num_prefix = num_prefix_of(layers[0])
    return {"depth": len(layers), "num_prefix_tokens": num_prefix, "has_cls": num_prefix > 0}


def default_score(model: nn.Module) -> str:
    """The paper's score if there is CLS, which all heads then read; else the mean attention."""
    return "cls_attention_value_norm" if network(model)["has_cls"] else "mean_attention"


class HubModel(Patched):
    """Base of the ATS versions; never instantiated, see `attach`."""

    layouts = ("packed",)
    num_prefix_tokens = property(lambda self: num_prefix_of(_layers(self)[0]))

    @property
    def _patch_projection(self) -> nn.Conv2d | nn.Conv3d | nn.Linear:
        embeddings = _base(self).embeddings
        for name in ("patch_embedding", "patch_embeddings"):
            found = getattr(embeddings, name, None)
            if found is not None:
                return getattr(found, "projection", found)
        raise AttributeError(f"{type(embeddings).__name__} has no patch embedding")

    def forward_tokens(self, pixel_values: Tensor, **inputs: object) -> tuple[Tensor, list[KeptTokens]]:
        """The model's inputs -> logits [B, classes] (base model: last hidden state [B, N, C]) and the tokens that each
        block with a reduction kept, in order.
        """
        state = self.ats_state
        trace, state.trace, state.last = state.trace, True, []
        try:
            out, kept = self(pixel_values, **inputs, return_dict=True), state.last
        finally:
            state.trace = trace
        if not trace:
            state.last = None
        result = out.last_hidden_state if _base(self) is self else out[0]
        return result, kept

    def save_pretrained(self, save_directory: str, *args: object, **kwargs: object) -> object:
        """Like the original's, plus the ATS settings in ats.json, which `ats.load(model, folder)` reads."""
        out = super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            save_settings(self, save_directory)
        return out

    def block_list(self) -> list[nn.Module]:
        return list(_layers(self))

    def block_grids(self, input_shape: Sequence[int]) -> list[BlockGrid]:
        grid = self._patch_grid(input_shape)
        if isinstance(_base(self), vit_mae.ViTMAEModel):  # it sees a random part, in random order
            grid = 1, 1, int(size(grid) * (1 - self.config.mask_ratio))
        return [BlockGrid.of(*grid)] * len(_layers(self))

    def _patch_grid(self, input_shape: Sequence[int]) -> tuple[int, int, int]:
        """(T, H, W) of all patches."""
        projection = self._patch_projection
        if isinstance(projection, nn.Linear):  # SigLIP 2: [B, N, values of a patch]
            return 1, 1, input_shape[1]
        if isinstance(projection, nn.Conv3d):  # VideoMAE: [B, T, 3, H, W]
            sides, patch = (input_shape[1], *input_shape[3:]), projection.kernel_size
        else:
            sides, patch = (1, *input_shape[2:]), (1, *projection.kernel_size)
        frames, height, width = (side // own for side, own in zip(sides, patch, strict=True))
        return frames, height, width

    def block_cost(self, block: nn.Module, record: BlockRecord, grid: BlockGrid, *, paper: bool, frames: int) -> Tensor:
        if not isinstance(block, ATSBlock):
            block = SimpleNamespace(attn=by_timms_names(attention_of(block)), mlp=mlp_of(block))
        return vit_block_multiply_adds(block, record, paper=paper)

    def stem_multiply_adds(self, trace: Sequence[KeptTokens], input_shape: Sequence[int]) -> float:
        num = size(self._patch_grid(input_shape))
        pooler = getattr(_base(self), "pooler", None)
        heads = [getattr(self, name, None) for name in HEADS] + [getattr(pooler, "dense", None)]
        heads = [head for head in heads if is_linear(head)]
        total = conv_multiply_adds(self._patch_projection, num) + sum(map(linear_multiply_adds, heads))
        head = getattr(_base(self), "head", None)
        if head is not None:  # SigLIP's attention pooling: one query, keys and values at all positions
            dim = head.probe.shape[-1]
            total += 2 * dim * dim + 2 * num * dim * dim + 2 * num * dim + linears_multiply_adds(head.mlp)
        return total


BASES: tuple[type, ...] = (vit.ViTModel, deit.DeiTModel, dinov2.Dinov2Model, registers.Dinov2WithRegistersModel)
BASES += (clip.CLIPVisionModel, dinov3.DINOv3ViTModel, vit_mae.ViTMAEModel, videomae.VideoMAEModel)
POOLING = (siglip.SiglipVisionModel, siglip2.Siglip2VisionModel)
READING_PREFIX = (  # classifiers of CLS, or of CLS and the distillation token
    vit.ViTForImageClassification,
    deit.DeiTForImageClassification,
    deit.DeiTForImageClassificationWithTeacher,
    clip.CLIPVisionModelWithProjection,
)
AVERAGES = "its head averages the patches, but a merged token counts for several"
POOLS = "its head pools the patches, but a merged token counts for several"
AVERAGING: tuple[type, ...] = (dinov2.Dinov2ForImageClassification, registers.Dinov2WithRegistersForImageClassification)
AVERAGING += (videomae.VideoMAEForVideoClassification,)
VERSIONS: dict[type[nn.Module], type[HubModel]] = {
    **{kind: version_of(kind, HubModel, forward=dense_outputs(kind.forward)) for kind in BASES},
    **{kind: version_of(kind, HubModel, forward=dense_outputs(kind.forward), no_merge=POOLS) for kind in POOLING},
    **{kind: version_of(kind, HubModel) for kind in READING_PREFIX},
    **{
        kind: version_of(kind, HubModel, forward=over_kept_patches(kind.forward), no_merge=AVERAGES)
        for kind in AVERAGING
    },
}
VERSIONS[dinov3.DINOv3ViTModel].no_fuse = NO_FUSE
for _original, _version in VERSIONS.items():
    # save_pretrained writes the class's name into config.json, and pipelines look it up: keep the original's.
    _version.__name__ = _original.__name__
    dict.__setitem__(transformers_record_registry(), str(_version), _original._can_record_outputs)


def attach(model: nn.Module, reductions: dict[int, Reduction]) -> None:
    """Change `model` to its ATS version with these reductions. Raises a UserError if they merge or fuse tokens and the
    model does not allow it.
    """
    version = VERSIONS[original_class(model)]
    refuse_merging(model, reductions.values(), version.no_merge, version.no_fuse)
    parts = dict.fromkeys([model, _base(model), *_behind(model)])  # a base model is its own base
    attach_to(list(parts), _layers(model), reductions, VERSIONS | BLOCK_VERSIONS | BEHIND_VERSIONS)


NAMES = {nn.LayerNorm: "final norm", **dict.fromkeys(POOLING_HEADS, "pooling head")}

# Why ATS refuses these related classes. It refuses all other classes as unknown.
RECONSTRUCTING: tuple[str, ...] = ("ViTForMaskedImageModeling", "DeiTForMaskedImageModeling", "ViTMAEForPreTraining")
RECONSTRUCTING += ("VideoMAEForPreTraining",)
AVERAGING_TOWERS = ("CLIPForImageClassification", "SiglipForImageClassification", "Siglip2ForImageClassification")
REASONS = {
    **dict.fromkeys(RECONSTRUCTING, "reconstructs every patch, including those ATS would drop"),
    **dict.fromkeys(
        ("Dinov2Backbone", "Dinov2WithRegistersBackbone"), "gives feature maps to a head that needs every patch"
    ),
    **dict.fromkeys(
        AVERAGING_TOWERS,
        "its head averages all patches, so dropped ones have to be restored: "
        'ats.patch(model.vision_model, restore="nearest", ...)',
    ),
}


def refusal(model: nn.Module) -> str:
    """Why ATS cannot be put into this model; "" if it can."""
    if original_class(model) not in VERSIONS:
        known = ", ".join(kind.__name__ for kind in VERSIONS)
        reason = REASONS.get(original_class(model).__name__)
        for path, part in model.named_modules() if reason is None else ():
            if original_class(part) in VERSIONS:
                return f"it holds a {original_class(part).__name__}; patch that one: ats.patch(model.{path}, ...)"
        return f"{reason + '; ' if reason else ''}ATS supports transformers' {known}, and no subclass"
    base, prefix = _base(model), model.base_model_prefix
    if isinstance(base, Patched) and not isinstance(model, Patched):
        return f"its {prefix} has ATS already; remove it first: ats.unpatch(model.{prefix})"
    if original_class(base) not in VERSIONS:
        return f"its {prefix} is a {type(base).__name__}"
    if isinstance(model, videomae.VideoMAEForVideoClassification) and model.fc_norm is None:
        return "its head reads the first patch as if it were CLS (use_mean_pooling=False), and ATS may drop it"
    for part in _behind(model):
        if hasattr(part, "ats_state") and not isinstance(model, Patched):
            name = NAMES.get(original_class(part), "encoder")
            return f"it shares its {name} with another model, which has ATS; give it its own with copy.deepcopy"
        if original_class(part) not in BEHIND_VERSIONS:
            return f"its final norm is a {type(part).__name__}"
    return refusal_of_blocks(model, _layers(model), refusal_of_block)
