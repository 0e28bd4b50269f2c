"""What autograd keeps for the backward pass, counted through its own hooks: exact, and the same on every machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def saved_bytes(run: Callable[[], object], *, without: Iterable[Tensor] = ()) -> int:
    """Bytes of the tensors that autograd keeps for the backward pass of what `run` computes, each storage once.

    Args:
        run: a forward pass; a backward pass behind it may read what was kept.
        without: tensors not to count: the weights, for activations alone.
    """
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()  # held, so that no storage is freed and its address given to another
    del result
    for tensor in without:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())
