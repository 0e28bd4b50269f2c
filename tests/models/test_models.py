"""ViT / DeiT with ATS: equal to timm when everything is kept, independent of the batch, trainable, robust."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import pytest
import timm
import torch
from helpers import keep_all, planned
from hypothesis import given, settings
from hypothesis import strategies as st

from ats.checkpoint import load_weights
from ats.config import get_cfg, load_config
from ats.errors import UserError
from ats.models import build_model
from ats.models.block import ats_blocks
from ats.models.vit import VisionTransformer

ROOT = Path(__file__).parents[2]
KEYS = Path(__file__).parents[1] / "fixtures" / "keys"


def small_vit(
    *, ats: bool = True, dtype: torch.dtype = torch.float64, seed: int = 0, distilled: bool = False, **settings
) -> VisionTransformer:
    """A small ViT whose weights are large enough for tokens to differ."""
    options = {"blocks": range(1, 4), "num_tokens": 1.0} | {
        k: settings.pop(k)
        for k in list(settings)
        if k in ("blocks", "num_tokens", "sampler", "score", "rule", "min_tokens", "dropped")
    }
    layout = settings.pop("layout", "packed")
    torch.manual_seed(seed)
    reductions = planned(depth=4, num_prefix_tokens=2 if distilled else 1, **options) if ats else {}
    model = VisionTransformer(
        img_size=(32, 32),
        patch_size=4,
        num_classes=7,
        embed_dim=32,
        depth=4,
        num_heads=2,
        distilled=distilled,
        reductions=reductions,
        **settings,
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3 if parameter.ndim > 1 else 0.1)
    model.layout = layout
    return model.to(dtype).eval()


@pytest.mark.parametrize("layout", ["packed", "padded", "static"])
@pytest.mark.parametrize("score", ["cls_attention_value_norm", "mean_attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_empty_batch(dtype, score, layout):
    """No images, no logits, as timm's networks have it; backward too."""
    model = small_vit(num_tokens=0.7, score=score, layout=layout, dtype=dtype)
    logits, trace = model.forward_tokens(torch.zeros(0, 3, 32, 32, dtype=dtype))
    assert logits.shape == (0, 7)
    assert [entry.patches for entry in trace] == [[], [], []]
    logits.sum().backward()
    assert not any(parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("name", ["deit_small_patch16_224", "deit_tiny_distilled_patch16_224"])
@pytest.mark.parametrize("ragged", [False, True], ids=["dense", "keep all"])
def test_equals_timm(name, dtype, atol, ragged):
    """With ATS off, or on and every token kept in blocks 3 to 11, the logits are timm's."""
    torch.manual_seed(0)
    reference = timm.create_model(name, pretrained=False).to(dtype).eval()
    overrides = [
        "VIT.EMBED_DIM",
        reference.embed_dim,
        "VIT.NUM_HEADS",
        reference.blocks[0].attn.num_heads,
        "VIT.DISTILLED",
        "distilled" in name,
    ]
    cfg = get_cfg()
    cfg.merge_from_list([*overrides, "ATS.ENABLE", ragged])
    model = build_model(cfg)
    model.cpu_backend = "torch"  # as timm's
    load_weights(model, reference.state_dict())
    x = torch.randn(2, 3, 224, 224, dtype=dtype)
    with keep_all(model), torch.no_grad():
        torch.testing.assert_close(model.to(dtype).eval()(x), reference(x), rtol=0, atol=atol)


@given(
    st.integers(0, 10**6),
    st.lists(st.integers(0, 5), min_size=1, max_size=5),
    st.sampled_from(["inverse_transform", "topk", "random"]),
    st.sampled_from(["cls_attention_value_norm", "cls_attention", "mean_attention"]),
    st.sampled_from([1.0, 0.5, 20]),
    st.booleans(),
)
@settings(max_examples=40)
def test_kept_sets_do_not_depend_on_the_batch(seed, order, sampler, score, num_tokens, distilled):
    """Any batch made of any images in any order: each image keeps the tokens and gets the logits it gets alone."""
    model = small_vit(seed=seed % 7, sampler=sampler, score=score, num_tokens=num_tokens, distilled=distilled)
    pool = torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with torch.no_grad():
        logits, trace = model.forward_tokens(pool[order])
        for place, i in enumerate(order):
            alone, trace_alone = model.forward_tokens(pool[i : i + 1])
            torch.testing.assert_close(logits[place], alone[0], rtol=0, atol=1e-10)
            for entry, entry_alone in zip(trace, trace_alone, strict=True):
                assert torch.equal(entry.patches[place], entry_alone.patches[0])


@pytest.mark.parametrize("distilled", [False, True])
def test_prefix_tokens_always_stay_and_counts_fall(distilled):
    """Patches never come back, prefix tokens never leave, and K bounds what a block keeps."""
    model = small_vit(num_tokens=[1.0, 40, 20, 10], distilled=distilled)
    num_prefix = model.num_prefix_tokens
    _, trace = model.forward_tokens(torch.randn(5, 3, 32, 32, dtype=torch.float64))
    previous = [set(range(64))] * 5
    for entry, bound in zip(trace, [40, 20, 10], strict=True):
        assert (entry.num_tokens <= bound).all()
        assert (entry.num_tokens > num_prefix).all()
        for i, patches in enumerate(entry.patches):
            assert set(patches.tolist()) <= previous[i]
            previous[i] = set(patches.tolist())


def test_blocks_before_the_first_sampler_are_the_hosts_own():
    """Nothing is wrapped in front of the first ATS block, and the state dict is the dense model's."""
    dense, sparse = small_vit(ats=False), small_vit(blocks=[2])
    assert type(sparse.blocks[0]) is type(dense.blocks[0]) is type(sparse.blocks[1])
    assert list(dense.state_dict()) == list(sparse.state_dict())
    sparse.load_state_dict(dense.state_dict())


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
def test_broken_images_harm_nobody_else(value):
    """NaN or infinite pixels in one image: no exception, something is kept, the other images' logits stay."""
    model = small_vit()
    x = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        good, _ = model.forward_tokens(x)
        x[1, 0, 3, 3] = value
        logits, trace = model.forward_tokens(x)
    torch.testing.assert_close(logits[[0, 2]], good[[0, 2]], rtol=0, atol=1e-10)
    assert all((entry.num_tokens >= 2).all() for entry in trace)


def test_half_precision_autocast_runs_and_keeps_about_as_many():
    """Under autocast the score is still computed in float32: kept counts stay close to full precision's."""
    model = small_vit(dtype=torch.float32)
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        _, trace = model.forward_tokens(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, trace_half = model.forward_tokens(x)
    assert logits.isfinite().all()
    for entry, entry_half in zip(trace, trace_half, strict=True):
        assert (entry.num_tokens - entry_half.num_tokens).abs().max() <= 6


def test_gradient_reaches_every_parameter_and_matches_finite_differences():
    """ATS trains the whole network; the kept set is piecewise constant, so central differences are exact."""
    model = small_vit(num_tokens=0.6)
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    weight = torch.randn(2, 7, dtype=torch.float64)
    (model(x) * weight).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    for parameter in (model.cls_token, model.blocks[2].attn.qkv.weight, model.blocks[3].norm2.bias):
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            values = []
            for step in (1e-6, -2e-6):
                parameter.add_(direction, alpha=step)
                values.append((model(x) * weight).sum())
            parameter.add_(direction, alpha=1e-6)
        numeric, exact = (values[0] - values[1]) / 2e-6, (parameter.grad * direction).sum()
        torch.testing.assert_close(numeric, exact, rtol=1e-4, atol=1e-6)


def test_stochastic_depth_drops_whole_images():
    """In training an image's residual branch is dropped as a whole: all of its tokens pass unchanged or none."""
    model = small_vit(drop_path_rate=0.5, blocks=[0])
    block = model.blocks[3].train()
    block.drop_path1.drop_prob = block.drop_path2.drop_prob = 0.5
    torch.manual_seed(0)
    from ats.tokens import RaggedTokens

    tokens = RaggedTokens.from_dense(torch.randn(200, 5, 32, dtype=torch.float64), 1)
    out = block(tokens)
    untouched = (out.x == tokens.x).all(1).reshape(200, 5)
    assert torch.equal(untouched.all(1), untouched.any(1))
    assert 20 < untouched.all(1).sum() < 80  # about a quarter: both branches dropped


def test_copies_pickles_and_changes_of_type():
    model = small_vit(dtype=torch.float32)
    x = torch.randn(2, 3, 32, 32)
    want = model(x)
    assert torch.equal(copy.deepcopy(model)(x), want)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), want)
    assert model.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16


def test_another_image_size_resizes_the_positions():
    """The position embedding follows the input, as timm resizes it; max_tokens follows the number of tokens."""
    model = small_vit(dtype=torch.float32)
    _, trace = model.forward_tokens(torch.randn(2, 3, 48, 40))
    assert trace[0].num_tokens.max() <= 1 + 12 * 10
    larger = VisionTransformer(
        img_size=(48, 48), patch_size=4, num_classes=7, embed_dim=32, depth=4, num_heads=2
    ).eval()
    load_weights(larger, model.state_dict())
    dense = small_vit(ats=False, dtype=torch.float32)
    x = torch.randn(2, 3, 48, 48)
    torch.testing.assert_close(larger(x), dense(x), rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="cannot be cut into patches"):
        model(torch.randn(1, 3, 30, 32))


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "ImageNet").glob("[!_]*.yaml")), ids=lambda path: path.stem)
def test_every_imagenet_config_builds(path):
    """Each config builds (on no memory) and its header names its own command."""
    cfg = load_config(path)
    with torch.device("meta"):
        model = build_model(cfg)
    assert sum(p.numel() for p in model.parameters()) > 4e6
    assert f"--cfg configs/ImageNet/{path.name}" in path.read_text()


@pytest.mark.parametrize(
    "path", [*sorted(KEYS.glob("*deit*.json")), KEYS / "vit_base_patch16_224.json"], ids=lambda path: path.stem
)
def test_released_keys_load(path):
    """The key names and shapes of every released DeiT and ViT checkpoint, in the release's own wrapper, fill a model
    strictly.
    """
    shapes = json.loads(path.read_text())
    shapes = shapes.get("release_file_layout", shapes)
    wrapped = "model" in shapes
    shapes = shapes["model"] if wrapped else shapes
    cfg = get_cfg()
    dim = shapes["cls_token"][-1]
    cfg.merge_from_list(
        ["VIT.EMBED_DIM", dim, "VIT.NUM_HEADS", dim // 64, "VIT.DISTILLED", "dist_token" in shapes, "ATS.ENABLE", True]
    )
    model = build_model(cfg)
    state = {key: torch.full(shape, 0.5) for key, shape in shapes.items()}
    load_weights(model, {"model": state} if wrapped else state)
    assert all((value == 0.5).all() for value in model.state_dict().values())


@pytest.mark.parametrize(
    ("overrides", "blocks"),
    [
        ([], range(3, 12)),  # the paper's
        (["VIT.DEPTH", 1], range(1)),
        (["VIT.DEPTH", 7], range(1, 7)),
        (["VIT.DEPTH", 24], range(6, 24)),
        (["VIT.DEPTH", 24, "ATS.BLOCKS", [3, 4]], [3, 4]),
        (["VIT.DEPTH", 8, "ATS.STAGES", [{"NUM_TOKENS": 9}]], range(2, 8)),
        (["MODEL.NAME", "XViT", "VIT.DEPTH", 8], range(2, 8)),
        (["MODEL.NAME", "TimeSformer", "VIT.DEPTH", 8], range(2, 8)),
        (["MODEL.NAME", "timm/vit_tiny_patch16_224", "TIMM.KWARGS", [["depth", 8]]], range(2, 8)),
        (["MODEL.NAME", "CvT", "CVT.DEPTH", [1, 4, 4]], range(5, 9)),  # only the last stage samples
        (["MODEL.NAME", "CvT", "CVT.DEPTH", [1, 4, 16]], range(5, 21)),
        (["MODEL.NAME", "PSViT"], range(4, 14)),  # the points move in blocks 0 to 3
    ],
)
def test_default_blocks_are_the_last_three_quarters(overrides, blocks):
    """ATS.BLOCKS None follows the depth, and leaves out what cannot sample."""
    with torch.device("meta"):
        model = build_model(load_config(None, ["ATS.ENABLE", True, *overrides]))
    assert [block.reduction.block for block in ats_blocks(model)] == [*blocks]


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["MODEL.NAME", "DeiT"], "MODEL.NAME DeiT: choose from ViT"),
        (["VIT.IMG_SIZE", 225], "VIT.IMG_SIZE 225 is not a multiple of VIT.PATCH_SIZE 16"),
        (["VIT.NUM_HEADS", 5], "is not a multiple of VIT.NUM_HEADS 5"),
        (["ATS.ENABLE", True, "ATS.BLOCKS", []], "ATS.BLOCKS is empty: give blocks, e.g. ATS.BLOCKS [3,4,5]"),
        (["ATS.ENABLE", True, "ATS.BLOCKS", [12]], "block 12 does not exist, the network has blocks 0 to 11"),
        (["ATS.ENABLE", True, "ATS.NUM_TOKENS", [197] * 3], "has 3 entries, the network 12 blocks"),
    ],
)
def test_wrong_configs_are_named(overrides, text):
    cfg = get_cfg()
    cfg.merge_from_list(overrides)
    with pytest.raises(UserError) as error:
        build_model(cfg)
    assert text in str(error.value)
