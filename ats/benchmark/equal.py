"""Other methods at the cost of ATS: the share that topk and random keep, r of ToMe, the keep rate of EViT.

ATS keeps another number of tokens in every image, the others one that the configuration says. So the mean GFLOPs of
ATS over some images are the target, and one number of each method is searched, by halving, until its network costs the
same:

    topk, random    the share of its token slots that every block of ATS.BLOCKS keeps
    tome            the mean r of all blocks, spread evenly: r of a block is one of two neighbouring whole numbers
    evit            the keep rate in three blocks, behind a quarter, a half and three quarters of the depth

ToMe merges in every block and EViT drops in three of them because that is how their authors run them.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from ats.flops import gflops
from ats.reduction.reducers import EViT, ToMe
from ats.reduction.sampling import BlockSampler

MATCHED = ("topk", "random", "tome", "evit")
NUM_HALVINGS = 12


def authors_blocks(variant: str, depth: int) -> list[int] | None:
    """The blocks in which a method works in a network of `depth` blocks; None: those of the config."""
    if variant == "tome":
        return list(range(depth))
    return sorted({depth * quarter // 4 for quarter in (1, 2, 3)}) if variant == "evit" else None


@torch.inference_mode()
def match_gflops(model: nn.Module, x: Tensor, target: float) -> float:
    """Set the samplers of `model`, one of MATCHED, so that it comes as near as it can to `target` GFLOPs.

    Args:
        x: input whose size counts, [B, 3, H, W] or [B, 3, T, H, W].

    Returns:
        GFLOPs reached.
    """
    x = x[:1]
    _set_share(model, 1.0, 0)
    trace = model.forward_tokens(x)[1]
    most = int(trace[0].num_tokens[0]) // 2
    low, high, found = 0.001, 1.0, {}
    for _ in range(NUM_HALVINGS):
        share = (low + high) / 2
        _set_share(model, share, most)
        found[share] = gflops(model, model.forward_tokens(x)[1], x.shape).as_run.item()
        low, high = (low, share) if found[share] > target else (share, high)
    best = min(found, key=lambda share: abs(found[share] - target))
    _set_share(model, best, most)
    return found[best]


def _set_share(model: nn.Module, share: float, most: int) -> None:
    """Let every sampler of the model keep a share of its tokens; ToMe merges (1 - share) * `most` in the mean block."""
    blocks = [module for module in model.modules() if getattr(module, "sampler", None) is not None]
    mean = (1 - share) * most
    for index, block in enumerate(blocks):
        if isinstance(block.sampler, ToMe):
            r = math.floor((index + 1) * mean) - math.floor(index * mean)
            block.sampler = replace(block.sampler, r=r)
        elif isinstance(block.sampler, EViT):
            block.sampler = replace(block.sampler, keep_rate=share)
        else:
            block.sampler = replace(block.sampler, num_tokens=share)


def describe_samplers(model: nn.Module) -> str:
    """What the samplers of a network are set to; "" for a dense one."""
    samplers = [m.sampler for m in model.modules() if getattr(m, "sampler", None) is not None]
    if not samplers:
        return ""
    names, values = zip(*map(_setting, samplers), strict=True)
    blocks = [sampler.block for sampler in samplers]
    whole = len(blocks) > 2 and blocks == list(range(blocks[0], blocks[-1] + 1))
    where = f"{blocks[0]}-{blocks[-1]}" if whole else ", ".join(map(str, blocks))
    return f"{names[0]} {values[0] if len(set(values)) == 1 else ', '.join(values)} in blocks {where}"


def _setting(sampler: BlockSampler | ToMe | EViT) -> tuple[str, str]:
    if isinstance(sampler, BlockSampler):
        return "K", f"{sampler.num_tokens:.4g}"
    return ("r", str(sampler.r)) if isinstance(sampler, ToMe) else ("keep rate", f"{sampler.keep_rate:.4g}")
