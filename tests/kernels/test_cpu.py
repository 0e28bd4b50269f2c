"""The CPU's kernels: the same numbers by each of them, chosen by the clock, replaced nowhere else."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import VIDEO_MODELS
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ats
from ats.config import get_cfg
from ats.kernels import cpu, remembered
from ats.models import build_model

SMALL = ["MODEL.NUM_CLASSES", 5, "VIT.IMG_SIZE", 32, "VIT.PATCH_SIZE", 4, "VIT.EMBED_DIM", 48, "VIT.NUM_HEADS", 3,
         "VIT.DEPTH", 4, "ATS.ENABLE", True, "ATS.BLOCKS", [1, 2, 3], "ATS.NUM_TOKENS", 40]  # fmt: skip
NETWORKS = {"vit": [], "distilled": ["VIT.DISTILLED", True], "tome": ["ATS.SAMPLER", "tome"]}
NETWORKS |= {name: [*own, "DATA.NUM_FRAMES", 8] for name, own in VIDEO_MODELS.items()}


@pytest.fixture(autouse=True)
def nothing_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def small(*overrides: object) -> nn.Module:
    cfg = get_cfg()
    cfg.merge_from_list([*SMALL, *overrides])
    torch.manual_seed(0)
    return build_model(cfg).eval()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.Size]]:
    """The shapes of the weights that oneDNN multiplied by."""
    found, original = [], cpu.linear_
    monkeypatch.setattr(cpu, "linear_", lambda x, w, bias=None: (found.append(w.shape), original(x, w, bias))[1])
    return found


@pytest.mark.parametrize("name", NETWORKS)
def test_same_logits_and_kept_tokens(name, calls):
    """float32 stays float32: round-off on the logits, the same tokens kept."""
    model = small(*NETWORKS[name])
    x = torch.randn(2, 3, *([8] if name in VIDEO_MODELS else []), 32, 32)
    results = {}
    for backend in ("torch", "onednn"):
        model.cpu_backend = backend
        with torch.no_grad():
            results[backend] = model.forward_tokens(x)
        assert bool(calls) == (backend == "onednn")
    (want, want_trace), (got, trace) = results.values()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert [e.num_tokens.tolist() for e in trace] == [e.num_tokens.tolist() for e in want_trace]
    assert all(torch.equal(a.position, b.position) for a, b in zip(trace, want_trace, strict=True))


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_patched_models(library, calls):
    """Dense and ATS blocks of patched models run by it too, set by `model.ats.cpu_backend`."""
    if library == "timm":
        model = timm.create_model("vit_tiny_patch16_224", img_size=96, depth=3, num_classes=4).eval()
    else:
        from transformers import ViTConfig, ViTForImageClassification

        config = ViTConfig(hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96)
        model = ViTForImageClassification(config).eval()
    ats.patch(model, blocks=[1, 2], num_tokens=0.7)
    x, logits = torch.randn(2, 3, *((96, 96) if library == "timm" else (224, 224))), []
    for backend in ("torch", "onednn"):
        model.ats.cpu_backend = backend
        with torch.no_grad():
            out = model(x)
        logits.append(out if library == "timm" else out.logits)
    assert len({tuple(shape) for shape in calls}) >= 4  # projections, two layers of the MLP, attention
    torch.testing.assert_close(logits[1], logits[0], atol=1e-5, rtol=0)
    with pytest.raises(ats.errors.UserError, match="cpu_backend 'onedn': choose from auto, torch, onednn"):
        model.ats.cpu_backend = "onedn"


def test_training_gives_the_same_gradients(calls):
    """Forward and backward by oneDNN; the attention stays fused, which saves no matrix for the backward pass."""
    model, x, gradients = small(), torch.randn(2, 3, 32, 32), []
    for backend in ("torch", "onednn"):
        model.cpu_backend = backend
        model.zero_grad()
        model(x).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert len(calls) > 3 * 4  # forward, to the input, to the weight
    for name, want in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], want, atol=1e-5, rtol=1e-4, msg=lambda text, n=name: n + text)


def test_gradients_of_gradients():
    """A gradient penalty works: its second backward pass runs by PyTorch's own products."""
    weight, bias = torch.randn(8, 6, requires_grad=True), torch.randn(8, requires_grad=True)
    x, penalties = torch.randn(10, 6, requires_grad=True), []
    for kernels in (cpu.PLAIN, cpu.BACKENDS["onednn"]):
        with cpu.Kernels(kernels):
            (grad,) = torch.autograd.grad(F.linear(x, weight, bias).tanh().sum(), x, create_graph=True)
            penalties.append(torch.autograd.grad(grad.square().sum(), weight)[0])
    torch.testing.assert_close(*penalties)


def test_frozen_weights_and_inputs(calls):
    """Only the gradients that are asked for are computed."""
    weight, x = torch.randn(8, 6), torch.randn(10, 6, requires_grad=True)
    with cpu.Kernels(cpu.BACKENDS["onednn"]):
        F.linear(x, weight).sum().backward()
    assert len(calls) == 2
    torch.testing.assert_close(x.grad, weight.sum(dim=0).expand(10, -1))


class Clock:
    """Time that passes when a kernel says so."""

    now = 0.0

    def kernel(self, seconds: float):
        def run(*_: object) -> None:
            self.now += seconds

        return run


@pytest.mark.parametrize(("onednn", "chosen"), [(0.5, "onednn"), (0.9, "onednn"), (0.95, "torch"), (2.0, "torch")])
def test_the_clock_decides(onednn, chosen, monkeypatch):
    """The faster kernel runs if it is faster by more than what may be noise."""
    clock = Clock()
    monkeypatch.setattr(cpu.time, "perf_counter", lambda: clock.now)
    assert cpu._first_by_far({"torch": clock.kernel(1.0), "onednn": clock.kernel(onednn)}) == chosen


def test_measured_once(monkeypatch):
    """auto times kernels once per process, threads, width and kind of pass, and then uses what it found."""
    measured = []
    monkeypatch.setattr(cpu, "_choices", {})
    monkeypatch.setattr(cpu, "_measure", lambda block, n: (measured.append(n), cpu.BACKENDS["onednn"])[1])
    model, x = small(), torch.randn(1, 3, 32, 32)
    for _ in range(2):
        with torch.no_grad():
            model(x)
        model(x)
    assert measured == [65, 65]  # without and with gradients; tokens of a sequence
    found = cpu.choices()
    assert all(type(value) in (int, bool, str) for row in found for value in row)  # as a checkpoint holds them
    monkeypatch.setattr(cpu, "_choices", {})
    cpu.restore(found)
    model(x)
    assert cpu.choices() == found
    assert len(measured) == 2


def test_measured_once_on_a_machine(monkeypatch):
    """The next process takes what the first chose, for every kind of question; another PyTorch asks anew."""
    answers = iter([cpu.Choice("onednn", "fused"), cpu.PLAIN, cpu.PLAIN])
    monkeypatch.setattr(cpu, "_measure", lambda block, n: next(answers))
    block, found = small().blocks[0], []
    for training in (False, False, True, True, False):
        monkeypatch.setattr(cpu, "_choices", {})  # a new process
        with torch.set_grad_enabled(training):
            found.append(cpu._fastest(block, lambda: 65).linear)
    assert found == ["onednn", "onednn", "torch", "torch", "onednn"]
    monkeypatch.setattr(cpu, "_choices", {})
    monkeypatch.setattr(remembered, "_machine", lambda: {"torch": "99.0"})
    with torch.no_grad():
        assert cpu._fastest(block, lambda: 65) == cpu.PLAIN


@pytest.mark.parametrize("content", ["", "[]", '{"chosen": 3}', "\x00"])
def test_a_damaged_memory_is_no_obstacle(content):
    """Nor is a folder that cannot be written."""
    assert remembered.remembered({"width": 1}, lambda: ["a"]) == ["a"]
    (path,) = remembered.folder().iterdir()
    path.write_text(content)
    assert remembered.remembered({"width": 1}, lambda: ["b"]) == ["b"]
    path.unlink()
    remembered.folder().rmdir()
    remembered.folder().write_text("a file, not a folder")
    assert remembered.remembered({"width": 1}, lambda: ["c"]) == ["c"]


def test_the_measurement_itself():
    """It times the block that is there, and leaves its gradients and the random state alone."""
    block, state = small().blocks[0], torch.random.get_rng_state()
    for with_gradients in (False, True):
        with torch.set_grad_enabled(with_gradients):
            choice = cpu._measure(block, 65)
        assert choice.linear in ("torch", "onednn")
        assert choice.attention in cpu.ATTENTION
        assert choice.attention == "fused" or not with_gradients
    assert all(parameter.grad is None for parameter in block.parameters())
    assert torch.equal(state, torch.random.get_rng_state())


def test_other_threads_and_code_are_left_alone(calls):
    """Neither another thread during the pass nor anyone after it gets other kernels."""
    x, weight = torch.randn(16, 8), torch.randn(8, 8)
    with cpu.Kernels(cpu.BACKENDS["onednn"]):
        other = threading.Thread(target=F.linear, args=(x, weight))
        other.start()
        other.join()
        assert not calls
        F.linear(x, weight)
        assert len(calls) == 1
    F.linear(x, weight)
    assert len(calls) == 1


def test_threads_share_a_model():
    """Four threads at once give what one gives."""
    model = small("ATS.CPU_BACKEND", "onednn")
    images = torch.randn(4, 2, 3, 32, 32)
    with torch.no_grad():
        want = [model(x) for x in images]
    got = {}

    def run(index: int) -> None:
        with torch.no_grad():
            for _ in range(3):
                got[index] = model(images[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[index], want[index]) for index in range(4))


def test_what_only_pytorch_can_compute_stays_with_pytorch(calls):
    """Other dtypes, autocast, columns of a larger weight (for which oneDNN takes seconds), counters, torch.func."""
    x, weight = torch.randn(16, 8), torch.randn(8, 8)
    with cpu.Kernels(cpu.BACKENDS["onednn"]):
        F.linear(x.double(), weight.double())
        F.linear(x.bfloat16(), weight.bfloat16())
        torch.testing.assert_close(F.linear(x, torch.cat([weight, weight], dim=1)[:, :8]), x @ weight.t())
        F.linear(x[:4], weight)  # too few rows to pay
        torch.vmap(lambda row: F.linear(row, weight))(x[:, None].expand(-1, 9, -1))
    model, images = small("ATS.CPU_BACKEND", "onednn"), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            model(images)
        with FlopCounterMode(display=False):
            model(images)
        copy.deepcopy(model).bfloat16()(images.bfloat16())
    assert not calls


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_weights_of_another_type_than_the_images(dtype, monkeypatch):
    """transformers casts float32 images to the type of the weights; nothing is timed, as nothing can be replaced."""
    monkeypatch.setattr(cpu, "_choices", {})
    blocks, x = list(small().to(dtype).blocks), torch.randn(1, 3, 32, 32)
    with cpu.fastest(blocks, x, backend="auto", num_tokens=lambda: pytest.fail("timed")):
        blocks[0](torch.randn(1, 5, 48, dtype=dtype))
    assert not cpu.choices()


def test_pytorch_without_onednn(monkeypatch, caplog):
    """auto runs PyTorch's kernels; who asked for oneDNN is told once that it is not there."""
    monkeypatch.setattr(cpu, "ONEDNN_LINEAR", None)  # calling it would fail
    cpu._warn.cache_clear()
    for backend, warnings in (("auto", 0), ("onednn", 1), ("onednn", 1)):
        with torch.no_grad():
            small("ATS.CPU_BACKEND", backend)(torch.randn(1, 3, 32, 32))
        assert caplog.text.count("no linear layers by oneDNN") == warnings


def test_masks_dropout_and_causality_keep_the_fused_kernel(monkeypatch):
    """Only plain attention is replaced."""
    kernels = cpu.Kernels(cpu.BACKENDS["onednn"])
    monkeypatch.setattr(kernels, "attend", lambda *_: pytest.fail("replaced"))
    q = torch.randn(1, 2, 16, 8)
    with torch.no_grad(), kernels:
        F.scaled_dot_product_attention(q, q, q, torch.zeros(16, 16))
        F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
        F.scaled_dot_product_attention(q, q, q, is_causal=True)
    with kernels:
        F.scaled_dot_product_attention(q.requires_grad_(), q, q)


@pytest.mark.parametrize("name", cpu.ATTENTION)
def test_attention_kernels(name):
    """Each computes softmax(q k^T scale) v, for other numbers of queries than keys and values of another width."""
    q, k, v = torch.randn(2, 3, 9, 8), torch.randn(2, 3, 20, 8), torch.randn(2, 3, 20, 8)
    want = (q.double() @ k.double().transpose(2, 3) * 0.3).softmax(dim=-1) @ v.double()
    torch.testing.assert_close(cpu.ATTENTION[name](q, k, v, 0.3), want.float(), atol=1e-6, rtol=1e-5)


def test_recomputed_blocks_compute_the_same_twice(calls):
    """With activation checkpointing, the second pass runs in the backward pass, outside: both use PyTorch's kernels."""
    model = small("ATS.CPU_BACKEND", "onednn", "MODEL.ACT_CHECKPOINT", True)
    model.train()(torch.randn(2, 3, 32, 32)).sum().backward()
    assert not calls


def test_hooks_and_parametrizations_work_as_ever(calls):
    """The kernels replace the function that layers call, not the layers."""
    model, seen = small("ATS.CPU_BACKEND", "onednn"), []
    model.blocks[0].attn.qkv.register_forward_hook(lambda *_: seen.append(1))
    torch.nn.utils.parametrizations.weight_norm(model.blocks[0].mlp.fc1)
    with torch.no_grad():
        got = model(x := torch.randn(1, 3, 32, 32))
        model.cpu_backend = "torch"
        torch.testing.assert_close(got, model(x), atol=1e-5, rtol=0)
    assert seen
    assert calls


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the weights whose product and GELU were one call of oneDNN."""
    found, original = [], cpu.linear_gelu
    monkeypatch.setattr(cpu, "linear_gelu", lambda x, w, bias=None: (found.append(w.shape), original(x, w, bias))[1])
    return found


def test_gelu_runs_with_the_layer_before_it(fused):
    """In every MLP, without gradients; the logits are those of two calls."""
    model, x = small("ATS.CPU_BACKEND", "onednn"), torch.randn(2, 3, 32, 32)
    model(x)
    assert not fused
    with torch.no_grad():
        got = model(x)
        assert fused == [(192, 48)] * 4
        model.cpu_backend = "torch"
        torch.testing.assert_close(got, model(x), atol=1e-5, rtol=0)


@pytest.mark.parametrize("then", [lambda mlp: mlp.fc2(torch.randn(9, 192)), lambda mlp: None], ids=["layer", "end"])
def test_a_first_layer_by_itself_is_an_error_and_not_a_wrong_number(then):
    """At the next layer, or at the end."""
    mlp, x = small().blocks[0].mlp, torch.randn(9, 48)

    def run() -> None:
        with cpu.Kernels(cpu.BACKENDS["onednn"], before_gelu=frozenset([id(mlp.fc1.weight)])):
            then((mlp, mlp.fc1(x))[0])

    with torch.no_grad(), pytest.raises(AssertionError, match="did not go to that GELU"):
        run()


def see_output(mlp: nn.Module, seen: list[torch.Tensor]) -> None:
    mlp.fc1.register_forward_hook(lambda module, args, out: seen.append(out))


def see_input(mlp: nn.Module, seen: list[torch.Tensor]) -> None:
    mlp.act.register_forward_pre_hook(lambda module, args: seen.append(args[0]))


def see_all(mlp: nn.Module, seen: list[torch.Tensor]) -> None:
    """A forward of the instance's own, as accelerate and debuggers set it."""
    forward = mlp.fc1.forward
    mlp.fc1.forward = lambda x: (seen.append(out := forward(x)), out)[1]


@pytest.mark.parametrize("look", [see_output, see_input, see_all])
def test_who_looks_between_layer_and_gelu_sees_what_is_there(look, fused):
    """And the other MLPs run as one."""
    model, x, seen = small(), torch.randn(1, 3, 32, 32), []
    look(model.blocks[2].mlp, seen)
    for backend in ("torch", "onednn"):
        model.cpu_backend = backend
        with torch.no_grad():
            model(x)
    assert len(fused) == 3
    torch.testing.assert_close(*seen, atol=1e-5, rtol=0)
    assert seen[0].min() < -0.2  # the least that GELU gives is -0.17


@pytest.mark.parametrize("act", [nn.GELU("tanh"), nn.SiLU(), nn.Sequential(nn.GELU())])
def test_other_activations_run_by_themselves(act, fused):
    model, x, results = small(), torch.randn(1, 3, 32, 32), []
    for block in model.blocks:
        block.mlp.act = act
    for backend in ("torch", "onednn"):
        model.cpu_backend = backend
        with torch.no_grad():
            results.append(model(x))
    assert not fused
    torch.testing.assert_close(*results, atol=1e-5, rtol=0)


@given(rows=st.integers(8, 3000), behind=st.integers(0, 70), before=st.integers(0, 3))
def test_rows_are_made_round(rows, behind, before):
    """By zeros, or by what lies behind in memory, even NaN: the product is that of the rows given, and its shape."""
    memory = torch.full((before + rows + behind, 4), torch.nan)
    x, weight, bias = memory[before : before + rows].normal_(), torch.randn(3, 4), torch.randn(3)
    shapes = []
    out = cpu._on_round_rows(lambda x, *w: (shapes.append(len(x)), cpu.linear_(x, *w))[1], x, weight, bias)
    torch.testing.assert_close(out, F.linear(x, weight, bias))
    assert out.is_contiguous()
    assert rows <= shapes[0] <= 1.04 * rows + 1
    assert shapes[0] % (1 << max(rows.bit_length() - 6, 0)) == 0  # at most 32 numbers from 2^n to 2^(n+1)


def test_gradients_of_rows_made_round():
    """The added rows of zeros change no gradient."""
    weight, bias = torch.randn(8, 6, requires_grad=True), torch.randn(8, requires_grad=True)
    x, found = torch.randn(3, 67, 6, requires_grad=True), []
    for kernels in (cpu.PLAIN, cpu.BACKENDS["onednn"]):
        with cpu.Kernels(kernels):
            found.append(torch.autograd.grad(F.linear(x, weight, bias).tanh().sum(), [x, weight, bias]))
    for want, got in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
