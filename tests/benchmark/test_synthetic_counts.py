"""Imposed token counts are the profile's."""

from __future__ import annotations

import pytest
import torch
from tiny_vit import tiny

from ats.benchmark.synthetic_counts import PAPER_BLOCKS, PAPER_MEAN, PAPER_STD, SyntheticCounts, synthetic_counts
from ats.models import build_model
from ats.reduction import Candidates
from ats.reduction.inverse_transform import InverseTransform


def test_imposed_counts_have_the_profiles_mean_and_spread():
    """Blocks 3 to 11 of a random network keep what the paper's histograms say; afterwards it samples as before.

    Images have the same order in every block.
    """
    model = build_model(tiny()).eval()
    x = torch.randn(32, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = model.forward_tokens(x[:2])[1]
        with synthetic_counts([model]) as counts:
            counts.draw(x, seed=1)
            trace = model.forward_tokens(x)[1]
        after = model.forward_tokens(x[:2])[1]
    kept = torch.stack([entry.num_tokens for entry in trace]).double()
    assert [entry.block for entry in trace] == list(PAPER_BLOCKS)
    torch.testing.assert_close(kept.mean(dim=1), torch.tensor(PAPER_MEAN, dtype=torch.float64), atol=1.5, rtol=0)
    torch.testing.assert_close(kept.std(dim=1), torch.tensor(PAPER_STD, dtype=torch.float64), atol=1.5, rtol=0)
    assert (torch.corrcoef(kept) > 0.99).all()
    assert all(torch.equal(a.position, b.position) for a, b in zip(before, after, strict=True))


def test_imposed_counts_scale_and_stay_within_the_budget():
    """Half the profile's tokens on request; never more than K."""
    x = torch.randn(16, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    for overrides, scale, want in ((), 0.5, 0.5 * PAPER_MEAN[0]), (("ATS.NUM_TOKENS", 50), 1.0, 50):
        model = build_model(tiny("ATS.BLOCKS", [3], *overrides)).eval()
        with torch.inference_mode(), synthetic_counts([model], scale=scale) as counts:
            counts.draw(x, seed=1)
            model(x)
            addresses = [wanted.data_ptr() for wanted in counts._wanted.values()]
            counts.draw(x, seed=2)
            kept = model.forward_tokens(x)[1][0].num_tokens.double()
        # a CUDA graph keeps reading the same memory
        assert addresses == [wanted.data_ptr() for wanted in counts._wanted.values()] != []
        assert kept.mean().item() == pytest.approx(want, abs=1.5)


def test_imposed_counts_go_by_the_networks_depth():
    """A network that samples only in blocks 3 and 4 keeps there what one that samples everywhere keeps."""
    model = build_model(tiny("ATS.BLOCKS", [3, 4])).eval()
    x = torch.randn(16, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), synthetic_counts([model]) as counts:
        counts.draw(x, seed=1)
        kept = [entry.num_tokens.double().mean().item() for entry in model.forward_tokens(x)[1]]
    assert kept == pytest.approx(PAPER_MEAN[:2], abs=1.5)


def test_imposed_counts_in_a_compiled_network():
    """Every draw reaches a compiled graph, including the first after compilation."""
    torch._dynamo.reset()
    counts, lengths = SyntheticCounts(depth=12), torch.tensor([196, 150])

    def keep(scores):
        about = {"lengths": lengths, "max_tokens": 196, "num_positions": 197, "position": lambda: scores}
        return counts(Candidates(scores, **about), InverseTransform(block=5))

    compiled = torch.compile(keep, backend="aot_eager")
    for seed in range(3):
        counts.draw(lengths, seed=seed)
        with torch.inference_mode():
            kept = compiled(torch.rand(2, 196))
            assert torch.equal(kept, keep(torch.rand(2, 196)))
        wanted = (counts.share_kept(5) * 197).round()
        assert torch.equal(kept.sum(dim=1), wanted.minimum(lengths).long())
