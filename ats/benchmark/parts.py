"""Where the time of a forward pass goes: embedding, projections, scoring and sampling, attention, MLP, scatter to the
grid and gather from it, the rest.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from unittest import mock

import torch
from torch import nn

from ats.benchmark.counts import ImposedCounts
from ats.models import block as ats_block
from ats.models.block import ATSBlock
from ats.tokens import RaggedTokens

PARTS = ("embedding", "qkv", "scoring and sampling", "attention", "mlp", "scatter and gather", "rest")
# Methods of ATSBlock that are a part.
METHODS = {
    "project_q": "qkv",
    "project_kv": "qkv",
    "sample": "scoring and sampling",
    "reduce": "scoring and sampling",
    "attention_output": "attention",
}


class PartTimer:
    """Seconds per part. A part inside another is taken from it: the numbers add up to the whole pass."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._stack: list[str] = []
        self._last = 0.0

    def _advance(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._last
        self._last = now

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What runs inside counts as `name`."""
        self._advance()
        self._stack.append(name)
        try:
            yield
        finally:
            self._advance()
            self._stack.pop()

    def wrap(self, function: Callable, name: str) -> Callable:
        """`function`, counted as `name`."""

        @wraps(function)
        def timed(*args, **kwargs):
            with self.part(name):
                return function(*args, **kwargs)

        return timed


def _part_of(name: str, module: nn.Module) -> str | None:
    """The part that a module of a dense or ATS network is, by timm's names."""
    if name.endswith("patch_embed"):
        return "embedding"
    if name.endswith(".mlp"):
        return "mlp"
    if name.endswith(".attn.qkv"):
        return "qkv"
    if name.endswith(".attn"):
        return "attention"
    return None


def part_seconds(model: nn.Module, x: torch.Tensor, *, rounds: int) -> dict[str, float]:
    """Seconds of one forward pass by part, mean over `rounds`; the clock itself adds a little to every part.

    Networks whose blocks have other names than timm's show what is not recognised as "rest".
    """
    timer = PartTimer(x.device)
    with ExitStack() as stack:
        for kind in {type(module) for module in model.modules() if isinstance(module, ATSBlock)}:
            for method, name in METHODS.items():
                wrapped = timer.wrap(getattr(kind, method), name)
                stack.enter_context(mock.patch.object(kind, method, wrapped))
        # What imposed counts choose is not the sampler's work.
        chosen = timer.wrap(ImposedCounts.choose, "rest")
        stack.enter_context(mock.patch.object(ImposedCounts, "choose", chosen))
        for method in ("to_grid", "from_grid"):
            wrapped = timer.wrap(getattr(RaggedTokens, method), "scatter and gather")
            stack.enter_context(mock.patch.object(RaggedTokens, method, wrapped))
        attention = timer.wrap(ats_block.ragged_attention, "attention")
        stack.enter_context(mock.patch.object(ats_block, "ragged_attention", attention))
        for name, module in model.named_modules():
            part = _part_of(name, module)
            if part is not None:
                stack.enter_context(mock.patch.object(module, "forward", timer.wrap(module.forward, part)))
        with torch.inference_mode():
            model(x)
            timer.seconds = dict.fromkeys(PARTS, 0.0)
            for _ in range(rounds):
                with timer.part("rest"):
                    model(x)
    return {name: total / rounds for name, total in timer.seconds.items()}
