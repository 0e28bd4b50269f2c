"""Weights that hooks compute when a layer is called: fresh if blocks call it, refused if they only read its weight."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import test_cvt
import test_mvit
import test_psvit
import timm_models
import torch
import transformers_models
from helpers import clips, video_model
from test_models import small_vit
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune, remove_spectral_norm, remove_weight_norm, spectral_norm, weight_norm

import ats
from ats.errors import UserError
from ats.models.block import ats_blocks

pytestmark = pytest.mark.filterwarnings("ignore:.*(weight_norm|spectral_norm).*:FutureWarning")


def patched(models: object, name: str) -> tuple[nn.Module, Tensor]:
    model = models.small_model(name)
    x = models.images(model, 2) if models is timm_models else models.images(2)
    return ats.patch(model, blocks=[1, 2], num_tokens=12), x


NETWORKS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "ViT": lambda: (small_vit(num_tokens=0.6), torch.randn(2, 3, 32, 32, dtype=torch.float64)),
    "XViT": lambda: (video_model("xvit", "ATS.ENABLE", True), clips(1)),
    "TimeSformer": lambda: (video_model("divided", "ATS.ENABLE", True), clips(1)),
    "PS-ViT": lambda: (test_psvit.net(blocks=(3, 4), NUM_TOKENS=0.6), test_psvit.inputs(2)),
    "MViT v1": lambda: (test_mvit.net("v1 image", blocks=(2, 3), NUM_TOKENS=0.6), test_mvit.inputs("v1 image", 1)),
    "MViT v2": lambda: (test_mvit.net("v2", blocks=(2, 3), NUM_TOKENS=0.6), test_mvit.inputs("v2", 1)),
    "CvT": lambda: (test_cvt.net("released", blocks=(3,), NUM_TOKENS=0.6), test_cvt.inputs("released")),
    **{
        f"timm {name}": lambda name=name: patched(timm_models, name)
        for name in (
            "deit3_small_patch16_224",  # one projection
            "beit_base_patch16_224",  # one, with biases apart and a table of positions
            "aimv2_large_patch14_224",
            "vit_base_patch16_sapiens2",  # one for queries, keys and values each
        )
    },
    "transformers": lambda: patched(transformers_models, "vit classifier"),
}  # fmt: skip
HOOKS = {
    "weight_norm": (weight_norm, "weight_g", remove_weight_norm),
    "spectral_norm": (spectral_norm, "weight_orig", remove_spectral_norm),
    "prune": (
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        "weight_orig",
        lambda layer: prune.remove(layer, "weight"),
    ),
}


def logits_of(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(x)
    return out if isinstance(out, Tensor) else out.logits


@pytest.mark.parametrize(
    ("network", "hook"),
    [(network, "weight_norm") for network in NETWORKS] + [("ViT", "spectral_norm"), ("ViT", "prune")],
)
def test_computed_weights_are_fresh_or_refused(network, hook):
    """Each layer of a sampling block in turn, with new weights loaded after a first pass."""
    model, x = NETWORKS[network]()
    layers = ats_blocks(model)[-1].named_modules()
    names = [name for name, layer in layers if name.startswith("att") and getattr(layer, "weight", None) is not None]
    names = [name for name in names if "norm" not in name and ".bn" not in name]
    put, loaded, bake = HOOKS[hook]
    refused = []
    for name in names:
        logits = []
        for baked in (False, True):
            own = copy.deepcopy(model)
            layer = ats_blocks(own)[-1].get_submodule(name)
            torch.manual_seed(0)
            put(layer)
            try:
                logits_of(own, x)
                getattr(layer, loaded).data.mul_(1.5)
                if baked:
                    next(iter(layer._forward_pre_hooks.values()))(layer, ())
                    bake(layer)
                logits.append(logits_of(own, x))
            except UserError as error:
                refused.append((name, str(error)))
                break
        if len(logits) == 2:
            torch.testing.assert_close(*logits, rtol=0, atol=1e-9, msg=name)
    assert all(hook.split("_")[0] in message for _, message in refused)
    is_read = (lambda name: name != "attn.proj") if "MViT" in network else (lambda name: name == "attn.qkv")
    assert [name for name, _ in refused] == [name for name in names if is_read(name)]


@pytest.mark.parametrize("network", ["ViT", "MViT v2", "timm deit3_small_patch16_224"])
def test_parametrizations_are_fresh(network):
    """They compute a weight when it is read."""
    model, x = NETWORKS[network]()
    want = []
    for own in (copy.deepcopy(model), model):
        for block in ats_blocks(own):
            layer = block.attn.qkv
            if own is model:
                parametrizations.weight_norm(layer)
                layer.parametrizations.weight.original0.data.mul_(1.5)
            else:
                layer.weight.data.mul_(1.5)
        want.append(logits_of(own, x))
    torch.testing.assert_close(*want, rtol=0, atol=1e-9)


def test_the_message_says_what_to_type():
    """Before the patch with the block and the layer, after it when the weight is read; other hooks are let be."""
    for put, text in (
        (weight_norm, r"whose weight is computed by WeightNorm .* Type torch\.nn\.utils\.remove_weight_norm\(layer, '"),
        (spectral_norm, r"SpectralNorm .*parametrizations\.spectral_norm"),
        (lambda layer: prune.random_unstructured(layer, "bias", 0.5), r"whose bias .*prune\.remove\(layer, 'bias'\)"),
        (scaled_by_hook, "whose weight is computed by refresh .* Type remove that hook"),
    ):  # fmt: skip
        host = timm_models.small_model("deit3_small_patch16_224")
        put(host.blocks[2].attn.qkv)
        with pytest.raises(UserError, match=r"block 2 has attn\.qkv .*" + text):
            ats.patch(host, blocks=[1])
        model, x = patched(timm_models, "deit3_small_patch16_224")
        put(model.blocks[2].attn.qkv)
        with pytest.raises(UserError, match="A block with ATS has a Linear .*" + text):
            model(x)
        with pytest.raises(UserError, match=r"block 2 has attn\.qkv .*" + text):
            model.ats.num_tokens = 9
    host = timm_models.small_model("beit_base_patch16_224")
    prune.l1_unstructured(host.blocks[1].attn, "relative_position_bias_table", 0.5)
    with pytest.raises(UserError, match=r"block 1 has attn whose relative_position_bias_table is computed by"):
        ats.patch(host, blocks=[1])
    model, x = patched(timm_models, "beit_base_patch16_224")
    want = model(x)
    model.blocks[1].attn.qkv.register_forward_pre_hook(lambda *_: None)  # a profiler's, say
    assert torch.equal(model(x), want)
    prune.l1_unstructured(model.blocks[1].attn, "relative_position_bias_table", 0.5)
    with pytest.raises(UserError, match=r"relative_position_bias_table is computed by L1Unstructured .*prune\.remove"):
        model(x)


def scaled_by_hook(layer: nn.Linear) -> None:
    """A weight that someone's own hook computes."""
    original = layer.weight
    del layer.weight
    layer.register_parameter("weight_bar", original)

    def refresh(module: nn.Module, _: object) -> None:
        module.weight = module.weight_bar * 2

    layer.register_forward_pre_hook(refresh)
    refresh(layer, None)
