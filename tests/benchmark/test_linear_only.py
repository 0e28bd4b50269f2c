"""The linear layers alone are those of the network."""

from __future__ import annotations

import pytest
import torch
from tiny_vit import tiny

from ats.benchmark.breakdown import LinearCalls
from ats.flops import gflops
from ats.kernels import cpu
from ats.models import build_model


@pytest.mark.parametrize("cpu_backend", ["auto", "onednn"])
def test_linear_layers_are_those_of_the_network(cpu_backend, tmp_path, monkeypatch):
    """All of them, with the rows that remain, and not those by which the kernels are chosen: their FLOPs are the
    network's without embedding and attention.
    """
    monkeypatch.setattr(cpu, "_choices", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    torch.manual_seed(0)
    model, x = build_model(tiny("ATS.NUM_TOKENS", 0.5)).eval(), torch.randn(2, 3, 224, 224)
    model.cpu_backend = cpu_backend
    linear = LinearCalls.of(model, x)
    with torch.inference_mode():
        trace = model.forward_tokens(x)[1]
    kept = {entry.block: entry.num_tokens.double() for entry in trace}
    num_in = torch.full((2,), 197.0, dtype=torch.float64)
    attention = 0
    for block in range(len(model.blocks)):
        num_out = kept.get(block, num_in)
        attention += (2 * num_in * num_out + (num_in if block in kept else 0)).sum().item() * model.embed_dim
        num_in = num_out
    linear.replay(lambda: model.fastest_kernels(x))()  # alone: no GELU follows the layer that has one behind it
    total = gflops(model, trace, x.shape).as_run.sum().item() * 1e9
    assert linear.multiply_adds() + attention + 2 * 196 * model.embed_dim * 768 == pytest.approx(total)
    shapes = [shape for shape, _, _ in linear.calls]
    with LinearCalls() as replayed:
        linear.replay()()
    assert [shape for shape, _, _ in replayed.calls] == shapes
