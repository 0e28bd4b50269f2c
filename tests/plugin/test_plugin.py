"""ats.patch: the timm model stays itself in everything one does with a model."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import numpy as np
import pytest
import timm
import torch
import torchvision
from timm.models.vision_transformer import VisionTransformer
from timm.utils import ModelEmaV3
from timm_models import LAWS, images, small_model
from torch import nn

import ats
from ats.errors import UserError
from ats.models.block import ATSBlock, ats_blocks

PLAIN = "deit3_small_patch16_224"
POOLED = "vit_base_patch16_siglip_gap_224"


def patched(name: str = PLAIN, **settings: object) -> nn.Module:
    """A small model with ATS in blocks 1 and 3."""
    return ats.patch(small_model(name), **{"blocks": [1, 3], "num_tokens": 12, **settings})


@pytest.mark.parametrize("name", LAWS)
@torch.no_grad()
def test_changes_nothing_that_one_can_see_of_the_weights(name):
    """Same object, parameters, keys and module classes by isinstance; after unpatch the same class and attributes."""
    model = small_model(name)
    before = {key: id(parameter) for key, parameter in model.named_parameters()}
    host_class, block_classes, attributes = type(model), [type(b) for b in model.blocks], set(vars(model))
    state = {key: value.clone() for key, value in model.state_dict().items()}
    x = images(model)
    want = model(x)

    assert ats.patch(model, blocks=[1, 3], num_tokens=10) is model
    assert isinstance(model, host_class)
    assert {key: id(parameter) for key, parameter in model.named_parameters()} == before
    assert not torch.equal(model(x), want)
    assert [isinstance(block, ATSBlock) for block in model.blocks] == [False, True, True, True]

    assert ats.unpatch(model) is model
    assert type(model) is host_class
    assert [type(b) for b in model.blocks] == block_classes
    assert set(vars(model)) == attributes
    assert not any("reduction" in vars(block) for block in model.blocks)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("name", LAWS)
@torch.no_grad()
def test_copies_and_pickles(name):
    """A copy computes the same and can be tuned without the original."""
    model = patched(name)
    x = images(model)
    want = model(x)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(clone(x), want)
        clone.ats.num_tokens = 8
        assert not torch.equal(clone(x), want)
        assert torch.equal(ats.unpatch(clone)(x), small_model(name)(x))
    assert torch.equal(model(x), want)


@torch.no_grad()
def test_weights_go_in_and_out():
    """A dense checkpoint loads strictly into a patched model and the other way round."""
    model, dense = patched(), small_model(PLAIN)
    model.load_state_dict({key: value + 0.01 for key, value in dense.state_dict().items()})
    dense.load_state_dict(model.state_dict())
    x = images(model)
    assert torch.equal(ats.patch(dense, blocks=[1, 3], num_tokens=12)(x), model(x))


@torch.no_grad()
def test_retuned_equals_patched_so_from_the_start():
    model = patched(num_tokens=16)
    x = images(model)
    for change in (
        {"num_tokens": 0.6},
        {"num_tokens": [1.0, 12, 1.0, 9]},
        {"blocks": [2]},
        {"blocks": range(4)},
        {"sampler": "topk"},
        {"score": "mean_attention"},
        {"rule": "paper"},
        {"min_tokens": 4},
        {"sampler": "random", "seed": 3},
    ):
        fresh = patched(num_tokens=16, **change) if "num_tokens" not in change else patched(**change)
        for name, value in change.items():
            setattr(model.ats, name, value)
        assert torch.equal(model(x), fresh(x)), change
        for name in change:
            setattr(model.ats, name, {"blocks": [1, 3], "num_tokens": 16}.get(name, getattr(patched().ats, name)))
    assert torch.equal(model(x), patched(num_tokens=16)(x))
    assert "num_tokens=16" in repr(model.ats)


@torch.no_grad()
def test_the_trace_names_original_patches():
    """What block 3 keeps was kept by block 1; nothing is remembered unless asked."""
    model = patched(num_tokens=12)
    x = images(model)
    model(x)
    with pytest.raises(UserError, match=r"set model\.ats\.trace = True"):
        _ = model.ats.last
    model.ats.trace = True
    model(x)
    first, second = model.ats.last
    assert (first.block, second.block) == (1, 3)
    for before, after, count in zip(first.patches, second.patches, second.num_tokens.tolist(), strict=True):
        assert set(after.tolist()) <= set(before.tolist()) <= set(range(16))
        assert len(after) + model.num_prefix_tokens == count
    logits, trace = model.forward_tokens(x)
    assert torch.equal(logits, model(x))
    assert [entry.num_tokens.tolist() for entry in trace] == [first.num_tokens.tolist(), second.num_tokens.tolist()]
    model.ats.trace = False
    with pytest.raises(UserError):
        _ = model.ats.last


@pytest.mark.parametrize("name", LAWS)
@torch.no_grad()
def test_intermediate_features_are_the_hosts(name, keep_all):
    """Keep-all: every form of forward_intermediates gives what the host gives. With sampling: zeros where a token was
    dropped, and the last features are those of forward_features.
    """
    host = small_model(name)
    x = images(host)
    model = ats.patch(copy.deepcopy(host), blocks=[1, 2], sampler=keep_all)
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-11)
    forms = [{}, {"indices": 2}, {"indices": [0, 2], "norm": True}, {"indices": [1], "stop_early": True}]
    forms += [{"output_fmt": "NLC"}, {"intermediates_only": True}]
    forms += [{"return_prefix_tokens": True}] if host.num_prefix_tokens else []
    forms += [{"output_dict": True}] if isinstance(host, VisionTransformer) else []
    for form in forms:
        close(model.forward_intermediates(x, **form), host.forward_intermediates(x, **form), msg=str(form))

    model.ats.sampler, model.ats.num_tokens, model.ats.trace = "topk", 11, True
    final, maps = model.forward_intermediates(x, output_fmt="NLC", norm=True)
    kept = model.ats.last
    assert torch.equal(final, model.forward_features(x))
    assert torch.equal(final[:, host.num_prefix_tokens :], maps[3])
    assert (maps[0] != 0).any(-1).all()
    for i, patches in enumerate(kept[1].patches):
        assert torch.nonzero((maps[3][i] != 0).any(-1)).flatten().tolist() == patches.tolist()


@torch.no_grad()
def test_timms_feature_extraction():
    """create_model(features_only=True): the model inside is patched; maps have zeros where tokens were dropped."""
    torch.manual_seed(0)
    net = timm.create_model(
        "vit_tiny_patch16_224", features_only=True, img_size=64, embed_dim=48, depth=4, num_heads=3, out_indices=(0, 2)
    ).eval()
    with pytest.raises(UserError, match=r"ats\.patch\(model\.model, \.\.\.\)"):
        ats.patch(net, blocks=[1])
    x = torch.randn(2, 3, 64, 64)
    want = net(x)
    ats.patch(net.model, blocks=[1], num_tokens=10)
    early, late = net(x)
    assert torch.equal(early, want[0])
    assert late.shape == want[1].shape
    assert ((late != 0).any(1).sum((1, 2)) < 10).all()


@pytest.mark.parametrize("name", LAWS)
@torch.no_grad()
def test_classifier_is_reset(name):
    """Other classes, no classifier, and (where the host can) no pooling."""
    model = patched(name)
    x = images(model)
    model.reset_classifier(9)
    model.double()
    assert model(x).shape == (3, 9)
    features = model.forward_features(x)
    assert torch.equal(model.forward_head(features), model(x))
    model.reset_classifier(0)
    assert torch.equal(model.forward_head(features, pre_logits=True), model(x))
    if "distilled" not in name:
        model.reset_classifier(0, "")
        out = model(x)
        assert out.shape == features.shape
        assert torch.equal((out != 0).any(-1), (features != 0).any(-1))


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "token", "map"])
@pytest.mark.parametrize("include_prefix", [False, True])
@torch.no_grad()
def test_pooling_is_over_what_is_left(pool, include_prefix):
    """The head on features with dropped tokens is the head on each image's remaining tokens alone."""
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=64, embed_dim=48, depth=4, num_heads=3, global_pool=pool, reg_tokens=2, num_classes=5,
        pool_include_prefix=include_prefix,
    ).double().eval()  # fmt: skip
    nn.init.normal_(model.head.weight)
    x = images(model)
    ats.patch(model, blocks=[1, 2], num_tokens=11)
    features, logits = model.forward_features(x), model(x)
    ats.unpatch(model)
    for image, got in zip(features, logits, strict=True):
        left = image[(image != 0).any(-1)]
        assert len(left) < 19
        torch.testing.assert_close(model.forward_head(left[None])[0], got, rtol=0, atol=1e-12)


@torch.no_grad()
def test_any_image_size_where_the_host_takes_it():
    """dynamic_img_size: the images' own grid, also of BEiT's cousin with rotary embedding."""
    for name in (PLAIN, "vit_small_patch16_rope_224"):
        model = ats.patch(small_model(name, dynamic_img_size=True), blocks=[1, 2], num_tokens=0.7)
        model.ats.trace = True
        for size in ((64, 64), (96, 64)):
            logits = model(torch.randn(2, 3, *size, dtype=torch.float64))
            assert logits.isfinite().all()
        assert max(patches.max() for patches in model.ats.last[0].patches) > 15


@pytest.mark.parametrize("name", [PLAIN, POOLED, "beit_base_patch16_224", "vit_small_patch16_dinov3"])
def test_half_precision_and_autocast(name, keep_all):
    """bfloat16 weights, and float32 weights under autocast, forward and backward: near float32 with every token kept
    (which tokens are kept may hang on a rounding), and finite where some are dropped.
    """
    model = patched(name, sampler=keep_all).float()
    x = images(model).float()
    with torch.no_grad():
        want = model(x)
        half = copy.deepcopy(model).bfloat16()(x.bfloat16())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast = model(x)
    assert half.dtype == torch.bfloat16
    for got in (half.float(), cast.float()):
        assert (got - want).abs().max() < 0.1 * want.abs().max()
    model.ats.sampler = "inverse_transform"
    with torch.no_grad():
        assert copy.deepcopy(model).bfloat16()(x.bfloat16()).isfinite().all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = model.train()(x)
        cast.float().square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.long
@torch.no_grad()
def test_compiles():
    """torch.compile gives the same, also after re-tuning (traced graphs; generating code for them takes minutes)."""
    torch._dynamo.reset()
    model = ats.patch(small_model(POOLED, depth=2), blocks=[1], num_tokens=12)
    x = images(model)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-10)
    model.ats.num_tokens = 9
    torch.testing.assert_close(compiled(x), model(x), rtol=0, atol=1e-10)
    with pytest.raises(UserError, match=r"ats\.patch\(model\._orig_mod"):
        ats.patch(torch.compile(small_model(POOLED)), blocks=[1])


def test_distributed_data_parallel(tmp_path):
    """Gradients under DDP are the model's own; the wrapper itself is refused with the way in."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, wrapped = patched().train(), nn.parallel.DistributedDataParallel(patched().train())
        x = images(model)
        model(x).square().sum().backward()
        wrapped(x).square().sum().backward()
        for (key, one), other in zip(model.named_parameters(), wrapped.module.parameters(), strict=True):
            assert torch.equal(one.grad, other.grad), key
        with pytest.raises(UserError, match=r"it wraps a .* ats\.patch\(model\.module, \.\.\.\)"):
            ats.patch(wrapped, blocks=[1])
    finally:
        torch.distributed.destroy_process_group()


def test_moving_average():
    """timm's ModelEmaV3 averages a patched model, which samples as the original does."""
    model = patched().train()
    ema = ModelEmaV3(model, decay=0.5)
    x = images(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model(x).square().mean().backward()
    before = model.head.weight.detach().clone()
    optimizer.step()
    ema.update(model)
    torch.testing.assert_close(ema.module.head.weight, (before + model.head.weight) / 2)
    ema.module.ats.trace = True
    ema.module(x)
    assert [entry.block for entry in ema.module.ats.last] == [1, 3]


def test_stochastic_depth_and_dropout_train():
    """Every random layer of the host works on packed tokens; without ATS blocks' help nothing would fit."""
    model = small_model(
        PLAIN, drop_path_rate=0.5, proj_drop_rate=0.1, attn_drop_rate=0.1, pos_drop_rate=0.1, drop_rate=0.1
    )
    ats.patch(model, blocks=[1, 3], num_tokens=10).train()
    x = images(model)
    outs = {round(model(x).sum().item(), 6) for _ in range(4)}
    assert len(outs) == 4
    model(x).sum().backward()


@torch.no_grad()
def test_equals_our_own_deit():
    """The same numbers as MODEL.NAME ViT with the same weights and settings."""
    from helpers import planned

    from ats.models.vit import VisionTransformer as OurViT

    host = small_model("deit_tiny_patch16_224")
    ours = OurViT(
        img_size=(64, 64), patch_size=16, embed_dim=48, depth=4, num_heads=3, num_classes=5,
        reductions=planned(depth=4, blocks=[1, 2, 3], num_tokens=0.7),
    ).double().eval()  # fmt: skip
    ours.load_state_dict(host.state_dict())
    x = images(host)
    torch.testing.assert_close(ats.patch(host, blocks=[1, 2, 3], num_tokens=0.7)(x), ours(x), rtol=0, atol=1e-12)


class Mine(VisionTransformer):
    """A user's subclass."""


def without_blocks() -> nn.Module:
    model = small_model(PLAIN)
    model.blocks = nn.Sequential()
    return model


def with_adapter() -> nn.Module:
    model = small_model(PLAIN)
    model.blocks[2].attn.qkv = nn.Sequential(model.blocks[2].attn.qkv)
    return model


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Mine(depth=1), "Mine: ATS supports timm's VisionTransformer"),
        (lambda: torchvision.models.VisionTransformer(32, 8, 1, 2, 32, 64), "torchvision's attention is nn.Multihead"),
        (lambda: small_model(PLAIN, patch_drop_rate=0.5), "patch_drop_rate=0"),
        (lambda: nn.DataParallel(small_model(PLAIN)), "ats.patch(model.module, ...)"),
        (lambda: small_model("deit_tiny_patch16_224", global_pool="prr"), "it pools by AttentionPoolPrr"),
        (without_blocks, "it has no blocks"),
        (with_adapter, "block 2 has attn.qkv of class Sequential"),
        (patched, "model.ats.num_tokens = ..."),
    ],
)  # fmt: skip
def test_refused_by_name(make, text):
    with pytest.raises(UserError) as error:
        ats.patch(make(), blocks=[1])
    assert text in str(error.value)


def test_default_blocks_are_the_last_three_quarters():
    """Without blocks, with None and in a stage that names none; `model.ats.blocks` says which they are."""
    model = ats.patch(small_model(PLAIN, depth=8))
    assert (model.ats.blocks, [block.index for block in ats_blocks(model)]) == ([*range(2, 8)],) * 2
    model.ats.blocks = [7]
    assert [block.index for block in ats_blocks(model)] == [7]
    model.ats.blocks = None
    assert model.ats.blocks == [*range(2, 8)]
    ats.patch(ats.unpatch(model), stages=[{"sampler": "tome", "r": 2}])
    assert model.ats.stages[0]["blocks"] == [*range(2, 8)]


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"blocks": [9]}, "blocks [9]: block 9 does not exist, the network has blocks 0 to 3"),
        ({"blocks": [-1]}, "block -1 does not exist"),
        ({"blocks": 3}, "blocks 3: give the indices of the blocks that sample, e.g. blocks=range(3, 12)"),
        ({"blocks": []}, "blocks is empty"),
        ({"blocks": [1.5]}, "give whole numbers"),
        ({"blocks": [1, 1]}, "a block is listed twice"),
        ({"num_tokens": 0}, "num_tokens 0 (block 1): give a ratio in (0, 1]"),
        ({"num_tokens": True}, "num_tokens True (block 1): give a ratio in (0, 1]"),
        ({"num_tokens": [0.5, 0.5]}, "num_tokens has 2 entries, the network 4 blocks"),
        ({"num_tokens": None}, "num_tokens None (block 1): give a ratio in (0, 1] or a number of tokens"),
        ({"num_tokens": np.array([[8, 8]] * 4)}, "num_tokens [8, 8] (block 1): give a ratio"),
        ({"num_tokens": np.array(["8"] * 4)}, "num_tokens '8' (block 1): give a ratio"),
        ({"min_tokens": 8.5}, "min_tokens 8.5: give a whole number"),
        ({"seed": "a"}, "seed 'a': give a whole number"),
        ({"sampler": "inverse"}, "sampler inverse: choose from inverse_transform, topk, random"),
        ({"score": "cls"}, "score cls: choose from cls_attention_value_norm, cls_attention, mean_attention"),
        ({"rule": "mine"}, "rule mine: choose from official, paper"),
    ],
)
def test_wrong_settings_say_what_to_type(settings, text):
    """And leave the model as it was, patched or not."""
    model, tuned = small_model(PLAIN), patched()
    with pytest.raises(UserError) as error:
        ats.patch(model, **{"blocks": [1], **settings})
    assert text in str(error.value)
    assert type(model).__name__ == "VisionTransformer"
    before = repr(tuned.ats)
    with pytest.raises(UserError):
        setattr(tuned.ats, *next(iter(settings.items())))
    assert repr(tuned.ats) == before


def test_a_number_below_the_least_is_raised(caplog):
    """Patched, re-tuned and calibrated models agree on K; what is not used as given is said by the argument's name."""
    model, raised = patched(num_tokens=3), patched(num_tokens=8)
    assert [r.message for r in caplog.records] == ["num_tokens 3 is below min_tokens 8: blocks 1, 3 use 8."]
    x = images(model)
    raised.load_state_dict(model.state_dict())
    assert torch.equal(model(x), raised(x))
    caplog.clear()
    model.ats.num_tokens = 9.4
    assert [r.message for r in caplog.records] == ["num_tokens 9.4 is not a whole number: blocks 1, 3 use 9."]
    raised.ats.num_tokens = 9
    assert torch.equal(model(x), raised(x))
    found = ats.calibrate(model, x, keep=0.6, progress=False)
    assert all(isinstance(k, int) and k >= 8 for k in found.num_tokens)
    assert model.ats.num_tokens == found.per_block


@pytest.mark.parametrize(
    "settings",
    [
        {"num_tokens": np.array([1, 12, 12, 0.5])},
        {"num_tokens": torch.tensor([1, 12, 12, 0.5])},
        {"num_tokens": [np.int64(1), np.float32(12), torch.tensor(12), 0.5]},
        {"num_tokens": np.int64(12)},
        {"num_tokens": torch.tensor(12)},
        {"num_tokens": 12, "blocks": np.arange(1, 4), "min_tokens": np.int64(9), "seed": torch.tensor(3)},
        {"num_tokens": 12, "blocks": torch.tensor([1, 3])},
        {"sampler": "tome", "r": np.int64(3)},
        {"sampler": "evit", "keep_rate": np.array([1, 0.5, 0.5, 0.5])},
    ],
    ids=str,
)
def test_numbers_of_numpy_and_torch(settings):
    """Are Python's: the handle shows these, and the model pickles as any other."""
    model = patched(**settings)
    for name, value in settings.items():
        got = getattr(model.ats, name)
        want = value if isinstance(value, (str, int)) else torch.as_tensor(value).tolist()
        assert got == want
        assert all(type(item) in (int, float, str) for item in (got if isinstance(got, list) else [got]))
    model(images(model))


def test_no_cls_token_to_score_by():
    """The default is the mean attention; asking for CLS is an error, with registers in its place too."""
    assert ats.patch(small_model(POOLED), blocks=[1]).ats.score == "mean_attention"
    assert patched().ats.score == "cls_attention_value_norm"
    for name in (POOLED, "vit_medium_patch16_reg4_gap_256"):
        with pytest.raises(UserError, match="needs a CLS token and this network has none; use score mean_attention"):
            ats.patch(small_model(name), blocks=[1], score="cls_attention")


def test_wrong_use_of_the_handle():
    model = patched()
    with pytest.raises(UserError, match=r"no setting num_token: choose from .* Did you mean num_tokens"):
        model.ats.num_token = 3
    with pytest.raises(AttributeError, match="has no blcks"):
        _ = model.ats.blcks
    with pytest.raises(UserError, match="attn_mask"):
        model(images(model), attn_mask=torch.ones(17, 17))
    with pytest.raises(UserError, match=r"ats\.patch\(model, \.\.\.\) was not called"):
        ats.unpatch(small_model(PLAIN))
