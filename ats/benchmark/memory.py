"""Memory of a pass: at its peak, and what autograd keeps of it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class LiveBytes(TorchDispatchMode):
    """Within it, bytes of the tensors that operators made and that are alive at the same time, each storage once.

    What a kernel allocates and frees within itself is not seen.

    Attributes:
        live: now. peak: at most.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def add(self, tensor: Tensor) -> None:
        """Count a tensor until its memory is freed."""
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address not in self._known and size:
            self._known.add(address)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._free, address, size)

    def _free(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self.add, out)
        return out


def peak_megabytes(run: Callable[[], None], model: nn.Module, device: torch.device) -> float:
    """Most memory during `run`, the weights included: on a GPU the allocator's, on a CPU by `LiveBytes`."""
    weights = (*model.parameters(), *model.buffers())
    if device.type == "cuda":
        model.zero_grad(set_to_none=True)  # the last pass's gradients: part of the peak, not of what was there before
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()  # the other variants' weights too
        run()
        own = sum(tensor.untyped_storage().nbytes() for tensor in weights)
        return (torch.cuda.max_memory_allocated() - before + own) / 1e6
    with LiveBytes() as counter:
        for tensor in weights:
            counter.add(tensor)
        run()
    return counter.peak / 1e6


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
