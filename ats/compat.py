"""Private names that this package imports from PyTorch, timm and transformers: check them after an upgrade. None of
them has a public equivalent (PyTorch 2.15, timm 1.0.31, transformers 5.23).

Private attributes are read where they are used: `_pos_embed` and `_get_rel_pos_bias` of timm's models in
`plugin/timm/`, `_can_record_outputs` in `plugin/transformers/model.py`. The plug-in's tests fail without them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch

# Tells torch.export what we know about a data-dependent number.
from torch import _check as export_check

# Inside it, tensor methods skip function modes (`kernels/cpu.py`), which cost 1.7 microseconds per call.
from torch._C import DisableTorchFunction

# Whether a tensor is inside a torch.func transform (vmap, grad). The Numba and Triton kernels are invisible to those.
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import forward_ad

# Sees every operator with its outputs. PyTorch has no memory statistics for the CPU, so we count with this.
from torch.utils._python_dispatch import TorchDispatchMode

# The innermost `TorchDispatchMode`, such as FlopCounterMode, which must see PyTorch's operators, not our kernels.
from torch.utils._python_dispatch import _get_current_dispatch_mode as current_dispatch_mode

# Visits the tensors in an operator's outputs, however nested.
from torch.utils._pytree import tree_map_only

__all__ = [
    "DisableTorchFunction",
    "TorchDispatchMode",
    "current_dispatch_mode",
    "export_check",
    "forward_ad_level",
    "inductor_freezing",
    "is_functorch_wrapped_tensor",
    "onednn_linear",
    "timm_feature_indices",
    "transformers_record_registry",
    "tree_map_only",
]


def onednn_linear() -> Callable | None:
    """oneDNN's linear layer: (x, weight, bias, "none", [], "") -> x weight^T + bias; None if PyTorch lacks it."""
    operator = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
    return None if operator is None else operator.default


def inductor_freezing() -> AbstractContextManager:
    """A context in which torch.compile treats weights as constants."""
    from torch._inductor import config

    return config.patch(freezing=True)


def forward_ad_level() -> int:
    """The innermost open level of forward-mode differentiation; -1: none."""
    return forward_ad._current_level


# timm and transformers are imported inside the functions, so that importing this module stays fast.
def timm_feature_indices(num_blocks: int, indices: int | list[int] | None) -> tuple[list[int], int]:
    """The blocks that timm's `forward_intermediates(indices=...)` means, and the last of them."""
    from timm.models._features import feature_take_indices

    return feature_take_indices(num_blocks, indices)


def transformers_record_registry() -> dict:
    """str(class) -> what transformers records for output_hidden_states; filled when it builds a model."""
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

    return _CAN_RECORD_REGISTRY
