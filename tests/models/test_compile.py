"""torch.compile: the static layout is one graph, the others are cut where a number of tokens must be known, and nowhere
else; another batch does not compile anew.
"""

from __future__ import annotations

import pytest
import torch
from test_models import small_vit
from torch._dynamo.utils import counters

pytestmark = pytest.mark.long


def vit(layout: str):
    """4 blocks, of which the last three sample; float32."""
    return small_vit(layout=layout, num_tokens=0.6).float()


def images(batch_size: int, seed: int) -> torch.Tensor:
    return torch.randn(batch_size, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _forget_compiled():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("layout", "most_graphs"),
    # A sampling block has one place where Python must wait for a number, and Dynamo cuts every function on the way
    # there (attend, keep, ...). The pieces are compiled for the first such block, whose input is dense, and for the
    # second; all later blocks use the second's, so the count does not grow with the network.
    [("static", 1), ("packed", 15), ("padded", 16)],
)
def test_graphs_and_the_reasons_for_cutting_them(layout, most_graphs):
    """The counts of docs/SPEED.md; the only reason for a break is a number of tokens."""
    with torch.no_grad():
        explained = torch._dynamo.explain(vit(layout))(images(3, seed=0))
    assert 1 <= explained.graph_count <= most_graphs
    places = {reason.user_stack[-1].name for reason in explained.break_reasons}
    assert places <= ({"from_lengths"} if layout == "packed" else {"keep"} if layout == "padded" else set())
    assert bool(places) == (layout != "static")


@pytest.mark.parametrize("layout", ["static", "packed"])
def test_another_batch_does_not_compile_anew(layout):
    """After one batch of each of two sizes everything is compiled; what the images keep makes no difference."""
    model = vit(layout)
    compiled = torch.compile(model, backend="eager", fullgraph=layout == "static")
    graphs = []
    with torch.no_grad():
        for seed, batch_size in enumerate((3, 5, 2, 6)):
            x = images(batch_size, seed)
            torch.testing.assert_close(compiled(x), model(x), atol=1e-4, rtol=0)
            graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[1] == graphs[2] == graphs[3]


def test_training_through_aot_autograd():
    """Forward and backward of the static layout, compiled as one graph, give the gradients of eager packed training."""
    eager, model = vit("packed"), vit("static")
    x = images(3, seed=0)
    eager(x).square().sum().backward()
    torch.compile(model, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    for want, got in zip(eager.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad, atol=1e-4 * want.grad.abs().max().item() + 1e-6, rtol=0)
