"""Time several passes in one process: every round runs each pass once, in rotating order.

Machines are noisy and throttle, so times are compared within a round. The first rounds warm up (kernels are chosen,
caches fill, graphs compile) and do not count.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

import torch
from tqdm import tqdm

Name = TypeVar("Name", bound=Hashable)

NUM_WARMUP = 2
MIN_ROUNDS = 3


def timer() -> float:
    """Seconds, after waiting for the GPU. PyTorch's own timer warns if there is a CUDA compiler but no GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def interleave(
    runs: Mapping[Name, Callable[[], object]],
    *,
    rounds: int = 15,
    max_seconds: float = float("inf"),
    prepare: Callable[[Name, int], object] = lambda name, seed: None,
    label: str = "",
    progress: bool = True,
) -> tuple[dict[Name, list[float]], range]:
    """Run every named pass once per round. Returns each pass's seconds in the rounds that count, and the numbers of
    these rounds.

    Args:
        rounds: how many count. max_seconds: start no round after this, once MIN_ROUNDS are done.
        prepare: called before every pass with its name and the round's number; not timed.
        label: of the progress bar. progress: show the bar if the console is a terminal.
    """
    names, start = list(runs), timer()
    seconds: dict[Name, list[float]] = {name: [] for name in names}
    warmup = NUM_WARMUP
    for index in tqdm(range(rounds + NUM_WARMUP), desc=label, leave=False, disable=None if progress else True):
        spent = timer() - start
        if index == 1 and spent > max_seconds / 4:
            warmup = 1  # passes this long are warm after one
        if index >= warmup + MIN_ROUNDS and (spent > max_seconds or index == rounds + warmup):
            break
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            prepare(name, index)
            begin = timer()
            runs[name]()
            seconds[name].append(timer() - begin)
    num_rounds = len(seconds[names[0]])
    return {name: own[warmup:] for name, own in seconds.items()}, range(warmup, num_rounds)


def host_waits(run: Callable[[], object], device: torch.device) -> int | None:
    """How often a pass makes the host wait for the GPU, as PyTorch reports it; None on a CPU."""
    if device.type != "cuda":
        return None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in caught)
