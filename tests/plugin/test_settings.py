"""Settings that travel: `ats.settings`, `save_pretrained` and `ats.load` make the same patched model again."""

from __future__ import annotations

import json

import pytest
import timm_models
import torch
import transformers
import transformers_models

import ats
from ats.errors import UserError

OPTIONS = {
    "ATS": {"blocks": range(1, 4), "num_tokens": [1, 12, 10, 9]},
    "merge, restored": {"blocks": [1, 2], "num_tokens": 0.6, "dropped": "merge", "restore": "nearest"},
    "ToMe": {"blocks": [0, 1], "sampler": "tome", "r": 3},
    "stages": {"stages": [{"sampler": "tome", "blocks": [0], "r": 2}, {"blocks": [2, 3], "num_tokens": 9}]},
}


@torch.no_grad()
@pytest.mark.parametrize("kind", OPTIONS)
def test_the_same_again(kind):
    """Through JSON, into a fresh model; after a change of a setting too."""
    name = "deit_tiny_patch16_224"
    model = timm_models.small_model(name)
    x = timm_models.images(model)
    ats.patch(model, **OPTIONS[kind])
    if "stages" not in OPTIONS[kind]:
        model.ats.blocks = [2, 3]
    other = timm_models.small_model(name)
    ats.patch(other, **json.loads(json.dumps(ats.settings(model))))
    assert repr(other.ats) == repr(model.ats)
    assert torch.equal(other.forward_features(x), model.forward_features(x))


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit classifier", "dinov3", "clip with projection"])
def test_save_pretrained_carries_them(name, tmp_path):
    model = transformers_models.small_model(name)
    ats.patch(model, blocks=[1, 3], num_tokens=12, restore="last")
    model.save_pretrained(tmp_path)
    again = type(transformers_models.small_model(name)).from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert not hasattr(again, "ats")
    assert ats.load(again, tmp_path) is again
    x = transformers_models.images()
    for got, want in zip(again(x).to_tuple(), model(x).to_tuple(), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)  # a loaded DINOv3 has other last bits in its buffers


def test_mistakes_are_said(tmp_path):
    model = timm_models.small_model("deit_tiny_patch16_224")
    with pytest.raises(UserError, match=r"VisionTransformer has no ATS, so no settings: call ats\.patch"):
        ats.settings(model)
    with pytest.raises(UserError, match=r"There is no .*ats\.json\. Write it with save_pretrained"):
        ats.load(model, tmp_path)
    (tmp_path / "ats.json").write_text("{")
    with pytest.raises(UserError, match=r"ats\.json is not JSON"):
        ats.load(model, tmp_path)
    ats.patch(model, blocks=[3], num_tokens=9)
    path = ats.save_settings(model, tmp_path)
    assert path == tmp_path / "ats.json"
    smaller = transformers.ViTModel(transformers.ViTConfig(num_hidden_layers=2, hidden_size=24, num_attention_heads=2))
    with pytest.raises(
        UserError, match=r"ats\.json: blocks \[3\]: block 3 does not exist, the network has blocks 0 to 1"
    ):
        ats.load(smaller, tmp_path)
    with pytest.raises(UserError, match="choose from zero, last, nearest"):
        ats.patch(timm_models.small_model("deit_tiny_patch16_224"), blocks=[1], restore="none")
