"""ATS.LAYOUT: padding changes where tokens lie and nothing else; static shapes make the network one graph."""

from __future__ import annotations

import pytest
import torch
from helpers import planned
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models import small_vit
from timm_models import LAWS, images, small_model

from ats.config import get_cfg
from ats.errors import UserError
from ats.models import build_model
from ats.plugin.timm.model import attach, default_score, network


@pytest.mark.parametrize("layout", ["padded", "static"])
@given(
    sampler=st.sampled_from(["inverse_transform", "topk", "random"]),
    score=st.sampled_from(["cls_attention_value_norm", "cls_attention", "mean_attention"]),
    num_tokens=st.sampled_from([1.0, 0.6, 20]),
    distilled=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=25)
def test_layouts_give_the_same_logits_and_kept_tokens(layout, sampler, score, num_tokens, distilled, seed):
    """The padded and the static network keep what the packed one keeps, and say the same to round-off."""
    options = {"sampler": sampler, "score": score, "num_tokens": num_tokens, "distilled": distilled, "seed": seed}
    x = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with torch.no_grad():
        want, trace = small_vit(**options).forward_tokens(x)
        got, padded_trace = small_vit(layout=layout, **options).forward_tokens(x)
    torch.testing.assert_close(got, want, atol=1e-10, rtol=0)
    for entry, padded in zip(trace, padded_trace, strict=True):
        assert torch.equal(entry.num_tokens, padded.num_tokens)
        assert torch.equal(entry.position, padded.position)


@pytest.mark.parametrize("layout", ["padded", "static"])
def test_layouts_give_the_same_gradients(layout):
    """Rows of padding send nothing back."""
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    grads = []
    for kind in ("packed", layout):
        model = small_vit(layout=kind, num_tokens=0.5)
        model(x).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    for want, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-9 * want.abs().max().item() + 1e-12, rtol=0)


def test_static_shapes_do_not_depend_on_the_image():
    """Every block's output has min(K, max_tokens) rows per image, however few tokens the image keeps."""
    model = small_vit(layout="static", num_tokens=1.0)
    rows = []
    for block in list(model.blocks)[1:]:
        block.register_forward_hook(lambda _module, _args, out: rows.append((len(out.x), out.max_tokens)))
    x = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    kept = torch.stack([entry.num_tokens for entry in model.forward_tokens(x)[1]])
    assert rows == [(6 * 65, 65)] * 3
    assert len(kept[-1].unique()) > 1  # while images differ in what they keep
    assert (kept < 65).all()


@pytest.mark.parametrize("layout", ["padded", "static"])
@pytest.mark.parametrize("name", LAWS)
def test_layouts_of_timm_models(name, layout):
    """Logits, features and kept tokens of timm's models are those of the packed layout."""
    packed, other = small_model(name), small_model(name)
    reductions = planned(blocks=[1, 3], num_tokens=12, score=default_score(packed), **network(packed))
    attach(packed, reductions)
    attach(other, reductions)
    other.layout = layout
    x = images(packed)
    with torch.no_grad():
        (want, trace), (got, other_trace) = packed.forward_tokens(x), other.forward_tokens(x)
        torch.testing.assert_close(got, want, atol=1e-9, rtol=0)
        torch.testing.assert_close(other.forward_features(x), packed.forward_features(x), atol=1e-9, rtol=0)
    assert any(len(entry.num_tokens.unique()) > 1 or (entry.num_tokens < 12).any() for entry in trace)
    for entry, padded in zip(trace, other_trace, strict=True):
        assert torch.equal(entry.num_tokens, padded.num_tokens)
        assert torch.equal(entry.position, padded.position)


def test_only_vits_have_other_layouts():
    """A network that needs the grid of patches says so instead of computing with padding."""
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.NAME", "XViT", "ATS.ENABLE", True, "ATS.LAYOUT", "static"])
    with pytest.raises(UserError, match=r"ATS\.LAYOUT static.*XViT"):
        build_model(cfg)
