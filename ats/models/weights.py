"""To compute only part of a linear layer's outputs, blocks read its weight instead of calling it.

They do so for plain linear layers only. Adapters, quantised and offloaded layers, and layers with hooks are called.

The older functions of torch.nn.utils (weight_norm, spectral_norm, prune) compute a weight when the layer is called, so
reading it would skip them. Parametrizations compute it when it is read.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from ats.errors import UserError

# Python modules that create subclasses of a layer's class at run time: FSDP2, replicate, parametrize.
WRAPPERS = ("torch.distributed.", "torch.nn.utils.parametrize")
# Hook -> what to type instead.
REMEDIES = {
    WeightNorm: "torch.nn.utils.remove_weight_norm(layer, {name!r}), or use {new}.weight_norm",
    SpectralNorm: "torch.nn.utils.remove_spectral_norm(layer, {name!r}), or use {new}.spectral_norm",
    BasePruningMethod: "torch.nn.utils.prune.remove(layer, {name!r})",
}


def is_plain(layer: nn.Module) -> bool:
    """Whether calling the layer is the product with its weight and nothing else."""
    of_torch = type(layer) is nn.Linear or (
        isinstance(layer, nn.Linear) and type(layer).__module__.startswith(WRAPPERS)
    )
    has_hooks = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    weight = layer._parameters.get("weight")  # of another class: quantised, distributed
    return of_torch and not has_hooks and type(weight) in (nn.Parameter, type(None))


def is_linear(layer: nn.Module | None) -> bool:
    """Whether it is a linear layer, including quantised ones and ones with adapters."""
    sizes = [getattr(layer, name, None) for name in ("in_features", "out_features")]
    return all(isinstance(size, int) for size in sizes)


def projects_parts(attn: nn.Module) -> bool:
    """Whether queries, keys and values can be projected separately. A joint projection that must be called cannot: it
    computes all three.
    """
    qkv = getattr(attn, "qkv", None)
    return qkv is None or getattr(attn, "q_bias", None) is not None or is_plain(qkv)


class Projected(NamedTuple):
    """All outputs of a layer for some rows, from one call; `linear_part` takes them instead of these rows."""

    outputs: Tensor


def linear_part(layer: Any, x: Tensor | Projected, part: slice, bias: Tensor | None = None) -> Tensor:
    """The outputs `part` of a linear layer. A `bias` replaces the layer's, as in BEiT's attention, whose own code reads
    the weight directly too.
    """
    if isinstance(x, Projected):
        return x.outputs[..., part]
    refuse_stale(layer)
    if bias is None and not is_plain(layer):
        return layer(x)[..., part]
    bias = layer.bias if bias is None else bias
    return F.linear(x, layer.weight[part], None if bias is None else bias[part])


def refuse_stale(layer: nn.Module) -> None:
    """Raise a UserError if a forward pre-hook computes the layer's weights. Other hooks do not matter."""
    if layer._forward_pre_hooks and (reason := stale(layer)):
        raise UserError(f"A block with ATS has a {type(layer).__name__} {reason}.")


def stale(layer: nn.Module) -> str:
    """Which weight of the layer a forward pre-hook computes, and what to type; "" if none."""
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
