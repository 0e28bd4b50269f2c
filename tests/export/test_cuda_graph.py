"""What a GPU waits for: nothing in the static layout, so it fits in a CUDA graph; once per ATS block when packed.

There is no GPU here. PyTorch's fake tensors take its place: they have a device, shapes and no numbers, and any step
that asks for a number (item, tolist, nonzero, a mask as an index) raises. On a GPU each would make the host wait.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.attention.varlen
from test_models import small_vit
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    unset_fake_temporarily,
)

from ats.config import get_cfg
from ats.errors import UserError
from ats.export import cuda_graph
from ats.kernels import triton_sampling, triton_scores
from ats.models import build_model
from ats.tokens import Layout

SAMPLED = (40, 25, 12)  # tokens kept, as if a GPU had said so


@pytest.fixture(params=[True, False], ids=["kernels", "plain"])
def fake_gpu(monkeypatch, request):
    """A mode in which tensors can be on a GPU that is not there. The kernels are left out: they only launch."""

    def launch(scores, *_):
        assert scores.is_cuda
        return torch.empty_like(scores, dtype=torch.bool) if request.param else None

    def launch_scores(q, k, v, *, start, lengths, longest, scale):
        assert k.is_cuda
        return torch.empty(len(lengths), longest, device=k.device) if request.param else None

    monkeypatch.setattr(triton_sampling, "try_official_rule", launch)
    monkeypatch.setattr(triton_scores, "try_cls_scores", launch_scores)
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        yield mode


def on_gpu(dtype: torch.dtype, **options) -> tuple[torch.nn.Module, torch.Tensor]:
    """A small ViT and images with fake parameters on "cuda:0" (`Module.to` does not take fake tensors)."""
    with unset_fake_temporarily():
        model = small_vit(dtype=dtype, **options)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                fake = torch.empty(parameter.shape, dtype=dtype, device="cuda:0")
                module._parameters[name] = torch.nn.Parameter(fake)
    return model, torch.empty(3, 3, 32, 32, device="cuda:0", dtype=dtype)


@pytest.mark.parametrize("score", ["cls_attention_value_norm", "mean_attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["official", "paper"])
def test_static_layout_never_waits(fake_gpu, score, dtype, rule):
    """The whole network runs without one number being known."""
    model, x = on_gpu(dtype, layout="static", num_tokens=0.7, score=score, rule=rule)
    with torch.no_grad():
        logits = model(x)
    assert logits.shape == (3, 7)
    assert logits.is_cuda


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packed_layout_waits_once_per_ats_block(fake_gpu, monkeypatch, dtype):
    """`Layout.from_lengths` alone reads numbers, once in each of three ATS blocks; half precision attends by varlen."""
    model, x = on_gpu(dtype, num_tokens=0.7)
    waits, attended = [], []

    def answered(lengths):
        layout = Layout(lengths, total=3 * SAMPLED[len(waits)] - 4, longest=SAMPLED[len(waits)])
        waits.append(layout)
        return layout

    def varlen(q, k, v, q_offsets, k_offsets, q_longest, k_longest, *, scale):  # the real one asks the driver
        attended.append((q_longest, k_longest))
        return q.clone()

    monkeypatch.setattr(Layout, "from_lengths", answered)
    monkeypatch.setattr(torch.nn.attention.varlen, "varlen_attn", varlen)
    with torch.no_grad():
        model(x)
    assert len(waits) == 3
    assert attended == ([] if dtype == torch.float32 else [(40, 65), (25, 40), (12, 25)])


def test_packed_layout_waits_in_from_lengths(fake_gpu):
    """The test above would notice: there, fake tensors refuse."""
    model, x = on_gpu(torch.float32, num_tokens=0.7)
    with torch.no_grad(), pytest.raises((DataDependentOutputException, DynamicOutputShapeException)):
        model(x)


def test_from_lengths_reads_numbers_once():
    """One transfer brings the total and the longest."""
    calls = []

    class Reads(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function in (torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.__int__, torch.Tensor.__bool__):
                calls.append(function.__name__)
            return function(*args, **(kwargs or {}))

    with Reads():
        layout = Layout.from_lengths(torch.tensor([3, 5, 2]))
    assert (layout.total, layout.longest) == (10, 5)
    assert calls == ["tolist"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="only where there is no GPU")
def test_capture_without_a_gpu_says_so():
    with pytest.raises(UserError, match="cannot be captured as a CUDA graph: PyTorch sees no GPU"):
        cuda_graph.capture(small_vit(layout="static"), torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({}, lambda model: model, "ATS.LAYOUT static"),
        ({"layout": "static"}, lambda model: model.train(), "model.eval"),
        ({"layout": "static", "sampler": "random"}, lambda model: model, "draws on the CPU"),
        ({"layout": "static"}, lambda model: model, ""),
        ({"ats": False}, lambda model: model, ""),
    ],
)
def test_what_can_be_captured(fake_gpu, monkeypatch, options, change, message):
    """Each obstacle is named with what to do about it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model, x = on_gpu(torch.float32, **options)
    reason = cuda_graph.obstacle(change(model), x)
    assert message in reason
    assert bool(reason) == bool(message)
    assert "must be on the GPU" in cuda_graph.obstacle(model, x.cpu())


def test_timms_models_and_other_methods_can_be_captured(fake_gpu, monkeypatch):
    """A timm model has its layout elsewhere; ToMe leaves as many tokens of every image, whatever the layout."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    x = torch.empty(1, 3, 32, 32, device="cuda:0")
    for layout, sampler, message in (("static", "topk", ""), ("packed", "topk", "static"), ("packed", "tome", "")):
        with unset_fake_temporarily():
            keys = ["MODEL.NAME", "timm/vit_tiny_patch16_224", "TIMM.KWARGS", [["img_size", 32]], "ATS.ENABLE", True]
            keys += ["ATS.BLOCKS", [1, 2], "ATS.NUM_TOKENS", 1.0, "ATS.LAYOUT", layout, "ATS.SAMPLER", sampler]
            cfg = get_cfg()
            cfg.merge_from_list([*keys, "DATA.TRAIN_CROP_SIZE", 32, "DATA.TEST_CROP_SIZE", 32])
            model = build_model(cfg).eval()
        monkeypatch.setattr(model, "parameters", lambda: iter([x]))  # on the GPU
        reason = cuda_graph.obstacle(model, x)
        assert message in reason
        assert bool(reason) == bool(message)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_captured_network_says_what_the_network_says(dtype):
    """New inputs give the logits of the network run eagerly; another shape is refused."""
    model = small_vit(layout="static", num_tokens=0.7, dtype=torch.float32).cuda()
    x = torch.randn(2, 3, 32, 32, device="cuda")
    fast = cuda_graph.capture(model, x, dtype=dtype)
    for _ in range(3):
        x = torch.randn_like(x)
        with torch.no_grad(), torch.autocast("cuda", dtype, enabled=dtype is not None):
            want = model(x)
        torch.testing.assert_close(fast(x), want, atol=1e-5 if dtype is None else 2e-2, rtol=0)
    with pytest.raises(ValueError, match="captured for"):
        fast(x[:1])
