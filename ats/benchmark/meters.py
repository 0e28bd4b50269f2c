"""What is read off one pass: its time, and how often the host waits in it. Memory: `memory.py`."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable

import torch


def pass_seconds(run: Callable[[], None], device: torch.device) -> float:
    """Seconds that a pass takes, waited for at both ends."""
    synchronise = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    synchronise()
    start = time.perf_counter()
    run()
    synchronise()
    return time.perf_counter() - start


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
