"""The sampler alone, from scores to kept tokens, over the number of tokens; and beside it the plain version where a
kernel runs in its place.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from unittest import mock

import torch

from ats import kernels
from ats.benchmark.meters import pass_seconds
from ats.reduction.sampling import BlockSampler, Candidates, inverse_transform
from ats.tokens import RaggedTokens


def sampler_rows(
    sizes: tuple[int, ...], *, num_sequences: int, device: torch.device, rounds: int = 20
) -> list[dict[str, float]]:
    """Milliseconds (medians) of inverse transform sampling with K = half of the tokens, and of packing what it keeps.

    Args:
        sizes: numbers of patches N.

    Returns:
        A row per size: patches, sequences, ms of sampling, on a GPU of the plain version, and of packing [T, 64].
    """
    rows = []
    for size in sizes:
        generator = torch.Generator().manual_seed(size)
        scores = (torch.rand(num_sequences, size, generator=generator) ** 4).to(device)
        valid = torch.ones_like(scores, dtype=torch.bool)
        position = torch.arange(1, size + 1, device=device).expand(num_sequences, -1)
        lengths = torch.full((num_sequences,), size, device=device)
        candidates = Candidates(
            scores, lengths=lengths, slots=size, num_positions=size + 1, position=lambda position=position: position
        )
        options = BlockSampler(block=0, num_tokens=0.5)
        tokens = RaggedTokens.from_dense(torch.zeros(num_sequences, size + 1, 64, device=device), 1)
        keep = torch.cat([valid[:, :1], inverse_transform(candidates, size // 2, options)], dim=1)

        def sample(candidates: Candidates = candidates, size: int = size, options: BlockSampler = options) -> None:
            inverse_transform(candidates, size // 2, options)

        def pack(tokens: RaggedTokens = tokens, keep: torch.Tensor = keep, size: int = size) -> None:
            tokens.keep(keep, slots=size // 2)

        row = {"patches": size, "sequences": num_sequences, "sampling ms": _milliseconds(sample, device, rounds)}
        if device.type == "cuda":
            with mock.patch.object(kernels, "_HAS_TRITON", False):
                row["plain ms"] = _milliseconds(sample, device, rounds)
        rows.append(row | {"packing ms": _milliseconds(pack, device, rounds)})
    return rows


def _milliseconds(run: Callable[[], None], device: torch.device, rounds: int) -> float:
    """Median of `rounds` passes of ten runs each: one run may be shorter than its own launch."""

    def ten() -> None:
        for _ in range(10):
            run()

    with torch.inference_mode():
        ten()
        return statistics.median(pass_seconds(ten, device) for _ in range(rounds)) * 100
