"""Weights that blocks read themselves, without calling the layer, to compute only a part of its outputs.

What the older functions of torch.nn.utils (weight_norm, spectral_norm, prune) do to a weight happens when the layer is
called, so it would never happen here. Parametrizations happen when the weight is read.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ats.errors import UserError

# Hook -> what to type instead of it.
REMEDIES = {
    WeightNorm: "torch.nn.utils.remove_weight_norm(layer, {name!r}), or use {new}.weight_norm",
    SpectralNorm: "torch.nn.utils.remove_spectral_norm(layer, {name!r}), or use {new}.spectral_norm",
    BasePruningMethod: "torch.nn.utils.prune.remove(layer, {name!r})",
}


def linear_part(layer: nn.Linear, x: Tensor, part: slice, bias: Tensor | None = None) -> Tensor:
    """The outputs `part` of a linear layer; `bias`: instead of the layer's."""
    refuse_stale(layer)
    bias = layer.bias if bias is None else bias
    return F.linear(x, layer.weight[part], None if bias is None else bias[part])


def refuse_stale(layer: nn.Module) -> None:
    """Raise a UserError if a hook of the layer's call computes its weights. Any other hook is none of our business."""
    if layer._forward_pre_hooks and (reason := stale(layer)):
        raise UserError(f"A block with ATS has a {type(layer).__name__} {reason}.")


def stale(layer: nn.Module) -> str:
    """Which weight of the layer a hook of its call computes, and what to type; "" if none."""
    computed = [
        name for name, value in vars(layer).items() if isinstance(value, Tensor)
    ]  # neither parameter nor buffer
    for hook in layer._forward_pre_hooks.values() if computed else ():
        name = getattr(hook, "name", None) or getattr(hook, "_tensor_name", None) or computed[0]
        remedy = next((text for kind, text in REMEDIES.items() if isinstance(hook, kind)), "remove that hook")
        remedy = remedy.format(name=name, new="torch.nn.utils.parametrizations")
        what = getattr(hook, "__name__", type(hook).__name__)
        return f"whose {name} is computed by {what} at each call of the layer, but ATS only reads it. Type {remedy}"
    return ""
