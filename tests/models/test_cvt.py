"""CvT: the reference's golden numbers, released weights, and ATS on the cells of the last stage's key grid."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    FIXTURES,
    check_gradients,
    check_image_case,
    check_training,
    counted_multiply_adds,
    keep_all,
    randomise,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import DropPath
from timm.models import group_parameters

from ats.checkpoint import load_weights
from ats.config import CfgNode, get_cfg, load_config
from ats.errors import UserError
from ats.flops import dense_gflops, gflops
from ats.models import build_model
from ats.models.cvt.blocks import ConvATSBlock, batch_norm
from ats.models.cvt.model import CvT
from ats.tokens import KeptTokens

ROOT = Path(__file__).parents[2]
# Two stages on 32 x 32 pixels: 16 x 16 tokens, then 8 x 8 with 4 x 4 cells of keys. Blocks 1 to 4 are the last stage.
BASE = {
    "CVT.NUM_STAGES": 2, "CVT.PATCH_SIZE": [3, 3], "CVT.PATCH_STRIDE": [2, 2], "CVT.PATCH_PADDING": [1, 1],
    "CVT.DIM_EMBED": [8, 16], "CVT.NUM_HEADS": [1, 2], "CVT.DEPTH": [1, 4], "CVT.MLP_RATIO": [2.0, 3.0],
    "CVT.ATTN_DROP_RATE": [0.0, 0.0], "CVT.DROP_RATE": [0.0, 0.0], "CVT.DROP_PATH_RATE": [0.0, 0.0],
    "CVT.QKV_BIAS": [True, True], "CVT.CLS_TOKEN": [False, True], "CVT.POS_EMBED": [False, False],
    "CVT.QKV_PROJ_METHOD": ["dw_bn", "dw_bn"], "CVT.KERNEL_QKV": [3, 3], "CVT.PADDING_KV": [1, 1],
    "CVT.STRIDE_KV": [2, 2], "CVT.PADDING_Q": [1, 1], "CVT.STRIDE_Q": [1, 1],
}  # fmt: skip
NETS = {
    "released": BASE,
    "odd grid": BASE,  # on 28 x 20 pixels: 7 x 5 tokens, 4 x 3 cells
    "no bias": BASE | {"CVT.QKV_BIAS": [True, False]},
    "wide stride": BASE | {"CVT.STRIDE_KV": [2, 3], "CVT.KERNEL_QKV": [3, 5], "CVT.PADDING_KV": [1, 2],
                           "CVT.PADDING_Q": [1, 2]},
    "keys not strided": BASE | {"CVT.STRIDE_KV": [2, 1]},
    "linear": BASE | {"CVT.QKV_PROJ_METHOD": ["avg", "linear"]},
    "no CLS": BASE | {"CVT.CLS_TOKEN": [True, False]},
}  # fmt: skip
ALL = (1, 2, 3, 4)


def config(settings: dict) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_pairs(({"MODEL.NAME": "CvT", "MODEL.NUM_CLASSES": 7} | settings).items())
    return cfg


def net(name: str, *, blocks: tuple[int, ...] = (), dtype=torch.float64, seed: int = 0, **ats: object) -> CvT:
    """One of NETS, sampling in `blocks`, with weights large enough for tokens to differ."""
    options = {"ENABLE": bool(blocks), "BLOCKS": list(blocks), "MIN_TOKENS": 4} | ats
    if name == "no CLS":
        options["SCORE"] = "mean_attention"
    model = build_model(config(NETS[name] | {f"ATS.{key}": value for key, value in options.items()}))
    return randomise(model, seed).to(dtype).eval()


def inputs(name: str, batch_size: int = 2, seed: int = 0) -> torch.Tensor:
    size = (28, 20) if name == "odd grid" else (32, 32)
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch_size, 3, *size, generator=generator, dtype=torch.float64)


def golden_model(case: dict) -> CvT:
    spec = {f"CVT.{key}": value for key, value in case["spec"].items()}
    return build_model(config(spec | {"MODEL.NUM_CLASSES": case["num_classes"]}))


CASE = json.loads((FIXTURES / "image" / "C_cvt_tiny" / "case.json").read_text())["config"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_golden_logits_and_gradients(dtype):
    """The reference's own numbers in evaluation; in float64 to round-off."""
    check_image_case(golden_model(CASE), "C_cvt_tiny", dtype)


def test_golden_training_mode():
    """With batch statistics: logits, gradients, and the running statistics afterwards."""
    model = golden_model(CASE)
    load_weights(model, FIXTURES / "image" / "C_cvt_tiny" / "weights.safetensors")
    golden = np.load(FIXTURES / "image" / "C_cvt_tiny" / "golden.npz")
    x = torch.from_numpy(((golden["image_u8"] / 255.0 - 0.5) / 0.25).astype(np.float32)).requires_grad_()
    logits = model.train()(x)
    np.testing.assert_allclose(logits.detach(), golden["train__logits"], atol=1e-4, rtol=0)
    check_gradients(model, x, logits, golden, prefix="train__grad_")
    state = model.state_dict()
    stored = {key.removeprefix("train__after__"): golden[key] for key in golden if "after__" in key}
    assert len(stored) == 2
    for key, want in stored.items():
        np.testing.assert_allclose(state[key], want, atol=1e-5, err_msg=key)


def test_position_embedding_is_named_as_without_effect(caplog):
    """As in the reference's code, which never reads the key."""
    with_it, without = build_model(config(BASE | {"CVT.POS_EMBED": [False, True]})), net("released")
    assert with_it.state_dict().keys() == without.state_dict().keys()
    assert "CVT.POS_EMBED has no effect" in caplog.text


def test_batch_of_one_keeps_its_axis():
    """The reference squeezes it away."""
    assert net("released")(inputs("released", 1)).shape == (1, 7)


@pytest.mark.parametrize("blocks", [(), (2, 4)], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", ["released", "no CLS"])
def test_gradients_of_a_batch_of_one(name, training, blocks):
    """Half those of the image twice: batch statistics are the same, and torch's CPU batch norm has a wrong backward for
    some layouts of one image.
    """
    model, x = net(name, blocks=blocks).train(training), inputs(name, 1)
    grads = []
    for images in (x, x.repeat(2, 1, 1, 1)):
        images.requires_grad_()
        logits = model(images)
        values = torch.autograd.grad(logits.square().sum() / len(images), [images, *model.parameters()])
        grads.append([len(images) * values[0][0], *values[1:]])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-9 * max(1, two.abs().max().item()))


def test_average_projections_follow_torch():
    """QKV_PROJ_METHOD avg: keys and values are averages rounded up in size, queries are linear."""
    model = build_model(config(BASE | {"CVT.QKV_PROJ_METHOD": ["avg", "avg"]}))
    attn = model.stage1.blocks[0].attn
    assert attn.conv_proj_q is None
    volume = torch.randn(2, 16, 8, 8)
    want = F.avg_pool2d(volume, 3, 2, 1, ceil_mode=True)
    assert torch.equal(attn.conv_proj_k(volume), want)
    assert want.shape[2:] == (5, 5)
    x = torch.randn(1, 3, 32, 32)
    count, trace = counted_multiply_adds(model.eval(), x)
    assert gflops(model, trace, x.shape).as_run.item() * 1e9 == pytest.approx(count, abs=0.5)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-4), (torch.float64, 1e-11)])
@pytest.mark.parametrize("blocks", [ALL, (2, 4)], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_keep_all_equals_dense(name, blocks, dtype, atol):
    """With every cell kept the ragged path gives the dense logits, however model and images lie in memory."""
    sparse, dense, x = net(name, blocks=blocks, dtype=dtype), net(name, dtype=dtype), inputs(name, 3).to(dtype)
    with keep_all(sparse), torch.no_grad():
        want = dense(x)
        orders = [x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)]
        for images in orders:
            logits, trace = sparse.forward_tokens(images)
            torch.testing.assert_close(logits, want, rtol=0, atol=atol)
        sparse.to(memory_format=torch.channels_last)
        torch.testing.assert_close(sparse(orders[1]), want, rtol=0, atol=atol)
    assert [entry.block for entry in trace] == list(blocks)
    assert all((entry.num_tokens == entry.num_tokens.max()).all() for entry in trace)


@pytest.mark.parametrize("name", ["released", "odd grid", "no CLS"])
def test_keep_all_equals_dense_in_training(name):
    """Batch norm sees the same rows: logits, gradients and running statistics are the dense ones."""
    sparse, dense, x = net(name, blocks=(2, 4)).train(), net(name).train(), inputs(name, 3)
    weight = torch.randn(3, 7, dtype=torch.float64)
    with keep_all(sparse):
        for model in (sparse, dense):
            (model(x) * weight).sum().backward()
    for (key, ours), theirs in zip(sparse.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-9, msg=key)
    for (key, ours), theirs in zip(sparse.named_buffers(), dense.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-11, msg=key)


def masked(model: CvT, x: torch.Tensor, trace: list[KeptTokens]) -> torch.Tensor:
    """The logits by dense arithmetic and masks, given what each block kept: dropped tokens are zeros to the
    convolutions, cells without a token are masked keys.
    """
    kept = {entry.block: entry for entry in trace}
    x, grid = model.stage0.patch_embed(x)
    for block in model.stage0.blocks:
        x = block(x, grid, 0)
    x, grid = model.stage1.patch_embed(x.transpose(1, 2).unflatten(2, grid))
    x = torch.cat([model.stage1.cls_token.expand(len(x), -1, -1), x], dim=1)
    here = torch.ones(x.shape[:2], dtype=torch.bool)
    for index, block in enumerate(model.stage1.blocks, start=1):
        attn, stride = block.attn, block.spec.stride_kv
        normed = block.norm1(x) * here[:, :, None]
        volume = normed[:, 1:].transpose(1, 2).unflatten(2, grid)
        cells = F.max_pool2d(here[:, 1:].unflatten(1, grid)[:, None].double(), stride, stride, ceil_mode=True)
        mask = torch.cat([here[:, :1], cells.flatten(1) > 0], dim=1)
        q, k, v = (
            getattr(attn, f"proj_{n}")(
                torch.cat([normed[:, :1], getattr(attn, f"conv_proj_{n}")(volume).flatten(2).transpose(1, 2)], dim=1)
            )
            .unflatten(2, (2, -1))
            .transpose(1, 2)
            for n in "qkv"
        )
        logits = (q @ k.transpose(2, 3)) * 16**-0.5
        weights = logits.masked_fill(~mask[:, None, None], -torch.inf).softmax(dim=-1)
        x = x + attn.proj((weights @ v).transpose(1, 2).flatten(2))
        x = x + block.mlp(block.norm2(x))
        if index in kept:
            here = torch.zeros_like(here)
            for row, patches in zip(here, kept[index].patches, strict=True):
                row[0] = True
                row[patches + 1] = True
    return model.head(model.norm(x[:, 0]))


@pytest.mark.parametrize("name", ["released", "odd grid", "no bias", "wide stride", "keys not strided"])
def test_equals_dense_arithmetic_with_masks(name):
    """Which keys exist after tokens were dropped, and what they are computed from."""
    model, x = net(name, blocks=(1, 3, 4), NUM_TOKENS=0.6), inputs(name, 4)
    with torch.no_grad():
        logits, trace = model.forward_tokens(x)
        torch.testing.assert_close(logits, masked(model, x, trace), rtol=0, atol=1e-10)
    assert len(set(trace[0].num_tokens.tolist())) > 1


@pytest.mark.parametrize("name", ["released", "odd grid", "wide stride"])
def test_cells_are_kept_or_dropped_whole(name):
    """Of a cell all tokens stay or none, never more than K - 1 cells, and none comes back."""
    model = net(name, blocks=(2, 3, 4), NUM_TOKENS=[1, 1, 8, 6, 4])
    height, width = (7, 5) if name == "odd grid" else (8, 8)
    stride = model.stages[-1].spec.stride_kv
    place = torch.arange(height * width)
    cell_of = (place // width) // stride * -(-width // stride) + place % width // stride
    with torch.no_grad():
        _, trace = model.forward_tokens(inputs(name, 5))
    previous = [set(place.tolist())] * 5
    for entry, bound in zip(trace, [8, 6, 4], strict=True):
        for i, patches in enumerate(entry.patches):
            cells = cell_of[patches].unique()
            assert torch.equal(patches, place[torch.isin(cell_of, cells)])
            assert 1 <= len(cells) <= bound - 1
            assert set(patches.tolist()) <= previous[i]
            previous[i] = set(patches.tolist())


@given(
    st.integers(0, 10**6),
    st.lists(st.integers(0, 3), min_size=1, max_size=3),
    st.sampled_from([name for name in NETS if name != "no bias"]),
    st.sampled_from([ALL, (1, 3)]),
    st.sampled_from([1.0, 0.5, 7]),
)
@settings(max_examples=15)
def test_kept_sets_do_not_depend_on_the_batch(seed, order, name, blocks, num_tokens):
    """Any batch made of any images in any order: each keeps the tokens and gets the logits it gets alone."""
    model, pool = net(name, blocks=blocks, seed=seed % 5, NUM_TOKENS=num_tokens), inputs(name, 4, seed)
    with torch.no_grad():
        logits, trace = model.forward_tokens(pool[order])
        for place, i in enumerate(order):
            alone, trace_alone = model.forward_tokens(pool[i : i + 1])
            torch.testing.assert_close(logits[place], alone[0], rtol=0, atol=1e-10)
            for entry, entry_alone in zip(trace, trace_alone, strict=True):
                assert torch.equal(entry.patches[place], entry_alone.patches[0])


@pytest.mark.parametrize("name", ["released", "linear"])
def test_linear_layers_see_kept_tokens_only(name):
    """Keys and values are projected for the cells that are there, queries for what stays (and CLS, to score)."""
    model, seen = net(name, blocks=(1, 3), NUM_TOKENS=0.6), {}
    for key, module in model.stage1.blocks.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda _, args, __, key=key: seen.setdefault(key, []).append(len(args[0])))
    with torch.no_grad():
        _, trace = model.forward_tokens(inputs(name, 3))
    kept = [int(entry.num_tokens.sum()) for entry in trace]
    full = 3 * 65
    assert kept[1] < kept[0] < full
    rows, keys = {0: kept[0], 1: kept[0], 2: kept[1], 3: kept[1]}, {0: full, 1: kept[0], 2: kept[0], 3: kept[1]}
    for block, count in rows.items():
        assert seen[f"{block}.attn.proj_q"] == ([3, count] if block in (0, 2) else [count])
        assert [seen[f"{block}.{layer}"] for layer in ("attn.proj", "mlp.fc1", "mlp.fc2")] == [[count]] * 3
    for block, count in keys.items():
        count = count if name == "linear" else 3 + (count - 3) // 4  # cells of 2 x 2
        assert seen[f"{block}.attn.proj_k"] == seen[f"{block}.attn.proj_v"] == [count]


@pytest.mark.parametrize("name", NETS)
def test_gradients_reach_every_parameter(name):
    """In training mode; what has none (queries of patches in the last block) has none in the dense network either."""
    x, weight, missing = inputs(name, 3), torch.randn(3, 7, dtype=torch.float64), []
    for blocks in ((), (1, 3)):
        model = net(name, blocks=blocks, NUM_TOKENS=0.7).train()
        (model(x) * weight).sum().backward()
        missing.append([key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0])
    assert missing[0] == missing[1]
    assert all(re.match(r"stage1\.blocks\.3\.attn\.conv_proj_q|stage0\.cls_token", key) for key in missing[0])


def test_training_with_stochastic_depth_dropout_and_autocast():
    rates = {f"CVT.{key}_RATE": [0.3, 0.3] for key in ("DROP", "ATTN_DROP", "DROP_PATH")}
    cfg = config(BASE | rates | {"ATS.ENABLE": True, "ATS.BLOCKS": [1, 3], "MODEL.DROPOUT_RATE": 0.5})
    model = randomise(build_model(cfg)).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(inputs("released").float())
    assert logits.isfinite().all()
    logits.float().sum().backward()


def test_stochastic_depth_drops_whole_images():
    """An image's tokens all pass the block unchanged (both branches dropped) or none does."""
    model, before, after = net("released", blocks=(1,)), {}, {}
    block = model.stage1.blocks[0]
    block.norm1.register_forward_hook(lambda _, args, __: before.update(x=args[0]))
    block.register_forward_hook(lambda _, __, out: after.update(tokens=out))
    block.drop_path = DropPath(0.5)
    block.train()
    torch.manual_seed(0)
    with torch.no_grad():
        model(inputs("released", 12))
    kept = after["tokens"]
    same = (kept.x == before["x"][kept.layout.sequence * 65 + kept.position]).all(dim=1)
    by_image = [image.tolist() for image in same.split(kept.layout.sizes)]
    assert {all(image) for image in by_image} == {True, False}
    assert all(len(set(image)) == 1 for image in by_image)


def test_one_row_takes_the_running_statistics():
    """Batch norm in training has no variance of one row; instead of failing it uses what it learned so far."""
    bn = randomise(torch.nn.BatchNorm2d(4)).train()
    x = torch.randn(1, 4)
    out = batch_norm(bn, x)
    torch.testing.assert_close(out, batch_norm(bn.eval(), x))


def test_trains_resumes_and_evaluates(tiny_config, tmp_path):
    """The engine on this network: batch-norm statistics are averaged, saved and restored with the weights."""
    check_training(tiny_config, tmp_path, BASE | {"MODEL.NAME": "CvT", "ATS.BLOCKS": [1, 3], "ATS.NUM_TOKENS": 0.7})


def test_empty_batch():
    assert net("released", blocks=ALL)(inputs("released")[:0]).shape == (0, 7)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_images_harm_nobody_else(value):
    model, x = net("released", blocks=ALL), inputs("released", 3)
    with torch.no_grad():
        good = model(x)
        x[1, 0, 3, 3] = value
        logits, trace = model.forward_tokens(x)
    torch.testing.assert_close(logits[[0, 2]], good[[0, 2]], rtol=0, atol=1e-10)
    assert all((entry.num_tokens >= 2).all() for entry in trace)


@pytest.mark.parametrize("blocks", [(), ALL, (2, 4)], ids=str)
@pytest.mark.parametrize("name", NETS)
def test_flops_equal_counter(name, blocks):
    """To the last multiply-add, dense and with ATS."""
    model, x = net(name, blocks=blocks, NUM_TOKENS=0.6), inputs(name, 1)
    count, trace = counted_multiply_adds(model, x)
    cost = gflops(model, trace, x.shape)
    assert cost.as_run.item() * 1e9 == pytest.approx(count, abs=0.5)
    if not blocks:
        assert cost.dense == cost.paper.item() == cost.as_run.item()
    else:
        assert cost.as_run.item() < cost.dense
        assert cost.paper.item() < cost.dense


def test_papers_accounting():
    """One ATS block of CvT in the paper's accounting: every query projected, all of N x N', dropped rows gone after."""
    model, x = net("released", blocks=(4,), NUM_TOKENS=0.5), inputs("released", 3)
    with torch.no_grad():
        _, trace = model.forward_tokens(x)
    cost, m = gflops(model, trace, x.shape), trace[0].num_tokens.double()
    saved = (65 - m) * (17 * 16 + 16 * 16 + 2 * 16 * 48)  # A V, output projection, MLP
    torch.testing.assert_close(cost.paper, cost.dense - saved / 1e9)


PUBLISHED = {
    # M parameters, GFLOPs at the config's size; the published 4.5 and 7.1 are ours cut after one digit, not rounded.
    "CvT_13": (20.00, 4.566, 224),
    "CvT_21": (31.62, 7.178, 224),
    "CvT_13_384": (20.00, 16.27, 384),
    "CvT_21_384": (31.62, 24.85, 384),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("suffix", ["", "_ATS"])
def test_configs_have_the_published_size(name, suffix):
    path = ROOT / "configs" / "ImageNet" / f"{name}{suffix}.yaml"
    cfg = load_config(path)
    params, cost, size = PUBLISHED[name]
    assert cfg.DATA.TRAIN_CROP_SIZE == cfg.DATA.TEST_CROP_SIZE == size
    with torch.device("meta"):
        model = build_model(cfg)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(params, abs=0.006)
    assert dense_gflops(model, (1, 3, size, size)) == pytest.approx(cost, rel=1e-3)
    stage = model.stages[-1].blocks
    assert all(isinstance(block, ConvATSBlock) and block.reduction is not None for block in stage) == bool(suffix)
    text = path.read_text()
    assert f"--cfg configs/ImageNet/{path.name}" in text
    assert f"{cost:.4g} GFLOPs" in text
    assert f"{params:.4g} M" in text


CVT_YAML = """
OUTPUT_DIR: 'OUTPUT/'
WORKERS: 6
PRINT_FREQ: 500
AMP: {ENABLED: true}
MODEL:
  NAME: cls_cvt
  SPEC:
    INIT: 'trunc_norm'
    NUM_STAGES: 3
    PATCH_SIZE: [7, 3, 3]
    PATCH_STRIDE: [4, 2, 2]
    PATCH_PADDING: [2, 1, 1]
    DIM_EMBED: [64, 192, 384]
    NUM_HEADS: [1, 3, 6]
    DEPTH: [1, 4, 16]
    MLP_RATIO: [4.0, 4.0, 4.0]
    ATTN_DROP_RATE: [0.0, 0.0, 0.0]
    DROP_RATE: [0.0, 0.0, 0.0]
    DROP_PATH_RATE: [0.0, 0.0, 0.1]
    QKV_BIAS: [True, True, True]
    CLS_TOKEN: [False, False, True]
    POS_EMBED: [False, False, False]
    QKV_PROJ_METHOD: ['dw_bn', 'dw_bn', 'dw_bn']
    KERNEL_QKV: [3, 3, 3]
    PADDING_KV: [1, 1, 1]
    STRIDE_KV: [2, 2, 2]
    PADDING_Q: [1, 1, 1]
    STRIDE_Q: [1, 1, 1]
AUG:
  MIXUP_PROB: 1.0
  MIXUP: 0.8
  MIXCUT: 1.0
  TIMM_AUG: {USE_LOADER: true, RE_COUNT: 1, RE_MODE: pixel, RE_SPLIT: false, RE_PROB: 0.25, HFLIP: 0.5, VFLIP: 0.0,
    AUTO_AUGMENT: rand-m9-mstd0.5-inc1, COLOR_JITTER: 0.4, INTERPOLATION: bicubic}
LOSS: {LABEL_SMOOTHING: 0.1}
CUDNN: {BENCHMARK: true, DETERMINISTIC: false, ENABLED: true}
DATASET: {DATASET: 'imagenet', DATA_FORMAT: 'jpg', ROOT: 'dataset/imagenet/', TEST_SET: 'val', TRAIN_SET: 'train'}
TEST: {BATCH_SIZE_PER_GPU: 32, IMAGE_SIZE: [384, 384], MODEL_FILE: '', INTERPOLATION: 3, CENTER_CROP: False}
TRAIN:
  BATCH_SIZE_PER_GPU: 128
  LR: 0.000125
  IMAGE_SIZE: [384, 384]
  BEGIN_EPOCH: 0
  END_EPOCH: 300
  LR_SCHEDULER:
    METHOD: 'timm'
    ARGS: {sched: 'cosine', warmup_epochs: 5, warmup_lr: 0.000001, min_lr: 0.00001, cooldown_epochs: 10,
      decay_rate: 0.1}
  OPTIMIZER: adamW
  WD: 0.1
  WITHOUT_WD_LIST: ['bn', 'bias', 'ln']
  SHUFFLE: true
DEBUG: {DEBUG: false}
"""


def test_the_releases_yaml_is_our_config(tmp_path, caplog):
    """All its keys are used or named; but for the number of GPUs it says what CvT_21_384.yaml says."""
    path = tmp_path / "cvt-21-384x384.yaml"
    path.write_text(CVT_YAML)
    theirs, ours = load_config(path), load_config(ROOT / "configs" / "ImageNet" / "CvT_21_384.yaml")
    assert "TEST.CENTER_CROP False squeezes whole images" in caplog.text
    assert "CUDNN.BENCHMARK has no effect" in caplog.text
    per_gpu = {"TRAIN": ("BATCH_SIZE",), "SOLVER": ("BASE_LR",)}
    for section in ("MODEL", "CVT", "SOLVER", "AUG", "MIXUP", "DATA", "TRAIN"):
        for key, value in theirs[section].items():
            if key in per_gpu.get(section, ()):
                assert ours[section][key] == pytest.approx(8 * value)
            elif key not in ("PATH_TO_DATA_DIR", "CHECKPOINT_PERIOD"):
                assert ours[section][key] == value, f"{section}.{key}"


@pytest.mark.parametrize("release", ["cvt-13-224x224", "cvt-21-224x224"])
def test_released_keys_load(release):
    """Names and shapes of the released files (the same for 384 x 384) fill the model strictly, with ATS too."""
    about = json.loads((FIXTURES / "keys" / f"{release}.json").read_text())
    spec = {f"CVT.{key}": value for key, value in about["spec"].items()}
    first = 3 if "13" in release else 5
    cfg = config(spec | {"MODEL.NUM_CLASSES": 1000, "ATS.ENABLE": True, "ATS.BLOCKS": [first + 1]})
    with torch.device("meta"):
        model = build_model(cfg)
        state = {key: torch.empty(shape) for key, shape in about["keys"].items()}
    assert list(model.state_dict()) == list(state)
    assert sum(p.numel() for p in model.parameters()) == about["num_params"]
    load_weights(model, state)


def test_layer_decay_knows_the_order_of_the_layers():
    """Stage 0's embedding first, its block, stage 1's embedding, its blocks, the head last."""
    layers = group_parameters(net("released"), net("released").group_matcher(), reverse=True)
    names = ["stage0.patch_embed.proj.weight", "stage0.blocks.0.norm1.weight", "stage1.patch_embed.proj.weight"]
    names += [f"stage1.blocks.{i}.mlp.fc1.weight" for i in range(4)]
    assert [layers[name] for name in names] == list(range(7))
    assert layers["stage1.cls_token"] == layers["stage1.patch_embed.proj.weight"]
    assert layers["head.weight"] > layers["norm.weight"] == 6


ON = {"ATS.ENABLE": True, "ATS.BLOCKS": [1]}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (ON | {"ATS.BLOCKS": [0, 2]}, "only CvT's last stage can sample, blocks 1 to 4"),
        (ON | {"ATS.BLOCKS": [5]}, "block 5 does not exist"),
        (ON | {"CVT.CLS_TOKEN": [False, False]}, "use ATS.SCORE mean_attention"),
        (ON | {"CVT.QKV_PROJ_METHOD": ["avg", "avg"]}, "dw_bn or linear in the last stage"),
        (ON | {"CVT.PADDING_KV": [1, 0]}, "ATS needs CVT.PADDING_KV"),
        ({"CVT.DEPTH": [1, 2, 10]}, "CVT.DEPTH [1, 2, 10]: give 2 entries"),
        ({"CVT.QKV_PROJ_METHOD": ["dw_bn", "conv"]}, "CVT.QKV_PROJ_METHOD conv: choose from dw_bn, avg, linear"),
        ({"CVT.NUM_HEADS": [1, 3]}, "CVT.DIM_EMBED 16 of stage 1 is not a multiple of CVT.NUM_HEADS 3"),
        ({"CVT.STRIDE_Q": [1, 2]}, "Stage 1: queries must keep the grid"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_configs_are_named(settings, text):
    with pytest.raises(UserError) as error:
        build_model(config(BASE | settings))
    assert text in str(error.value)
