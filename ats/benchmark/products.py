"""How far the seconds of a network's linear layers alone follow their FLOPs.

A matrix product of half the rows takes more than half the time where rows are few: the weights are read all the same.
A network that computes the same products cannot hide that, however little else it does, so this stands beside its
efficiency.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ats.benchmark.meters import pass_seconds


class LinearCalls(TorchFunctionMode):
    """Within it the linear layers that run are noted.

    Attributes:
        calls: of each its input's shape, weight and bias.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch.Size, Tensor, Tensor | None]] = []

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is F.linear:
            x, weight, *bias = args
            self.calls.append((x.shape, weight, bias[0] if bias else (kwargs or {}).get("bias")))
        return function(*args, **(kwargs or {}))

    def multiply_adds(self) -> int:
        """Of all calls."""
        return sum(shape.numel() * len(weight) for shape, weight, _ in self.calls)

    def again(self) -> Callable[[], None]:
        """A function that runs the same layers, in order, on other numbers."""
        inputs = {
            shape: torch.randn(shape, device=weight.device, dtype=weight.dtype) for shape, weight, _ in self.calls
        }

        def run() -> None:
            with torch.inference_mode():
                for shape, weight, bias in self.calls:
                    F.linear(inputs[shape], weight, bias)

        return run


def linear_efficiencies(models: dict[str, nn.Module], x: Tensor, *, rounds: int) -> dict[str, float]:
    """Of each of `models`, one of them "dense": (dense time / time) / (dense FLOPs / FLOPs) of their linear layers
    alone, with the shapes that `x` gives them. Run in turn; the median over `rounds`, behind two that warm up.
    """
    noted = {}
    for name, model in models.items():
        with torch.inference_mode(), LinearCalls() as noted[name]:
            model(x)
    runs = {name: linear.again() for name, linear in noted.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(2 + rounds):
        for name, run in runs.items():
            seconds[name].append(pass_seconds(run, x.device))
    work = {name: linear.multiply_adds() for name, linear in noted.items()}
    return {
        name: statistics.median(d / own for d, own in zip(seconds["dense"][2:], seconds[name][2:], strict=True))
        * work[name]
        / work["dense"]
        for name in runs
    }
