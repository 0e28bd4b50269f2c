"""Where the time of a forward pass goes, and how efficient its linear layers are by themselves."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from ats.interleave import interleave
from ats.models.block import ats_blocks

PARTS = ("embedding", "qkv", "scoring and sampling", "attention", "mlp", "scatter and gather", "rest")
MODULES = {"patch_embed": "embedding", "mlp": "mlp", "qkv": "qkv", "attn": "attention"}  # timm's names


def part_seconds(model: nn.Module, x: Tensor, *, rounds: int) -> dict[str, float]:
    """Seconds of one forward pass by part, mean over `rounds`; the clock itself adds a little to every part.

    Time counts for the part that began last. ATS blocks tell the clock which part begins (`ATSBlock.clock`); other
    modules have hooks. In dense blocks without timm's names, unrecognised modules count as "rest".
    """
    seconds: dict[str, float] = {}
    current, last = "rest", time.perf_counter()
    outer: list[str] = []

    def begin(part: str) -> None:
        nonlocal current, last
        if x.is_cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds[current] += now - last
        current, last = part, now

    def enter(part: str, *_: object) -> None:
        outer.append(current)
        begin(part)

    def leave(*_: object) -> None:
        begin(outer.pop())

    blocks, handles = ats_blocks(model), []
    for name, module in model.named_modules():
        if part := MODULES.get(name.rpartition(".")[2]):
            handles.append(module.register_forward_pre_hook(partial(enter, part)))
            handles.append(module.register_forward_hook(leave))
    for block in blocks:
        block.clock = begin
    try:
        with torch.inference_mode():
            for num_passes in (1, rounds):  # the first pass warms up
                seconds.update(dict.fromkeys(PARTS, 0.0))
                last = time.perf_counter()
                for _ in range(num_passes):
                    model(x)
                begin("rest")
    finally:
        for block in blocks:
            del block.clock
        for handle in handles:
            handle.remove()
    return {name: total / rounds for name, total in seconds.items()}


class LinearCalls(TorchFunctionMode):
    """Records every call of PyTorch's `F.linear`; calls that oneDNN takes over do not pass here."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch.Size, Tensor, Tensor | None]] = []  # in order: shape of the input, weight, bias

    @classmethod
    def of(cls, model: nn.Module, x: Tensor) -> LinearCalls:
        """The calls of one forward pass of `x`."""
        # A FLOP counter makes PyTorch's own operations run (`kernels/cpu.py`).
        with torch.inference_mode(), FlopCounterMode(display=False), cls() as linear:
            model(x)
        return linear

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if function is F.linear:
            x, weight, *bias = args
            # Another object with the same values: `kernels/cpu.py` knows by the weight that GELU follows.
            self.calls.append((x.shape, weight.detach(), bias[0] if bias else (kwargs or {}).get("bias")))
        return function(*args, **(kwargs or {}))

    def multiply_adds(self) -> int:
        """Multiply-adds of all calls."""
        return sum(shape.numel() * len(weight) for shape, weight, _ in self.calls)

    def replay(self, kernels: Callable[[], AbstractContextManager] = nullcontext) -> Callable[[], None]:
        """A function that runs the same calls, in order, on random inputs, within `kernels()`."""
        inputs = {
            shape: torch.randn(shape, device=weight.device, dtype=weight.dtype) for shape, weight, _ in self.calls
        }

        @torch.inference_mode()
        def run() -> None:
            with kernels():
                for shape, weight, bias in self.calls:
                    F.linear(inputs[shape], weight, bias)

        return run


def linear_efficiencies(models: Mapping[str, Any], x: Tensor, *, rounds: int) -> dict[str, float]:
    """(dense time / time) / (dense FLOPs / FLOPs) of each model's linear layers, with the shapes they have for `x`; the
    median over `rounds`. One of the models is named "dense".

    A matrix product with half the rows takes more than half the time when rows are few, because the weights are read in
    full either way. This bounds any network that computes the same products.
    """
    calls = {name: LinearCalls.of(model, x) for name, model in models.items()}
    runs = {name: linear.replay(partial(models[name].fastest_kernels, x)) for name, linear in calls.items()}
    seconds, _ = interleave(runs, rounds=rounds)
    work = {name: linear.multiply_adds() for name, linear in calls.items()}
    return {
        name: statistics.median(dense / own for dense, own in zip(seconds["dense"], seconds[name], strict=True))
        * (work[name] / work["dense"])
        for name in models
    }
