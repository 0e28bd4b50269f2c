"""Synthetic token counts, for benchmarks without trained weights.

With random weights hardly any token is dropped. So the benchmark draws, for every image, how many tokens each block
keeps, from what DeiT-S + ATS keeps on ImageNet's validation images (the paper's histograms, read off its poster), and
keeps the first that many. Scoring and inverse transform sampling run as always; only their choice is ignored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ats.models.block import ats_blocks
from ats.reduction import Candidates
from ats.reduction.inverse_transform import InverseTransform

# DeiT-S, blocks 3 to 11: mean and standard deviation of the tokens kept of 197, CLS counted.
PAPER_BLOCKS = tuple(range(3, 12))
PAPER_MEAN = (162, 146, 132, 117, 105, 98, 82, 72, 62)
PAPER_STD = (9, 10, 12, 13, 13, 13, 14, 14, 14)
PAPER_NUM_TOKENS = 197
PAPER_DEPTH = 12


class SyntheticCounts:
    """Keeps as many tokens as the profile says; `ATSBlock.imposed`.

    An image that is simple in one block is simple in the others: one number z per image, standard normal, moves all its
    counts, `mean + z * std`.
    """

    def __init__(self, depth: int, scale: float = 1.0, mean_std: Sequence[float] | None = None) -> None:
        self.depth = depth  # of the network; 0: nothing is imposed
        self.scale = scale  # factor on the shares kept, for other budgets
        self.mean_std = mean_std  # of the tokens that every block keeps of 197, CLS counted; None: the paper's
        self.z = torch.zeros(1, dtype=torch.float64)  # [B], one per sample, set by `draw`; shared by a clip's frames
        self._wanted: dict[tuple[int, int, int, int], Tensor] = {}  # computed when images are drawn, not in the pass

    def draw(self, x: Tensor, *, seed: int = 0, mean: bool = False) -> None:
        """Draw counts for the images of `x`: standard normal quantiles in random order, so that even a small batch has
        the profile's mean. With `mean`, so does a single image.
        """
        generator = torch.Generator().manual_seed(seed)
        quantiles = (torch.randperm(len(x), generator=generator) + 0.5) / len(x)
        if len(x) == 1 and not mean:
            quantiles = torch.rand(1, generator=generator) * 0.98 + 0.01
        z = torch.special.ndtri(quantiles.double()).to(x.device)
        if (z.shape, z.device) != (self.z.shape, self.z.device):
            self._wanted.clear()
        self.z = z
        for what, wanted in self._wanted.items():  # in place: a CUDA graph keeps reading the same memory
            wanted.copy_(self._wanted_by(*what))

    def share_kept(self, block: int) -> Tensor:
        """[B] share of the network's patches that block `block` keeps."""
        same_depth = int(block * PAPER_DEPTH / self.depth)
        index = min(max(same_depth - PAPER_BLOCKS[0], 0), len(PAPER_MEAN) - 1)
        mean, std = self.mean_std or (PAPER_MEAN[index], PAPER_STD[index])
        count = mean + self.z * std
        return (self.scale * (count - 1) / (PAPER_NUM_TOKENS - 1)).clamp(0.05, 1)

    def __call__(self, candidates: Candidates, reduction: InverseTransform) -> Tensor:
        """[S, M] bool, the first that many candidates: which ones does not affect the time."""
        most = reduction.num_points(candidates.max_tokens + reduction.num_prefix_tokens)
        what = (reduction.block, len(candidates.scores), candidates.num_positions, most)
        if what not in self._wanted:
            self._remember(what)
        rank = torch.arange(candidates.scores.shape[1], device=candidates.scores.device)
        return rank < self._wanted[what].minimum(candidates.lengths)[:, None]

    @torch.compiler.disable  # a compiled graph would create it in inference mode
    def _remember(self, what: tuple[int, int, int, int]) -> None:
        with torch.inference_mode(False):  # else `draw` could not write into it
            self._wanted[what] = self._wanted_by(*what)

    def _wanted_by(self, block: int, num_sequences: int, num_positions: int, most: int) -> Tensor:
        """[S] int64, how many candidates each sequence is to keep."""
        share = self.share_kept(block).repeat_interleave(num_sequences // len(self.z))
        return (share * num_positions).round().clamp(max=most).long()


def describe_counts(checkpoint: str, *, scale: float = 1.0, mean_std: Sequence[float] | None = None) -> str:
    """Where the token counts of inverse transform sampling come from: weights, or imposed."""
    if checkpoint:
        return f"Token counts: those that the weights of {Path(checkpoint).name} keep."
    profile = "the paper's histograms (DeiT-S on ImageNet)"
    if mean_std is not None:
        profile = f"{mean_std[0]} +- {mean_std[1]} of {PAPER_NUM_TOKENS} tokens in every block"
    times = "" if scale == 1 else f", times {scale:g}"
    return f"Token counts: imposed, drawn for every image from {profile}{times}, as there is no checkpoint."


@contextmanager
def synthetic_counts(
    models: Sequence[nn.Module], *, scale: float = 1.0, mean_std: Sequence[float] | None = None
) -> Iterator[SyntheticCounts]:
    """Inside, the blocks of `models` that sample by inverse transform keep what `SyntheticCounts` says."""
    counts = SyntheticCounts(max((len(model.block_list()) for model in models), default=0), scale, mean_std)
    all_blocks = [block for model in models for block in ats_blocks(model)]
    choose = InverseTransform.choose  # functions from `register_sampler` have another
    blocks = [block for block in all_blocks if getattr(type(block.reduction), "choose", None) is choose]
    for block in blocks:
        block.imposed = counts
    try:
        yield counts
    finally:
        for block in blocks:
            del block.imposed
