"""Networks with ATS on a GPU do what they do on the CPU, in inference, compiled, and in a training step."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny_vit import tiny

from ats.benchmark.synthetic_counts import synthetic_counts
from ats.models import build_model
from ats.models.block import ats_blocks

pytestmark = pytest.mark.gpu


@pytest.fixture
def pair():
    """A small network on the CPU and its copy on the GPU in full precision, with 3 images on each."""
    torch.manual_seed(0)
    cfg = tiny("VIT.DEPTH", 4, "ATS.BLOCKS", [1, 2, 3], "VIT.EMBED_DIM", 64)
    model = build_model(cfg).eval()
    x = torch.randn(3, 3, 224, 224)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    on_gpu, x_gpu = copy.deepcopy(model).cuda(), x.cuda()
    with synthetic_counts([model]) as counts, synthetic_counts([on_gpu]) as gpu_counts:
        counts.draw(x)
        gpu_counts.draw(x_gpu)
        yield model, x, on_gpu, x_gpu
    torch.set_float32_matmul_precision(precision)


def test_logits_are_those_of_the_cpu(pair):
    """In full precision to round-off, in bfloat16 nearly; as many tokens stay."""
    model, x, on_gpu, x_gpu = pair
    with torch.inference_mode():
        (want, want_trace), (got, trace) = model.forward_tokens(x), on_gpu.forward_tokens(x_gpu)
        half = on_gpu.bfloat16()(x_gpu.bfloat16())
    torch.testing.assert_close(got.cpu(), want, atol=1e-4, rtol=0)
    torch.testing.assert_close(half.cpu().float(), want, atol=5e-2, rtol=0)
    assert [entry.num_tokens.tolist() for entry in trace] == [entry.num_tokens.tolist() for entry in want_trace]


def test_gradients_are_those_of_the_cpu(pair):
    """One step of a classifier, every parameter."""
    model, x, on_gpu, x_gpu = pair
    target = torch.tensor([0, 1, 2])
    F.cross_entropy(model(x), target).backward()
    F.cross_entropy(on_gpu(x_gpu), target.cuda()).backward()
    for (name, want), got in zip(model.named_parameters(), on_gpu.parameters(), strict=True):
        torch.testing.assert_close(got.grad.cpu(), want.grad, atol=1e-4, rtol=1e-3, msg=name)


def test_compiled_network_gives_the_logits_of_the_eager_one(pair):
    """Although the number of tokens is known on the GPU alone."""
    _, _, on_gpu, x_gpu = pair
    assert len(ats_blocks(on_gpu)) == 3
    with torch.inference_mode():
        want = on_gpu(x_gpu)
        torch.testing.assert_close(torch.compile(on_gpu)(x_gpu), want, atol=1e-4, rtol=0)
    torch.compiler.reset()
