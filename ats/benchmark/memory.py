"""Memory of a pass: its peak, and what autograd saves for the backward pass."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ats.compat import TorchDispatchMode, tree_map_only


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operators made and that are alive, each storage once.

    It does not see what a kernel allocates and frees internally.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0  # bytes now, and their maximum so far
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


def peak_megabytes(run: Callable[[], object], model: nn.Module, device: torch.device) -> float:
    """Peak memory of `run`, weights included: from the allocator on a GPU, from `LiveBytes` on a CPU."""
    weights = (*model.parameters(), *model.buffers())
    if device.type == "cuda":
        model.zero_grad(set_to_none=True)  # gradients of the previous pass belong to the peak, not to `before`
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()  # includes the weights of the other variants
        run()
        own = sum(tensor.untyped_storage().nbytes() for tensor in weights)
        return (torch.cuda.max_memory_allocated() - before + own) / 1e6
    with LiveBytes() as counter:
        for tensor in weights:
            counter.add(tensor)
        run()
    return counter.peak / 1e6


def saved_bytes(run: Callable[[], object], *, without: Iterable[Tensor] = ()) -> int:
    """Bytes of the tensors that autograd saves for the backward pass of `run` (or during it), each storage once.
    Tensors in `without` do not count: without the weights, only activations do.
    """
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()  # keeps the graph alive, so no address is reused
    del result
    for tensor in without:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())
