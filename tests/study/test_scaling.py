"""How cost grows with the number of tokens: the memory of a block linearly, the sampler's work like one sort."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import Block
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ats.models.block import ATSBlock
from ats.reduction import SCORES, Candidates
from ats.reduction.inverse_transform import InverseTransform
from ats.tokens import RaggedTokens

PATCHES = (1024, 4096)  # of 512 x 512 and of 1024 x 1024 pixels


class Recorder(TorchDispatchMode):
    """Every operation that runs within it, and the elements of the largest storage among its results."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, int]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() // t.itemsize for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        self.operations.append((str(function.overloadpacket), max(sizes, default=0)))
        return out


@pytest.mark.parametrize("layout", ["packed", "static"])
@pytest.mark.parametrize("score", SCORES)
def test_no_tensor_of_a_block_is_quadratic(score, layout):
    """Four times the tokens, four times the largest tensor: no N x N matrix, of scores or of attention."""
    torch.manual_seed(0)
    block = ATSBlock(Block(16, 2), InverseTransform(num_tokens=0.5, score=score)).eval()
    largest = []
    for patches in PATCHES:
        tokens = RaggedTokens.from_dense(torch.randn(1, patches + 1, 16), 1, layout=layout)
        with torch.no_grad(), Recorder() as recorder:
            kept = block(tokens)
        assert kept.layout.lengths.item() > 100
        largest.append(max(size for _, size in recorder.operations))
    assert largest[1] <= 4.1 * largest[0]
    assert largest[1] < 4097**2 / 4


@pytest.mark.parametrize("rule", ["official", "paper"])
def test_sampling_costs_one_sort(rule):
    """However many candidates there are, the same operations run, each over at most as many numbers; one of them is a
    sort. So the work is N log N.
    """
    found = []
    for patches in PATCHES:
        scores = torch.rand(3, patches, generator=torch.Generator().manual_seed(patches))
        candidates = Candidates(
            scores,
            lengths=torch.full((3,), patches),
            max_tokens=patches,
            num_positions=patches,
            position=lambda patches=patches: torch.arange(patches).expand(3, -1),
        )
        with Recorder() as recorder:
            keep = InverseTransform(num_tokens=0.5, rule=rule).select(candidates)
        assert keep.any(dim=1).all()
        assert max(size for _, size in recorder.operations) <= 3 * (patches + 1)
        found.append([name for name, _ in recorder.operations])
    assert found[0] == found[1]
    assert sum("sort" in name for name in found[0]) == 1
