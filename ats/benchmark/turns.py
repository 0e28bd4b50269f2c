"""Passes timed in turn: every round runs each once, in an order that rotates. Machines are noisy and throttle, so times
are compared within a round. The first rounds warm up (kernels chosen, caches filled, graphs compiled) and are not
counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from tqdm import tqdm

from ats.benchmark.meters import pass_seconds

NUM_WARMUP = 2
MIN_ROUNDS = 3


def time_in_turn(
    runs: dict[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int = 15,
    max_seconds: float = float("inf"),
    prepare: Callable[[int], None] = lambda seed: None,
    label: str = "",
) -> tuple[dict[str, list[float]], range]:
    """Run each once per round, in rotating order.

    Args:
        runs: name -> a pass. device: that computes it.
        rounds: that count. max_seconds: begin no round after these, once MIN_ROUNDS are done.
        prepare: called before every pass with the round's number, outside the clock. label: of the progress bar.

    Returns:
        Seconds of every counted round by name, and the numbers of these rounds.
    """
    names, start = list(runs), time.perf_counter()
    seconds: dict[str, list[float]] = {name: [] for name in names}
    warmup = NUM_WARMUP
    for index in tqdm(range(rounds + NUM_WARMUP), desc=label, leave=False, disable=None):
        spent = time.perf_counter() - start
        if index == 1 and spent > max_seconds / 4:
            warmup = 1  # passes this long are warm after one
        if index >= warmup + MIN_ROUNDS and (spent > max_seconds or index == rounds + warmup):
            break
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            prepare(index)
            seconds[name].append(pass_seconds(runs[name], device))
    num_rounds = len(seconds[names[0]])
    return {name: own[warmup:] for name, own in seconds.items()}, range(warmup, num_rounds)
