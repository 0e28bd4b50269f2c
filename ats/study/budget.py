"""K for a budget: the `ATS.NUM_TOKENS` with which a network costs a given number of GFLOPs on given images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from ats.flops import gflops

BATCH_SIZE = 128


@torch.inference_mode()
def mean_gflops(model: nn.Module, x: Tensor) -> float:
    """Mean cost of images x [B, 3, H, W] in the paper's accounting."""
    costs = [gflops(model, model.forward_tokens(part)[1], part.shape).paper for part in x.split(BATCH_SIZE)]
    return torch.cat(costs).mean().item()


def fit_num_tokens(model: nn.Module, x: Tensor, target: float) -> int:
    """The K, one for all blocks, with which images x cost the nearest to `target` GFLOPs on average. The model keeps
    some other K.
    """

    def cost(num_tokens: int) -> float:
        for block in model.blocks:
            if getattr(block, "sampler", None) is not None:
                block.sampler = replace(block.sampler, num_tokens=num_tokens)
        return mean_gflops(model, x)

    return nearest_num_tokens(cost, target)


def nearest_num_tokens(cost: Callable[[int], float], target: float, *, low: int = 3, high: int = 2048) -> int:
    """The K whose cost is nearest to the target, to 2.5 %, for a cost that does not fall with K; by bisection."""
    costs = {low: cost(low), high: cost(high)}
    while high - low > max(1, low // 40):  # on Digits the cost moves by less than half a percent
        middle = min(max(round((low * high) ** 0.5), low + 1), high - 1)
        costs[middle] = cost(middle)
        low, high = (middle, high) if costs[middle] < target else (low, middle)
    return min((low, high), key=lambda k: abs(costs[k] - target))
