"""ats.patch: the timm model stays itself, and what is not understood is refused by name."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer

import ats
from ats.errors import UserError
from ats.sampling import SAMPLERS

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 3, "num_classes": 7}
VARIANTS = {
    "vit": {},
    "layer scale (DeiT-III)": {"init_values": 0.3, "no_embed_class": True},
    "registers (DINOv2)": {"init_values": 0.3, "reg_tokens": 4, "no_embed_class": True},
    "q/k norm": {"qk_norm": True},
    "pre-norm (CLIP)": {"pre_norm": True},
    "fc norm": {"fc_norm": True},
}


def vit(**settings) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(**SMALL | settings).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_keep_all_equals_the_model_as_it_was(variant, monkeypatch):
    monkeypatch.setitem(SAMPLERS, "keep_all", lambda candidates, num_points, options: candidates.valid)
    model = vit(**VARIANTS[variant])
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    want, keys = model(x), list(model.state_dict())
    assert ats.patch(model, blocks=range(1, 4), sampler="keep_all") is model
    torch.testing.assert_close(model(x), want, rtol=0, atol=1e-12)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("variant", VARIANTS)
def test_samples_trains_and_copies(variant):
    model = ats.patch(vit(**VARIANTS[variant]), blocks=[1, 3], num_tokens=12)
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    logits = model.train()(x)
    assert [entry.block for entry in model.blocks.last] == [1, 3]
    assert model.blocks.last[0].num_tokens.max() <= 12
    logits.square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    for i in range(3):
        torch.testing.assert_close(model(x[i : i + 1]), model(x)[i : i + 1], rtol=0, atol=1e-10)
    torch.testing.assert_close(copy.deepcopy(model)(x), model(x), rtol=0, atol=0)


def test_equals_our_own_deit():
    """The same numbers as MODEL.NAME ViT with the same weights and settings."""
    from ats.models import VisionTransformer as OurViT
    from ats.sampling import plan_samplers

    host = vit()
    ours = OurViT(
        img_size=(32, 32), patch_size=8, embed_dim=48, depth=4, num_heads=3, num_classes=7,
        samplers=plan_samplers(depth=4, blocks=[1, 2, 3], num_tokens=0.7),
    ).double().eval()  # fmt: skip
    ours.load_state_dict(host.state_dict())
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(ats.patch(host, blocks=[1, 2, 3], num_tokens=0.7)(x), ours(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: timm.create_model("resnet10t"), "only timm.models.vision_transformer.VisionTransformer"),
        (lambda: timm.create_model("eva02_tiny_patch14_224"), "Eva"),
        (lambda: vit(global_pool="avg"), "global_pool='avg'"),
        (lambda: vit(class_token=False, global_pool="avg"), "not by a CLS token"),
        (lambda: vit(patch_drop_rate=0.5), "patch_drop"),
        (lambda: ats.patch(vit(), blocks=[1]), "patched already"),
        (lambda: vit(scale_attn_norm=True), "normalised after"),
    ],
)
def test_refused_by_name(make, text):
    with pytest.raises(UserError) as error:
        ats.patch(make(), blocks=[1])
    assert text in str(error.value)


def test_wrong_settings():
    with pytest.raises(UserError, match="block 9 does not exist"):
        ats.patch(vit(), blocks=[9])
