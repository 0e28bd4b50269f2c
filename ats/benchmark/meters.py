"""What is read off one pass: its time, its memory, how often the host waits in it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor


def pass_seconds(run: Callable[[], None], device: torch.device) -> float:
    """Seconds that a pass takes, waited for at both ends."""
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronise()
    start = time.perf_counter()
    run()
    synchronise()
    return time.perf_counter() - start


def peak_memory(run: Callable[[], None], device: torch.device) -> float | None:
    """Megabytes of a GPU's memory that a pass needs at its peak, beyond what is there before it; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def host_waits(run: Callable[[], None], device: torch.device) -> int | None:
    """How often a pass makes the host wait, by PyTorch's own account."""
    if device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in said)


def saved_for_backward(run: Callable[[], None]) -> float:
    """Megabytes of the tensors that autograd keeps for the backward pass, weights included, each storage once."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run()
    return sum(storages.values()) / 1e6
