"""MViT v1 and v2: golden numbers, torchvision, timm, released weights, and ATS on pooled cells."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from helpers import keep_all
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from timm.models import mvitv2
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ats.checkpoint import load_weights
from ats.config import CfgNode, get_cfg, load_config
from ats.errors import UserError
from ats.flops import dense_gflops, gflops
from ats.models import build_model
from ats.models.block import ats_blocks
from ats.models.mvit.ats_block import MultiScaleATSBlock, rescale
from ats.models.mvit.dense import depthwise_convolution, relative_table

ROOT = Path(__file__).parents[2]
FIXTURES = Path(__file__).parents[1] / "fixtures" / "video"
CASES = ["mvit_v1_video", "mvit_v2_video_oddsize", "mvit_v2_image_adaptive"]
STAGES = {
    "MVIT.DEPTH": 6,
    "MVIT.EMBED_DIM": 16,
    "MVIT.DIM_MUL": [[1, 2.0], [5, 2.0]],
    "MVIT.HEAD_MUL": [[1, 2.0], [5, 2.0]],
}
V1 = STAGES | {
    "MVIT.PATCH_PADDING": [1, 3, 3], "MVIT.POOL_Q_STRIDE": [[1, 1, 2, 2], [5, 1, 2, 2]], "MVIT.SEP_POS_EMBED": True,
    "MVIT.POOL_KV_STRIDE_ADAPTIVE": [1, 4, 4], "MVIT.POOL_KVQ_KERNEL": [3, 3, 3],
}  # fmt: skip
V2 = V1 | {
    "MVIT.POOL_Q_STRIDE": [[i, 1, 2, 2] if i in (1, 5) else [i, 1, 1, 1] for i in range(6)],
    "MVIT.USE_ABS_POS": False, "MVIT.SEP_POS_EMBED": False, "MVIT.REL_POS_SPATIAL": True, "MVIT.REL_POS_TEMPORAL": True,
    "MVIT.RESIDUAL_POOLING": True, "MVIT.DIM_MUL_IN_ATT": True,
}  # fmt: skip
IMAGE = {
    "MVIT.PATCH_2D": True, "MVIT.PATCH_KERNEL": [7, 7], "MVIT.PATCH_STRIDE": [4, 4], "MVIT.PATCH_PADDING": [3, 3],
    "MVIT.POOL_KVQ_KERNEL": [1, 3, 3], "MVIT.REL_POS_TEMPORAL": False,
}  # fmt: skip
# Small networks of every kind; the names say what differs. On 8 frames of 32 x 32 pixels: 4 x 8 x 8 patches, 4 x 4 x 4
# tokens with cells of 2 x 2 in blocks 2 to 4, and a change of stage in block 5.
NETS = {
    "v1": V1,
    "v1 default kernels": V1 | {"MVIT.POOL_KVQ_KERNEL": None},
    "v1 max": V1 | {"MVIT.MODE": "max"},
    "v1 avg": V1 | {"MVIT.MODE": "avg"},
    "v1 residual pooling": V1 | {"MVIT.RESIDUAL_POOLING": True},
    "v1 image": V1 | IMAGE | {"MVIT.SEP_POS_EMBED": False},
    "v2": V2,
    "v2 mean pooling": V2 | {"MVIT.USE_MEAN_POOLING": True},
    "v2 no CLS": V2 | {"MVIT.CLS_EMBED_ON": False},
    "v2 image": V2 | IMAGE | {"MVIT.CLS_EMBED_ON": False},
}


def config(settings: dict) -> CfgNode:
    cfg = get_cfg()
    base = {"MODEL.NAME": "MViT", "MODEL.NUM_CLASSES": 7, "DATA.NUM_FRAMES": 8, "DATA.TRAIN_CROP_SIZE": 32}
    cfg.merge_pairs((base | settings).items())
    return cfg


def net(name: str, *, blocks: tuple[int, ...] = (), dtype: torch.dtype = torch.float64, seed: int = 0, **ats: object):
    """One of NETS, sampling in `blocks`, with weights large enough for tokens to differ."""
    options = {"ENABLE": bool(blocks), "BLOCKS": list(blocks), "MIN_TOKENS": 4} | ats
    if "no CLS" in name or name == "v2 image":
        options["SCORE"] = "mean_attention"
    model = build_model(config(NETS[name] | {f"ATS.{key}": value for key, value in options.items()}))
    fill(model, seed)
    return model.to(dtype).eval()


def fill(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            std = 0.1 if parameter.ndim < 2 else min(1.5 * parameter[0].numel() ** -0.5, 0.5)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1)
    return model


def inputs(name: str, batch_size: int = 2, seed: int = 0) -> torch.Tensor:
    shape = (3, 32, 32) if "image" in name else (3, 8, 32, 32)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch_size, *shape, generator=generator, dtype=torch.float64)


def golden(name: str, dtype: torch.dtype):
    folder = FIXTURES / name
    case = json.loads((folder / "case.json").read_text())["config"]
    resolved = {k: v for k, v in case["MVIT_resolved"].items() if v is not None}
    if "POOL_KV_STRIDE_ADAPTIVE" in resolved:
        del resolved["POOL_KV_STRIDE"]  # SlowFast's own result of it
    settings = {f"MVIT.{key}": value for key, value in resolved.items()}
    settings |= {"MODEL.NUM_CLASSES": case["NUM_CLASSES"], "DATA.NUM_FRAMES": case["NUM_FRAMES"]}
    model = build_model(config(settings | {"DATA.TRAIN_CROP_SIZE": case["CROP"]}))
    load_weights(model, folder / "weights.safetensors")
    return model.to(dtype).eval(), np.load(folder / "golden.npz")


@pytest.mark.parametrize("name", CASES)
def test_golden_logits_and_gradients(name):
    """SlowFast's own numbers; in float64 to round-off."""
    model, arrays = golden(name, torch.float64)
    with torch.no_grad():
        logits = model(torch.from_numpy(arrays["x"]).double())
    np.testing.assert_allclose(logits.numpy(), arrays["logits_f64"], atol=1e-12, rtol=0)
    model, arrays = golden(name, torch.float32)
    x = torch.from_numpy(arrays["x"]).requires_grad_()
    logits = model(x)
    np.testing.assert_allclose(logits.detach().numpy(), arrays["logits"], atol=2e-5, rtol=0)
    (logits * torch.from_numpy(arrays["loss_w"])).sum().backward()
    grads = {"input": x.grad} | {key: parameter.grad for key, parameter in model.named_parameters()}
    wanted = [key for key in arrays.files if key.startswith("grad.")]
    assert len(wanted) >= 5
    for key in wanted:
        scale = np.abs(arrays[key]).max()
        np.testing.assert_allclose(grads[key[5:]].numpy() / scale, arrays[key] / scale, atol=1e-4, err_msg=key)


def on_meta(build) -> torch.nn.Module:
    """A network with random weights, without paying for its own initialisation."""
    with torch.device("meta"):
        model = build()
    return fill(model.to_empty(device="cpu")).eval()


@pytest.mark.parametrize(("name", "reference"), [("MViTv1_B_16x4", "mvit_v1_b"), ("MViTv2_S_16x4", "mvit_v2_s")])
def test_equals_torchvision(name, reference, monkeypatch):
    """Torchvision's weights, all blocks of the network at a quarter of the width, 4 frames of 64 x 64 pixels."""
    module = torchvision.models.video.mvit
    build = module._mvit  # torchvision's builders fix the sizes they pass to it

    def small(**options: object) -> torch.nn.Module:
        for block in options["block_setting"]:
            block.input_channels, block.output_channels = block.input_channels // 4, block.output_channels // 4
        return build(**options | {"spatial_size": (64, 64), "temporal_size": 4})

    monkeypatch.setattr(module, "_mvit", small)
    theirs = on_meta(getattr(module, reference))
    overrides = ["MVIT.EMBED_DIM", 24, "DATA.NUM_FRAMES", 4, "DATA.TRAIN_CROP_SIZE", 64]
    assert_equal(theirs, load_config(ROOT / "configs" / "Kinetics" / f"{name}.yaml", overrides), (2, 3, 4, 64, 64))


@pytest.mark.parametrize(("name", "reference"), [("T", "tiny"), ("S", "small"), ("B", "base")])
def test_equals_timm(name, reference):
    """Timm's weights, all blocks of the network at a quarter of the width, 64 x 64 pixels."""
    model_cfg = replace(mvitv2.model_cfgs[f"mvitv2_{reference}"], embed_dim=24)
    theirs = on_meta(lambda: mvitv2.MultiScaleVit(model_cfg, img_size=64))
    overrides = ["MVIT.EMBED_DIM", 24, "DATA.TRAIN_CROP_SIZE", 64]
    assert_equal(theirs, load_config(ROOT / "configs" / "ImageNet" / f"MViTv2_{name}.yaml", overrides), (2, 3, 64, 64))


def assert_equal(theirs: torch.nn.Module, cfg: CfgNode, shape: tuple[int, ...]) -> None:
    ours = on_meta(lambda: build_model(cfg))
    load_weights(ours, theirs.state_dict())
    x = torch.randn(shape)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("blocks", [(2, 3, 4), (0,), (1, 4)], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_keep_all_equals_dense(name, blocks):
    """With every cell kept the ragged path gives the dense logits, whatever the kind of network."""
    sparse, x = net(name, blocks=blocks), inputs(name)
    with keep_all(sparse), torch.no_grad():
        logits, trace = sparse.forward_tokens(x)
        torch.testing.assert_close(logits, net(name)(x), rtol=0, atol=1e-10)
    assert [entry.block for entry in trace] == list(blocks)
    assert all((entry.num_tokens == entry.num_tokens.max()).all() for entry in trace)


def on_size(frames: int, side: int, batch_size: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch_size, 3, frames, side, side, generator=generator, dtype=torch.float64)


UNEVEN = [(9, 36), (7, 34), (8, 44), (5, 20), (1, 8)]  # frames and pixels whose grids the strides do not divide


@pytest.mark.parametrize("blocks", [(2, 3, 4), (0,), (1, 4)], ids=str)
@pytest.mark.parametrize("name", ["v1", "v1 max", "v1 avg", "v2", "v2 no CLS"])
def test_keep_all_equals_dense_on_uneven_grids(name, blocks):
    """The last cells of an axis stand for fewer tokens where a stride does not divide it; any input size will do."""
    sparse, dense = net(name, blocks=blocks), net(name)
    for frames, side in UNEVEN[: 4 if name == "v1 avg" else None]:  # torch averages no grid smaller than the kernel
        with keep_all(sparse), torch.no_grad():
            logits, trace = sparse.forward_tokens(on_size(frames, side))
            torch.testing.assert_close(logits, dense(on_size(frames, side)), rtol=0, atol=1e-10)
        assert all((entry.num_tokens == entry.num_tokens.max()).all() for entry in trace)


@pytest.mark.parametrize("temporal_stride", [1, 2])
def test_uneven_grids_at_their_configured_size(temporal_stride):
    """The convolution makes 3 x 9 x 9 patches; NUM_FRAMES // stride, by which SlowFast sizes tables, is 2 x 8 x 8."""
    settings = V1 | {"DATA.NUM_FRAMES": 5, "DATA.TRAIN_CROP_SIZE": 34}
    settings |= {"MVIT.POOL_KV_STRIDE_ADAPTIVE": [temporal_stride, 4, 4]}
    dense = fill(build_model(config(settings))).double().eval()
    sparse = fill(build_model(config(settings | {"ATS.ENABLE": True, "ATS.BLOCKS": [0, 2, 4]}))).double().eval()
    x = on_size(5, 34)
    with torch.no_grad():
        assert sparse.forward_tokens(x)[1][0].num_tokens.max() <= 1 + 3 * 9 * 9
        with keep_all(sparse):
            logits = sparse(x)
        torch.testing.assert_close(logits, dense(x), rtol=0, atol=1e-10)


@given(
    st.integers(0, 10**6),
    st.lists(st.integers(0, 2), min_size=1, max_size=3),
    st.sampled_from(["v1", "v2"]),
    st.sampled_from(UNEVEN),
    st.sampled_from([1.0, 0.5, 9]),
)
@settings(max_examples=8)
def test_kept_sets_do_not_depend_on_the_batch_on_uneven_grids(seed, order, name, size, num_tokens):
    """And cells go whole: 2 x 2 tokens, or fewer in the last row and column."""
    model, pool = net(name, blocks=(2, 3, 4), seed=seed % 5, NUM_TOKENS=num_tokens), on_size(*size, 3, seed)
    _, height, width = model.blocks[1].spec.query_grid(model.embed(pool)[1])
    with torch.no_grad():
        logits, trace = model.forward_tokens(pool[order])
        for place, i in enumerate(order):
            alone, trace_alone = model.forward_tokens(pool[i : i + 1])
            torch.testing.assert_close(logits[place], alone[0], rtol=0, atol=1e-10)
            for entry, entry_alone in zip(trace, trace_alone, strict=True):
                patches = entry.patches[place]
                assert torch.equal(patches, entry_alone.patches[0])
                kept = torch.zeros(-(-size[0] // 2) * height * width).index_fill(0, patches, 1)
                kept = kept.reshape(-1, 1, height, width)
                whole = torch.nn.functional.max_pool2d(kept, 2, 2, ceil_mode=True)
                whole = whole.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, :height, :width]
                assert torch.equal(kept, whole)


def candidate_scores(model: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The scores [1, M] that each ATS block samples one input by."""
    for block in ats_blocks(model):
        block.record_scores = True
    records = model.forward_tokens(x)[1].records
    return [record.candidates.scores for record in records if record.candidates is not None]


def has_ties(scores: torch.Tensor) -> bool:
    ranked = scores.sort(dim=1).values
    return bool((ranked.diff(dim=1) <= 1e-10 * ranked[:, 1:]).any())


@given(
    st.integers(0, 10**6),
    st.lists(st.integers(0, 3), min_size=1, max_size=3),
    st.sampled_from(["v1", "v2", "v1 max", "v2 image", "v1 image", "v2 mean pooling"]),
    st.sampled_from([(2, 3, 4), (0, 1, 2), (1, 4)]),
    st.sampled_from([1.0, 0.5, 9]),
)
@settings(max_examples=15)
def test_kept_sets_do_not_depend_on_the_batch(seed, order, name, blocks, num_tokens):
    """Any batch made of any clips in any order: each keeps the tokens and gets the logits it gets alone.

    Neighbouring cells of a max-pooling that see one and the same token have equal scores; which of them ranks first is
    a matter of round-off, so draws with ties are left out.
    """
    model, pool = net(name, blocks=blocks, seed=seed % 5, NUM_TOKENS=num_tokens), inputs(name, 4, seed)
    with torch.no_grad():
        assume(not any(has_ties(scores) for i in set(order) for scores in candidate_scores(model, pool[i : i + 1])))
        logits, trace = model.forward_tokens(pool[order])
        assert logits.isfinite().all()
        for place, i in enumerate(order):
            alone, trace_alone = model.forward_tokens(pool[i : i + 1])
            torch.testing.assert_close(logits[place], alone[0], rtol=0, atol=1e-10)
            for entry, entry_alone in zip(trace, trace_alone, strict=True):
                assert torch.equal(entry.patches[place], entry_alone.patches[0])


@pytest.mark.parametrize("name", ["v1", "v2", "v2 no CLS"])
def test_cells_are_kept_or_dropped_whole(name):
    """Kept tokens come in cells of 2 x 2 on the 4 x 4 x 4 grid, never more than K - 1 cells, and none comes back."""
    model = net(name, blocks=(2, 3, 4), NUM_TOKENS=[1, 1, 12, 10, 8, 1])
    with torch.no_grad():
        _, trace = model.forward_tokens(inputs(name, 5))
    previous = [set(range(64))] * 5
    for entry, bound in zip(trace, [12, 10, 8], strict=True):
        for i, patches in enumerate(entry.patches):
            t, y, x = patches // 16, patches // 4 % 4, patches % 4
            cells = (t * 4 + y // 2 * 2 + x // 2).tolist()
            assert all(cells.count(cell) == 4 for cell in cells)
            assert 1 <= len(set(cells)) <= bound - model.num_prefix_tokens
            assert set(patches.tolist()) <= previous[i]
            previous[i] = set(patches.tolist())


@pytest.mark.parametrize("name", ["v1", "v2", "v2 no CLS"])
def test_linear_layers_see_kept_tokens_only(name):
    """Behind a block that samples, norms, projections and MLP run on what it kept, and its own output part too."""
    model, seen = net(name, blocks=(2, 4), NUM_TOKENS=0.5), {}
    for key, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | torch.nn.LayerNorm) and ".norm_" not in key:
            module.register_forward_hook(lambda _, args, __, key=key: seen.__setitem__(key, args[0].shape[0]))
    with torch.no_grad():
        _, trace = model.forward_tokens(inputs(name, 3))
    kept = [int(entry.num_tokens.sum()) for entry in trace]
    full = 3 * (model.num_prefix_tokens + 64)
    assert kept[1] < kept[0] < full
    before, after = {2: full, 3: kept[0], 4: kept[0], 5: kept[1]}, {2: kept[0], 3: kept[0], 4: kept[1]}
    for block, count in before.items():
        assert seen[f"blocks.{block}.norm1"] == count
        assert seen.get(f"blocks.{block}.attn.qkv", count) == count
    for block, count in after.items():
        assert {seen[f"blocks.{block}.{layer}"] for layer in ("attn.proj", "norm2", "mlp.fc1", "mlp.fc2")} == {count}
    assert seen["blocks.5.mlp.fc1"] < kept[1]  # the stride of 2 thins them further


@pytest.mark.parametrize("name", NETS)
def test_gradients_reach_every_parameter(name):
    """Where CLS is read out the last block's pooling of the other queries has no gradient: in the dense network too."""
    x, weight, missing = inputs(name), torch.randn(2, 7, dtype=torch.float64), []
    for blocks in ((), (2, 3, 4)):
        model = net(name, blocks=blocks, NUM_TOKENS=0.7)
        (model(x) * weight).sum().backward()
        missing.append([key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0])
    assert missing[0] == missing[1]
    assert all(key.startswith(("blocks.5.attn.pool_q", "blocks.5.attn.rel_pos")) for key in missing[0])


def test_stochastic_depth_and_autocast():
    """Training mode runs with stochastic depth and dropout, and under autocast in half precision."""
    cfg = config(NETS["v2"] | {"ATS.ENABLE": True, "ATS.BLOCKS": [2, 3], "MVIT.DROPPATH_RATE": 0.5})
    cfg.merge_pairs([("MVIT.DROPOUT_RATE", 0.1), ("MODEL.DROPOUT_RATE", 0.5)])
    model = fill(build_model(cfg)).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(inputs("v2").float())
    assert logits.isfinite().all()
    logits.float().sum().backward()


def test_empty_batch():
    assert net("v2", blocks=(0, 2, 4))(inputs("v2")[:0]).shape == (0, 7)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_clips_harm_nobody_else(value):
    model, x = net("v2", blocks=(2, 3, 4)), inputs("v2", 3)
    with torch.no_grad():
        good = model(x)
        x[1, 0, 3, 3, 3] = value
        logits, trace = model.forward_tokens(x)
    torch.testing.assert_close(logits[[0, 2]], good[[0, 2]], rtol=0, atol=1e-10)
    assert all((entry.num_tokens >= 2).all() for entry in trace)


def test_relative_positions_of_unequal_grids():
    """Query and key of the same place have distance 0 in the finer grid's units, the middle of the table."""
    table = torch.arange(7.0)[:, None]
    assert relative_table(table, 4, 4)[..., 0].tolist() == [[3 + i - j for j in range(4)] for i in range(4)]
    assert relative_table(table, 4, 2)[..., 0].tolist() == [[2 + i - 2 * j for j in range(2)] for i in range(4)]
    assert relative_table(table, 2, 4)[..., 0].tolist() == [[3 + 2 * i - j for j in range(4)] for i in range(2)]
    assert relative_table(torch.ones(3, 5), 4, 4).shape == (4, 4, 5)


@settings(max_examples=40)
@given(
    grid=st.tuples(*[st.integers(1, 6)] * 3),
    kernel=st.tuples(*[st.sampled_from([1, 3, 5])] * 3),
    stride=st.tuples(*[st.integers(1, 3)] * 3),
    batch_size=st.integers(1, 2),
)
def test_depthwise_convolution_is_conv3d(grid, kernel, stride, batch_size):
    """Frame by frame or not, values and gradients are those of a convolution in three dimensions."""
    padding = tuple(size // 2 for size in kernel)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch_size, *grid, 4, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(4, 1, *kernel, generator=generator, dtype=torch.float64).requires_grad_()
    out = depthwise_convolution(x, weight, stride, padding)
    volume = x.permute(0, 4, 1, 2, 3).contiguous()
    wanted = torch.nn.functional.conv3d(volume, weight, stride=stride, padding=padding, groups=4)
    torch.testing.assert_close(out, wanted.permute(0, 2, 3, 4, 1))
    factor = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    grads = torch.autograd.grad((out * factor).sum(), (x, weight))
    torch.testing.assert_close(grads, torch.autograd.grad((wanted.permute(0, 2, 3, 4, 1) * factor).sum(), (x, weight)))


def test_max_tokens_follows_the_grid():
    """Slots on another grid are in proportion, so that a full grid stays full."""
    assert rescale(1 + 25, 1 + 25, 1 + 9, 1) == 1 + 9
    assert rescale(1 + 40, 1 + 64, 1 + 16, 1) == 1 + 10
    assert rescale(1 + 10, 1 + 16, 1 + 64, 1) == 1 + 40


def test_max_tokens_on_an_uneven_grid_comes_back():
    """Cells as tokens and as cells again, block after block, are the same number: 25 cells of a grid of 81 tokens."""
    for cells in range(1, 26):
        assert rescale(rescale(1 + cells, 1 + 25, 1 + 81, 1), 1 + 81, 1 + 25, 1) == 1 + cells
    assert rescale(1 + 1, 1 + 64, 1 + 16, 1) == 1 + 1


@pytest.mark.parametrize("blocks", [(), (2, 3, 4), (0, 1), (1, 4)], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_flops_equal_counter(name, blocks):
    """To the last multiply-add, dense and with ATS."""
    model, x = net(name, blocks=blocks, NUM_TOKENS=0.6), inputs(name, 1)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        _, trace = model.forward_tokens(x)
    cost = gflops(model, trace, x.shape)
    assert cost.as_run.item() * 1e9 == pytest.approx(counter.get_total_flops() / 2, abs=0.5)
    if not blocks:
        assert cost.dense == cost.paper.item() == cost.as_run.item()
    else:
        assert cost.paper.item() < cost.dense


def test_each_clip_is_counted_by_its_own_tokens():
    model, x = net("v2", blocks=(2, 3, 4), NUM_TOKENS=0.8), inputs("v2", 4)
    with torch.no_grad():
        together = gflops(model, model.forward_tokens(x)[1], x.shape)
        for i in range(4):
            alone = gflops(model, model.forward_tokens(x[i : i + 1])[1], x[:1].shape)
            assert alone.as_run.item() == together.as_run[i].item()
            assert alone.paper.item() == together.paper[i].item()
    assert len(set(together.as_run.tolist())) > 1


PUBLISHED = {
    "Kinetics/MViTv1_B_16x4": (36.61, 70.6),
    "Kinetics/MViTv1_B_32x3": (53.12, 235.8),
    "Kinetics/MViTv2_S_16x4": (34.54, 64.2),
    "ImageNet/MViTv1_B": (36.98, 7.81),
    "ImageNet/MViTv2_T": (24.17, 4.68),
    "ImageNet/MViTv2_S": (34.87, 6.96),
    "ImageNet/MViTv2_B": (51.47, 10.1),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("suffix", ["", "_ATS"])
def test_configs_have_the_published_size(name, suffix):
    """Parameters and dense GFLOPs of every config, and the command in its header."""
    path = ROOT / "configs" / f"{name}{suffix}.yaml"
    cfg = load_config(path)
    with torch.device("meta"):
        model = build_model(cfg)
    frames = () if cfg.MVIT.PATCH_2D else (cfg.DATA.NUM_FRAMES,)
    params, cost = PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(params, abs=0.006)
    assert dense_gflops(model, (1, 3, *frames, 224, 224)) == pytest.approx(cost, rel=0.004)
    assert f"--cfg configs/{name}{suffix}.yaml" in path.read_text()
    assert any(isinstance(block, MultiScaleATSBlock) for block in model.blocks) == bool(suffix)


V2_B = ["MVIT.DEPTH", 24, *(x for k in ("DIM_MUL", "HEAD_MUL") for x in (f"MVIT.{k}", [[2, 2.0], [5, 2.0], [21, 2.0]]))]
V2_B += ["MVIT.POOL_Q_STRIDE", [[i, 1, 2, 2] if i in (2, 5, 21) else [i, 1, 1, 1] for i in range(24)]]
V2_L = ["MVIT.DEPTH", 48, *(x for k in ("DIM_MUL", "HEAD_MUL") for x in (f"MVIT.{k}", [[2, 2.0], [8, 2.0], [44, 2.0]]))]
V2_L += ["MVIT.POOL_Q_STRIDE", [[i, 1, 2, 2] if i in (2, 8, 44) else [i, 1, 1, 1] for i in range(48)]]
V2_L += ["MVIT.EMBED_DIM", 144, "MVIT.NUM_HEADS", 2, "DATA.NUM_FRAMES", 40, "DATA.TRAIN_CROP_SIZE", 312]
RELEASES = {
    "MVIT_B_16x4_CONV": ("Kinetics/MViTv1_B_16x4", []),
    "MVIT_B_32x3_CONV": ("Kinetics/MViTv1_B_32x3", []),
    "MVITv2_S_16x4": ("Kinetics/MViTv2_S_16x4", []),
    "MVITv2_B_32x3": ("Kinetics/MViTv2_S_16x4", [*V2_B, "DATA.NUM_FRAMES", 32]),
    "MVITv2_L_40x3": ("Kinetics/MViTv2_S_16x4", V2_L),
    "MVIT_B_16_CONV_imagenet": ("ImageNet/MViTv1_B", []),
    "MVITv2_T_imagenet": ("ImageNet/MViTv2_T", []),
    "MVITv2_S_imagenet": ("ImageNet/MViTv2_S", []),
    "MVITv2_B_imagenet": ("ImageNet/MViTv2_B", []),
    "pytorchvideo_mvit_base_16": ("ImageNet/MViTv1_B", []),
    "pytorchvideo_mvit_base_16x4": ("Kinetics/MViTv1_B_16x4", []),
    "pytorchvideo_mvit_base_32x3": ("Kinetics/MViTv1_B_16x4", ["DATA.NUM_FRAMES", 32]),
}


@pytest.mark.parametrize(
    ("release", "pool_dims"),
    [(release, 3) for release in RELEASES] + [(f"MVITv2_{size}_imagenet", 2) for size in "TSB"],
)
def test_released_keys_load(release, pool_dims):
    """Key names and shapes of every release fill the model strictly; facebookresearch/mvit has 2-D pooling weights."""
    path, overrides = RELEASES[release]
    info = json.loads((FIXTURES / "keys" / f"{release}.json").read_text())
    cfg = load_config(ROOT / "configs" / f"{path}.yaml", overrides)
    with torch.device("meta"):
        model = build_model(cfg)
        state = {key: torch.empty(shape) for key, shape in info["keys"].items()}
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(info["num_parameters"], rel=1e-5)
    if pool_dims == 2:
        state = {key: value[:, :, 0] if ".pool_" in key else value for key, value in state.items()}
    load_weights(model, {info["checkpoint_wrapper"]["state_dict_key"]: state, "epoch": 3})


def test_pytorchvideo_weights_land_where_they_belong():
    """Separate q, k, v and position tables, and poolings stored twice."""
    model = net("v1 image", dtype=torch.float32)
    state = model.state_dict()
    theirs = {key: value for key, value in state.items() if ".qkv." not in key and key != "pos_embed"}
    for key, value in state.items():
        if ".qkv." in key:
            for name, part in zip("qkv", value.chunk(3), strict=True):
                theirs[key.replace("qkv", name)] = part
    theirs = {key.replace("head.projection", "head.proj"): value for key, value in theirs.items()}
    theirs |= {f"norm_embed.{k}": theirs.pop(f"norm.{k}") for k in ("weight", "bias")}
    theirs |= {"cls_positional_encoding.cls_token": theirs.pop("cls_token")}
    theirs |= {f"patch_embed.patch_model.{k}": theirs.pop(f"patch_embed.proj.{k}") for k in ("weight", "bias")}
    for key in [key for key in theirs if ".attn.pool_" in key]:
        theirs[key.replace(".pool_", "._attention_pool_").replace(".weight", ".pool.weight")] = theirs[key]
    spatial = state["pos_embed"][:, 1:] - 1
    prefix = "cls_positional_encoding.pos_embed_"
    theirs |= {f"{prefix}spatial": spatial, f"{prefix}temporal": torch.ones(1, 1, 16)}
    theirs[f"{prefix}class"] = state["pos_embed"][:, :1]
    other = net("v1 image", dtype=torch.float32, seed=1)
    load_weights(other, {"model_state": theirs})
    x = inputs("v1 image").float()
    torch.testing.assert_close(other(x), model(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["v1", "v1 image", "v2"])
def test_weights_of_another_size_are_resized(name):
    """Absolute positions and tables of distances follow the size; at its own size nothing changes."""
    small = net(name, dtype=torch.float32)
    settings = NETS[name] | {"DATA.TRAIN_CROP_SIZE": 64, "DATA.NUM_FRAMES": 12 if name != "v1 image" else 8}
    large = build_model(config(settings)).eval()
    load_weights(large, small.state_dict())
    x = torch.nn.functional.interpolate(inputs(name).float(), scale_factor=2 if "image" in name else (1.5, 2, 2))
    torch.testing.assert_close(large(x), small(x), rtol=0, atol=1e-4)  # positions are resized on the fly as well


SLOWFAST = """
DATA:
  MEAN: [0.485, 0.456, 0.406]
  NUM_FRAMES: 1
  TRAIN_CROP_SIZE: 224
  INPUT_CHANNEL_NUM: [3]
MVIT:
  PATCH_2D: True
  ZERO_DECAY_POS_CLS: False
  MODE: "conv"
  CLS_EMBED_ON: False
  PATCH_KERNEL: (7, 7)
  PATCH_STRIDE: [4, 4]
  PATCH_PADDING: [3, 3]
  EMBED_DIM: 96
  NUM_HEADS: 1
  MLP_RATIO: 4.0
  QKV_BIAS: True
  DROPPATH_RATE: 0.1
  DEPTH: 16
  NORM: "layernorm"
  DEPTH: 24
  DIM_MUL: [[2, 2.0], [5, 2.0],  [21, 2.0]]
  HEAD_MUL: [[2, 2.0], [5, 2.0], [21, 2.0]]
  POOL_KVQ_KERNEL: [1, 3, 3]
  POOL_KV_STRIDE_ADAPTIVE: [1, 4, 4]
  POOL_Q_STRIDE: [[2,1, 2, 2], [5, 1, 2, 2],  [21, 1, 2, 2]]
  DROPOUT_RATE: 0.0
  RESIDUAL_POOLING: True
  USE_ABS_POS: False
  REL_POS_SPATIAL: True
  DIM_MUL_IN_ATT: True
AUG: {RE_SPLIT: False, AA_TYPE: rand-m9-n6-mstd0.5-inc1}
BN:
  USE_PRECISE_STATS: False
SOLVER:
  BASE_LR_SCALE_NUM_SHARDS: True
  BASE_LR: 0.00025
  COSINE_END_LR: 1e-6
  WARMUP_START_LR: 1e-8
  COSINE_AFTER_WARMUP: True
  COSINE_AFTER_WARMUP: True
  CLIP_GRAD_L2NORM: 1.0
MODEL:
  ARCH: mvit
  MODEL_NAME: MViT
  LOSS_FUNC: soft_cross_entropy
  ACT_CHECKPOINT: True
TEST: {NUM_ENSEMBLE_VIEWS: 1, NUM_SPATIAL_CROPS: 1}
NUM_GPUS: 8
"""


def test_slowfasts_yaml_loads(tmp_path, caplog):
    """All forms of keys and values of SlowFast's published MViT files, the two keys that stand twice among them."""
    path = tmp_path / "slowfast.yaml"
    path.write_text(SLOWFAST)
    cfg = load_config(path)
    assert "key DEPTH appears twice, the last one counts: 24" in caplog.text
    assert "key COSINE_AFTER_WARMUP appears twice" in caplog.text
    assert (cfg.MVIT.DEPTH, cfg.MVIT.PATCH_KERNEL, cfg.SOLVER.WARMUP_START_LR) == (24, [7, 7], 1e-8)
    with torch.device("meta"):
        assert len(build_model(cfg).blocks) == 24


ON = {"ATS.ENABLE": True}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (V1 | ON | {"ATS.BLOCKS": [4, 6]}, "block 6 does not exist"),
        (V1 | IMAGE | ON | {"ATS.BLOCKS": [2, 5], "MVIT.SEP_POS_EMBED": False}, "Blocks that can: [0, 1, 2, 3, 4]"),
        (V2 | ON | {"ATS.BLOCKS": [2], "MVIT.CLS_EMBED_ON": False}, "use ATS.SCORE mean_attention"),
        (
            V1 | ON | {"ATS.BLOCKS": [2], "MVIT.POOL_KVQ_KERNEL": [3, 4, 4], "MVIT.POOL_Q_STRIDE": []},
            "ATS needs odd pooling kernels",
        ),
        (V1 | ON | {"ATS.BLOCKS": [1], "MVIT.POOL_KV_STRIDE_ADAPTIVE": [1, 3, 3]}, "Blocks that can: [0, 2, 3, 4]"),
        (V1 | {"MVIT.PATCH_2D": True}, "MVIT.PATCH_KERNEL [3, 7, 7]: give two numbers (h, w)"),
        (V1 | {"MVIT.POOL_KV_STRIDE": [[0, 1, 2, 2]]}, "exclude each other"),
        (V1 | {"MVIT.POOL_Q_STRIDE": [[1, 2, 2]]}, "MVIT.POOL_Q_STRIDE [1, 2, 2]: give [[block, t, h, w], ...]"),
        (V1 | {"MVIT.POOL_Q_STRIDE": [[1, 1, 3, 3]], "DATA.TRAIN_CROP_SIZE": 36}, "use strides 1, 2 or 4"),
        (V1 | {"MVIT.NUM_HEADS": 3}, "Block 0 has width 16 and 3 heads"),
        (V1 | {"DATA.NUM_FRAMES": 1}, "leave no patches"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_configs_are_named(settings, text):
    with pytest.raises(UserError) as error:
        build_model(config(settings))
    assert text in str(error.value)


def test_default_blocks_leave_out_those_that_cannot_sample():
    """The last three quarters of six blocks but the last one, whose queries are coarser than its keys."""
    model = build_model(config(V1 | ON))
    assert [block.reduction.block for block in ats_blocks(model)] == [1, 2, 3, 4]


def test_sizes_that_cannot_sample_are_named():
    """Block 5 has coarser queries than keys; only where one key is left, on the smallest grid, can it sample."""
    settings = V1 | {"DATA.TRAIN_CROP_SIZE": 8, "ATS.ENABLE": True, "ATS.BLOCKS": [5]}
    model = build_model(config(settings)).double()
    assert model(on_size(8, 8)).shape == (2, 7)
    with pytest.raises(UserError, match=r"ATS.BLOCKS: \[5\] cannot sample patches on a grid 4 x 8 x 8"):
        model(on_size(8, 32))


def test_wrong_input_is_named():
    with pytest.raises(UserError, match=r"takes \[B, 3, T, H, W\], not \[2, 3, 32, 32\]"):
        net("v1")(inputs("v1 image"))
