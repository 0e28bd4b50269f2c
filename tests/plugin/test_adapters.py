"""Linear layers that are more than `Linear`: adapters, quantised layers, hooks. They are called, not read."""

from __future__ import annotations

import pytest
import timm_models
import torch
import transformers_models
from helpers import counted_multiply_adds, keep_all
from torch import Tensor, nn

import ats
from ats.errors import UserError
from ats.flops import gflops

SETTINGS = {"blocks": [1, 2], "num_tokens": 0.6}


class Lora(nn.Module):
    """A linear layer with a low-rank adapter beside it, as peft wraps it."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base_layer, self.in_features, self.out_features = base, base.in_features, base.out_features
        self.lora_a = nn.Linear(base.in_features, rank, bias=False, dtype=base.weight.dtype)
        self.lora_b = nn.Linear(rank, base.out_features, bias=False, dtype=base.weight.dtype)
        self.weight = base.weight  # peft has it too: reading it would miss the adapter

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_b(self.lora_a(x))


def adapt(model: nn.Module, *names: str) -> nn.Module:
    """Put an adapter on every linear layer with one of these names."""
    torch.manual_seed(1)
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if name in names and isinstance(layer, nn.Linear):
                setattr(module, name, Lora(layer))
    return model


def merged(model: nn.Module) -> nn.Module:
    """The adapters added to the weights."""
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if isinstance(layer, Lora):
                layer.base_layer.weight.data += layer.lora_b.weight @ layer.lora_a.weight
                setattr(module, name, layer.base_layer)
    return model


MODELS = {
    "timm": (timm_models, "deit_tiny_patch16_224", ("qkv", "proj", "fc1")),
    "timm, rotary": (timm_models, "vit_small_patch16_rope_mixed_ape_224", ("qkv", "fc2")),
    "transformers": (transformers_models, "vit classifier", ("q_proj", "v_proj", "o_proj")),
}


def make(kind: str) -> tuple[nn.Module, Tensor, tuple[str, ...]]:
    """A small model, images for it, and the names of its layers that get adapters."""
    library, name, layers = MODELS[kind]
    model = library.small_model(name)
    x = library.images(model) if library is timm_models else library.images()
    return model, x, layers


def logits(model: nn.Module, x: Tensor) -> Tensor:
    out = model(x)
    return out if isinstance(out, Tensor) else out.logits


@pytest.mark.parametrize(
    "options", [{}, {"dropped": "merge"}, {"sampler": "tome", "r": 3}, {"score": "mean_attention"}]
)
@pytest.mark.parametrize("kind", MODELS)
def test_adapters_count_before_and_after_the_patch(kind, options):
    """The same numbers as with the adapters merged into the weights, in whichever order; gradients reach them."""
    settings = {"blocks": [1, 2], **({} if "sampler" in options else {"num_tokens": 0.6}), **options}
    found = {}
    for order in ("adapt, patch", "patch, adapt"):
        model, x, layers = make(kind)
        for step in order.split(", "):
            adapt(model, *layers) if step == "adapt" else ats.patch(model, **settings)
        found[order] = logits(model, x)
        found[order].square().sum().backward()
        grads = [p.grad for name, p in model.named_parameters() if "lora_b" in name]
        assert grads
        assert all(grad.any() for grad in grads)
    with torch.no_grad():
        found["merged"] = logits(merged(model), x)
        plain, x, _ = make(kind)
        without = logits(ats.patch(plain, **settings), x)
    assert torch.equal(found["adapt, patch"], found["patch, adapt"])
    torch.testing.assert_close(found["merged"], found["adapt, patch"], atol=1e-10, rtol=0)
    assert (without - found["merged"]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("kind", MODELS)
def test_keep_all_equals_the_adapted_host(kind):
    model, x, layers = make(kind)
    want = logits(adapt(model, *layers), x)
    with keep_all(ats.patch(model, **SETTINGS)):
        torch.testing.assert_close(logits(model, x), want, atol=1e-10, rtol=0)


@pytest.mark.parametrize("options", [{}, {"dropped": "merge"}, {"sampler": "tome", "r": 3}])
def test_the_formula_counts_adapters(options):
    """A joint projection that has to be called computes queries of all tokens."""
    model, x, layers = make("timm")
    settings = {"blocks": [1, 2], **({} if "sampler" in options else {"num_tokens": 0.6}), **options}
    ats.patch(adapt(model, *layers), **settings).float()
    total, trace = counted_multiply_adds(model, x[:1].float())
    assert gflops(model, trace, x[:1].shape).as_run.item() * 1e9 == pytest.approx(total, abs=0.5)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_dynamic_quantisation():
    """Before and after the patch the same; near the network in float32; its head is counted."""
    model, x, _ = make("timm")
    x = x.float()
    want = ats.patch(model.float(), **SETTINGS)(x)
    quantise = torch.ao.quantization.quantize_dynamic
    after = quantise(model, {nn.Linear})
    before = ats.patch(quantise(make("timm")[0].float(), {nn.Linear}), **SETTINGS)
    assert torch.equal(before(x), after(x))
    assert 0 < (after(x) - want).abs().max() < 0.2 * want.abs().max()
    before.ats.trace = model.ats.trace = True
    before(x), model(x)
    costs = [gflops(own, own.ats.last, x.shape).dense for own in (before, model)]
    assert costs[0] == costs[1]


@torch.no_grad()
def test_hooks_on_a_projection_are_called():
    model, x, _ = make("timm")
    ats.patch(model, **SETTINGS)
    without = model(x)
    model.blocks[1].attn.qkv.register_forward_hook(lambda _module, _args, out: out * 1.5)
    assert (model(x) - without).abs().max() > 1e-3


@pytest.mark.parametrize("where", ["model", "block", "attention"])
@pytest.mark.parametrize("kind", ["timm", "transformers"])
def test_a_forward_in_the_instance_is_refused_by_name(kind, where):
    """accelerate's hooks and monkey patches lie there; ATS would go past them."""
    model, _, _ = make(kind)
    blocks = model.blocks if kind == "timm" else model.vit.layers
    inner = blocks[2].attn if kind == "timm" else blocks[2].attention
    module = {"model": model, "block": blocks[2], "attention": inner}[where]
    old = module.forward
    module.forward = lambda *args, **kwargs: old(*args, **kwargs)
    with pytest.raises(UserError, match=r"a forward of its own|whose forward was replaced"):
        ats.patch(model, **SETTINGS)
