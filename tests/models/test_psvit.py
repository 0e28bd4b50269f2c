"""PS-ViT: the reference's golden numbers, sampling at points, released weights, and ATS in its transformer layers."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import FIXTURES, check_image_case, check_training, counted_multiply_adds, keep_all, randomise
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models import group_parameters

from ats.checkpoint import load_weights
from ats.config import CfgNode, get_cfg, load_config
from ats.errors import UserError
from ats.flops import dense_gflops, gflops
from ats.models import build_model
from ats.models.block import ATSBlock
from ats.models.psvit import POINT_GRADIENTS, PSViT, sample_at

ROOT = Path(__file__).parents[2]
# 32 x 32 pixels, a feature map of 8 x 8, 6 x 5 points; blocks 2 to 5 can sample.
SMALL = {
    "DATA.TRAIN_CROP_SIZE": 32, "PSVIT.NUM_POINTS": [6, 5], "PSVIT.NUM_ITERS": 2, "PSVIT.STEM_DIMS": [8, 4, 12],
    "PSVIT.DEPTH": 6, "PSVIT.EMBED_DIM": 24, "PSVIT.NUM_HEADS": 2, "PSVIT.MLP_RATIO": 2.0, "PSVIT.DROP_PATH_RATE": 0.0,
}  # fmt: skip
ALL = (2, 3, 4, 5)


def config(settings: dict) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_pairs(({"MODEL.NAME": "PSViT", "MODEL.NUM_CLASSES": 7} | settings).items())
    return cfg


def net(
    *, blocks: tuple[int, ...] = (), dtype=torch.float64, seed: int = 0, settings: dict | None = None, **ats: object
):
    """The small network, sampling in `blocks`, with weights large enough for points to move and tokens to differ."""
    options = {"ENABLE": bool(blocks), "BLOCKS": list(blocks), "MIN_TOKENS": 4} | ats
    ats_settings = {f"ATS.{key}": value for key, value in options.items()}
    return randomise(build_model(config(SMALL | (settings or {}) | ats_settings)), seed).to(dtype).eval()


def inputs(batch_size: int = 2, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch_size, 3, 32, 32, generator=generator, dtype=torch.float64)


def golden_model(name: str, point_gradient: str = "released") -> PSViT:
    case = json.loads((FIXTURES / "image" / name / "case.json").read_text())["config"]
    return build_model(
        config({
            "MODEL.NUM_CLASSES": case["num_classes"], "DATA.TRAIN_CROP_SIZE": case["img_size"],
            "PSVIT.NUM_POINTS": [case["num_point_h"], case["num_point_w"]], "PSVIT.NUM_ITERS": case["num_iters"],
            "PSVIT.STEM_DIMS": [16, 8, 24], "PSVIT.OFFSET_GAMMA": case["offset_gamma"], "PSVIT.DEPTH": case["depth"],
            "PSVIT.EMBED_DIM": case["embed_dim"], "PSVIT.NUM_HEADS": case["num_heads"],
            "PSVIT.MLP_RATIO": case["mlp_ratio"], "PSVIT.QKV_BIAS": case["qkv_bias"],
            "PSVIT.POINT_GRADIENT": point_gradient,
        })
    )  # fmt: skip


CASES = ["D_psvit_tiny_inside", "D_psvit_tiny_outside"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("point_gradient", POINT_GRADIENTS)
@pytest.mark.parametrize("name", CASES)
def test_golden_logits_and_gradients(name, point_gradient, dtype):
    """The reference's own logits, and its gradients: with `released` always, with `grid_sample` where all points are
    inside.

    Where points lie beyond the border the release's backward is not the gradient of its forward (docs/FIDELITY.md):
    there `grid_sample` gives the gradients of its network with the operation replaced by F.grid_sample.
    """
    true = name.endswith("outside") and point_gradient == "grid_sample"
    check_image_case(golden_model(name, point_gradient), name, dtype, prefix="gridsample__grad_" if true else "grad_")


@pytest.mark.parametrize("name", CASES)
def test_golden_points(name):
    """Where every iteration samples, points beyond the border included."""
    model = golden_model(name)
    load_weights(model, FIXTURES / "image" / name / "weights.safetensors")
    golden, points = np.load(FIXTURES / "image" / name / "golden.npz"), []
    for layer in model.ps_layers:
        layer.register_forward_hook(lambda _, __, out: points.append(out[2]))
    with torch.no_grad():
        model.eval()(torch.from_numpy(((golden["image_u8"] / 255.0 - 0.5) / 0.25).astype(np.float32)))
    assert len(points) == len(model.ps_layers)
    for index, point in enumerate(points):
        np.testing.assert_allclose(point, golden[f"ps{index}_sample_point_yx"], atol=1e-4)
    assert np.array_equal(points[0][0], model.point_coord[0])


def test_sampling_is_bilinear_and_its_gradient_true():
    """By hand at pixel centres, between them and beyond the border; by finite differences everywhere."""
    features = torch.arange(12.0, dtype=torch.float64).reshape(1, 1, 3, 4)
    points = torch.tensor([[[1.0, 2.0], [1.5, 2.0], [0.0, 2.25], [-0.5, 0.0], [2.5, 3.0], [4.0, 1.0]]]).double()
    want = [6.0, 8.0, 2.25, 0.0, 11 / 2, 0.0]  # rows are y: row 1 is 4 5 6 7; half of the pixel, half of nothing
    torch.testing.assert_close(sample_at(features, points)[0, :, 0], torch.tensor(want, dtype=torch.float64))
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 3, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    points = (torch.rand(2, 9, 2, generator=generator, dtype=torch.float64) * 8 - 2).requires_grad_()
    assert (points < 0).any()
    assert (points > 4).any()
    torch.autograd.gradcheck(sample_at, (features, points))


def kernel_gradient(features: torch.Tensor, points: torch.Tensor, weight: torch.Tensor) -> tuple:
    """What the release's CUDA kernel adds up for sum(values * weight) of one image, value by value: features [C, H, W],
    points [P, 2], weight [P, C].
    """
    height, width = features.shape[1:]
    grad_features, grad_points = torch.zeros_like(features), torch.zeros_like(points)
    for p, (y, x) in enumerate(points.tolist()):
        if not (-1 < y < height and -1 < x < width):
            continue
        border_y, border_x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
        top, left = int(border_y), int(border_x)
        rows, columns = (top, min(top + 1, height - 1)), (left, min(left + 1, width - 1))
        for c, g in enumerate(weight[p].tolist()):
            (a, b), (d, e) = ([features[c, row, column].item() for column in columns] for row in rows)
            slope_y = [d - a, e - b]  # in the left and in the right column
            slope_x = [b - a, e - d]  # in the upper and in the lower row
            grad_points[p, 0] += g * (slope_y[0] * (columns[1] - x) + slope_y[1] * (x - left))
            grad_points[p, 1] += g * (slope_x[0] * (rows[1] - y) + slope_x[1] * (y - top))
            for row, share_y in zip(rows, (1 - (border_y - top), border_y - top), strict=True):
                for column, share_x in zip(columns, (1 - (border_x - left), border_x - left), strict=True):
                    grad_features[c, row, column] += g * share_y * share_x
    return grad_features, grad_points


@given(st.integers(0, 10**6), st.integers(2, 6), st.integers(2, 6), st.integers(1, 12))
@settings(max_examples=25)
def test_released_backward(seed, height, width, num_points):
    """`released` gives the values of `grid_sample` bit for bit, and the kernel's backward pass written out as a loop:
    this is the gradient for points inside the border and those a pixel or more beyond it, and for no others.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    features = torch.randn(2, 3, height, width, **draw)
    size = torch.tensor([height, width])
    points = torch.rand(2, num_points, 2, **draw) * (size + 3) - 2  # two pixels beyond the border on every side
    weight, found = torch.randn(2, num_points, 3, **draw), {}
    for name, sample in POINT_GRADIENTS.items():
        f, p = features.clone().requires_grad_(), points.clone().requires_grad_()
        found[name] = (values := sample(f, p)).detach(), *torch.autograd.grad((values * weight).sum(), (f, p))
    assert torch.equal(found["released"][0], found["grid_sample"][0])
    by_image = [kernel_gradient(*image) for image in zip(features, points, weight, strict=True)]
    for got, want in zip(found["released"][1:], zip(*by_image, strict=True), strict=True):
        torch.testing.assert_close(got, torch.stack(want), atol=1e-12, rtol=1e-9)

    beyond = ((points < 0) | (points > size - 1)).any(-1)
    in_zone = beyond & ((points > -1) & (points < size)).all(-1)
    difference = (found["released"][2] - found["grid_sample"][2]).abs().amax(-1)
    assert (difference[~in_zone] < 1e-10).all()
    assert (difference[in_zone] > 1e-10).all()
    same_features = torch.isclose(found["released"][1], found["grid_sample"][1], atol=1e-12).flatten(1).all(1)
    assert torch.equal(same_features, ~in_zone.any(1))


def test_released_backward_of_broken_points():
    """A point that is no number gets and gives nothing; the others what they get without it."""
    points = torch.tensor([[[1.2, 0.7], [torch.nan, 1.0], [torch.inf, 1.0], [-0.4, 2.3]]], requires_grad=True)
    features = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    values = POINT_GRADIENTS["released"](features, points)
    broken = torch.autograd.grad(values.where(values.isfinite(), 0).sum(), (features, points))
    whole = torch.autograd.grad(POINT_GRADIENTS["released"](features, points[:, ::3]).sum(), (features, points))
    for got, want in zip(broken, whole, strict=True):
        assert torch.equal(got, want)


def test_gamma_scales_where_features_are_sampled_and_not_how_points_move():
    """As in the reference: features are those at points + gamma * offsets, positions those of points + offsets."""
    halved = net(settings={"PSVIT.OFFSET_GAMMA": 0.5, "PSVIT.NUM_ITERS": 3})
    seen = []
    for layer in halved.ps_layers:
        layer.register_forward_hook(lambda _, args, out: seen.append((args, out)))
    with torch.no_grad():
        halved(inputs())
        for (_, out), (following, _) in pairwise(seen):
            assert torch.equal(following[1], out[2])
            assert torch.equal(following[2], out[1])
        features, points, offsets, previous, pos_layer, size = seen[2][0]
        x = sample_at(features, points + 0.5 * offsets) + pos_layer((points + offsets) / size) + previous
        torch.testing.assert_close(halved.ps_layers[2].transformer_layer(x), seen[2][1][0])
        assert torch.equal(seen[2][1][2], points + offsets)
        assert offsets.abs().max() > 0.1


def test_offsets_learn_through_sampling_alone():
    """Positions and the next iteration's points give no gradient to the offsets, as in the reference."""
    model = net(settings={"PSVIT.OFFSET_GAMMA": 0.0})
    model(inputs()).sum().backward()
    assert model.ps_layers[0].offset_layer.weight.grad.abs().max() == 0
    assert model.pos_layer.weight.grad.abs().max() > 0


def test_fresh_points_do_not_move():
    model = build_model(config(SMALL)).eval()
    assert all((layer.offset_layer.weight == 0).all() for layer in model.ps_layers[:-1])
    with torch.no_grad():
        features = model.stem(inputs().float())
        _, offsets, points = model.ps_layers[0](
            features, model.point_coord.expand(2, -1, -1), None, None, model.pos_layer, 8
        )
    assert (offsets == 0).all()
    assert torch.equal(points[0], model.point_coord[0])


def test_points_are_in_the_middle_of_equal_parts_y_fastest():
    model = build_model(config(SMALL))
    y = [(i + 0.5) * 8 / 6 for i in range(6)]
    x = [(i + 0.5) * 8 / 5 for i in range(5)]
    torch.testing.assert_close(model.point_coord, torch.tensor([[[b, a] for a in x for b in y]]))


def test_batch_of_one_keeps_its_axis():
    assert net()(inputs(1)).shape == (1, 7)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-4), (torch.float64, 1e-11)])
@pytest.mark.parametrize("blocks", [ALL, (3, 5)], ids=str)
def test_keep_all_equals_dense(blocks, dtype, atol):
    """With every token kept the ragged path gives the dense logits, however model and images lie in memory."""
    sparse, dense, x = net(blocks=blocks, dtype=dtype), net(dtype=dtype), inputs(3).to(dtype)
    with keep_all(sparse), torch.no_grad():
        want = dense(x)
        orders = [x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3).contiguous().transpose(2, 3)]
        for images in orders:
            logits, trace = sparse.forward_tokens(images)
            torch.testing.assert_close(logits, want, rtol=0, atol=atol)
        sparse.to(memory_format=torch.channels_last)
        torch.testing.assert_close(sparse(orders[1]), want, rtol=0, atol=atol)
    assert [entry.block for entry in trace] == list(blocks)
    assert all((entry.num_tokens == 31).all() for entry in trace)


@given(
    st.integers(0, 10**6),
    st.lists(st.integers(0, 3), min_size=1, max_size=4),
    st.sampled_from(["inverse_transform", "topk", "random"]),
    st.sampled_from([1.0, 0.5, 9]),
)
@settings(max_examples=20)
def test_kept_sets_do_not_depend_on_the_batch(seed, order, sampler, num_tokens):
    """Any batch made of any images in any order: each keeps the tokens and gets the logits it gets alone."""
    model, pool = net(blocks=ALL, seed=seed % 5, NUM_TOKENS=num_tokens, SAMPLER=sampler), inputs(4, seed)
    with torch.no_grad():
        logits, trace = model.forward_tokens(pool[order])
        for place, i in enumerate(order):
            alone, trace_alone = model.forward_tokens(pool[i : i + 1])
            torch.testing.assert_close(logits[place], alone[0], rtol=0, atol=1e-10)
            for entry, entry_alone in zip(trace, trace_alone, strict=True):
                assert torch.equal(entry.patches[place], entry_alone.patches[0])


def test_dropped_tokens_are_gone_from_every_layer():
    """Linear layers behind a block that samples see what it kept; K is that of the network's block; none comes back."""
    budgets, seen = [1, 1, 20, 1, 12, 1], {}
    model = net(blocks=(2, 4), NUM_TOKENS=budgets)
    for key, module in model.trans_layers.named_modules():
        if key.endswith(("attn.proj", "mlp.fc1", "mlp.fc2", "norm1", "norm2")):
            module.register_forward_hook(
                lambda _, args, __, key=key: seen.__setitem__(key, args[0].flatten(0, -2).shape[0])
            )
    with torch.no_grad():
        _, trace = model.forward_tokens(inputs(4))
    assert [entry.block for entry in trace] == [2, 4]
    kept = [int(entry.num_tokens.sum()) for entry in trace]
    for entry, bound in zip(trace, (20, 12), strict=True):
        assert (entry.num_tokens <= bound).all()
        assert len(set(entry.num_tokens.tolist())) > 1
    for first, second in zip(trace[0].patches, trace[1].patches, strict=True):
        assert set(second.tolist()) < set(first.tolist()) < set(range(30))
    counts = {0: kept[0], 1: kept[0], 2: kept[1], 3: kept[1]}
    for layer, count in counts.items():
        assert {seen[f"{layer}.{name}"] for name in ("attn.proj", "norm2", "mlp.fc1", "mlp.fc2")} == {count}
    assert [seen[f"{layer}.norm1"] for layer in range(4)] == [4 * 31, kept[0], kept[0], kept[1]]


@pytest.mark.parametrize("blocks", [(), (2, 4)], ids=str)
def test_gradients_reach_every_parameter(blocks):
    """In training mode, the offsets' among them."""
    model, weight = net(blocks=blocks, NUM_TOKENS=0.7).train(), torch.randn(3, 7, dtype=torch.float64)
    (model(inputs(3)) * weight).sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_training_with_stochastic_depth_dropout_and_autocast():
    """Runs in half precision, where points stay in float32."""
    rates = {f"PSVIT.{key}_RATE": 0.3 for key in ("DROP", "ATTN_DROP", "DROP_PATH")}
    cfg = config(SMALL | rates | {"ATS.ENABLE": True, "ATS.BLOCKS": [2, 4], "MODEL.DROPOUT_RATE": 0.5})
    model, points = randomise(build_model(cfg)).train(), []
    for layer in model.ps_layers:
        layer.register_forward_hook(lambda _, __, out: points.append(out[2]))
    rates = [layer.transformer_layer.drop_path1 for layer in model.ps_layers]
    rates += [layer.drop_path1 for layer in model.trans_layers]
    assert [getattr(rate, "drop_prob", 0.0) for rate in rates] == pytest.approx([0.06 * i for i in range(6)])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(inputs().float())
    assert logits.isfinite().all()
    assert all(point.dtype == torch.float32 for point in points)
    logits.float().sum().backward()


def test_trains_resumes_and_evaluates(tiny_config, tmp_path):
    """The engine on this network: batch-norm statistics are averaged, saved and restored with the weights."""
    check_training(tiny_config, tmp_path, SMALL | {"MODEL.NAME": "PSViT", "ATS.BLOCKS": [2, 4], "ATS.NUM_TOKENS": 0.7})


def test_empty_batch():
    assert net(blocks=(2, 3))(inputs()[:0]).shape == (0, 7)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_images_harm_nobody_else(value):
    model, x = net(blocks=ALL), inputs(3)
    with torch.no_grad():
        good = model(x)
        x[1, 0, 3, 3] = value
        logits, trace = model.forward_tokens(x)
    torch.testing.assert_close(logits[[0, 2]], good[[0, 2]], rtol=0, atol=1e-10)
    assert all((entry.num_tokens >= 2).all() for entry in trace)


@pytest.mark.parametrize("blocks", [(), ALL, (3, 5)], ids=str)
@pytest.mark.parametrize("size", [32, 38])
def test_flops_equal_counter(size, blocks):
    """To the last multiply-add, dense and with ATS, also where the stem's sizes are rounded."""
    model = net(blocks=blocks, NUM_TOKENS=0.6, settings={"DATA.TRAIN_CROP_SIZE": size})
    x = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    count, trace = counted_multiply_adds(model, x)
    cost = gflops(model, trace, x.shape)
    assert cost.as_run.item() * 1e9 == pytest.approx(count, abs=0.5)
    if not blocks:
        assert cost.dense == cost.paper.item() == cost.as_run.item()
    else:
        assert cost.as_run.item() < cost.dense
        assert cost.paper.item() < cost.dense


def test_papers_accounting():
    """One ATS block: every query projected, all of N x N, dropped rows gone after that."""
    model, x = net(blocks=(5,), NUM_TOKENS=0.5), inputs(3)
    with torch.no_grad():
        _, trace = model.forward_tokens(x)
    cost, m = gflops(model, trace, x.shape), trace[0].num_tokens.double()
    saved = (31 - m) * (31 * 24 + 24 * 24 + 2 * 24 * 48)  # A V, output projection, MLP
    torch.testing.assert_close(cost.paper, cost.dense - saved / 1e9)


PUBLISHED = {
    # M parameters, GFLOPs; the release's counter adds 5 operations per value of a norm (0.02 to 0.05 GFLOPs).
    "PSViT_Ti_14": (4.778, 1.565),
    "PSViT_B_14": (21.34, 5.38),
    "PSViT_B_16": (21.34, 6.911),
    "PSViT_B_18": (21.34, 8.741),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("suffix", ["", "_ATS"])
def test_configs_have_the_published_size(name, suffix):
    path = ROOT / "configs" / "ImageNet" / f"{name}{suffix}.yaml"
    cfg = load_config(path)
    with torch.device("meta"):
        model = build_model(cfg)
    params, cost = PUBLISHED[name]
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(params, rel=1e-3)
    assert dense_gflops(model, (1, 3, 224, 224)) == pytest.approx(cost, rel=1e-3)
    assert all(isinstance(layer, ATSBlock) and layer.reduction for layer in model.trans_layers) == bool(suffix)
    text = path.read_text()
    assert f"--cfg configs/ImageNet/{path.name}" in text
    assert f"{cost} GFLOPs" in text
    assert f"{params} M" in text


@pytest.mark.parametrize("name", ["ti_14", "b_14", "b_16", "b_18"])
def test_released_keys_load(name):
    """Names and shapes of the released files fill the model strictly, with ATS too; position layers stored again with
    every iteration are recognised as the one they are.
    """
    about = json.loads((FIXTURES / "keys" / f"ps_vit_{name}.json").read_text())
    cfg = load_config(ROOT / "configs" / "ImageNet" / f"PSViT_{name[0].upper()}{name[1:]}_ATS.yaml")
    with torch.device("meta"):
        model = build_model(cfg)
    model.to_empty(device="cpu")
    state = {key: torch.full(shape, 0.5) for key, shape in about["keys"].items()}
    state["point_coord"] = model.first_points()
    assert sum(p.numel() for p in model.parameters()) == about["num_params"]
    load_weights(model, {"state_dict": state})
    assert all((value == 0.5).all() for value in model.parameters())
    assert torch.equal(model.point_coord, state["point_coord"])
    state["ps_layers.1.position_layer.bias"] = torch.ones(model.pos_layer.bias.shape)
    with pytest.raises(UserError, match=r"1 keys unexpected: ps_layers.*position_layer\.bias"):
        load_weights(model, state)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("PSViT_Ti_14", "lr: 0.001\nweight_decay: 0.03\ndrop: 0.0\nmixup: 0.8\nreprob: 0.25\nwarmup_epochs: 5"),
        ("PSViT_B_14", "lr: 5e-4\nweight_decay: 0.05"),
        ("PSViT_B_16", "lr: 5e-4\nweight_decay: 0.05"),
        ("PSViT_B_18", "lr: 5e-4\nweight_decay: 0.05"),
    ],
)
def test_the_releases_yaml_is_our_config(name, text, tmp_path):
    """Its few keys and what its main.py does where they say nothing; we take 16 GPUs for its unknown number of them."""
    path = tmp_path / "theirs.yaml"
    path.write_text(f"model: {name.lower().replace('psvit', 'ps_vit')}\nbatch_size: 64\nimg_size: 224\n{text}\n")
    theirs, ours = load_config(path), load_config(ROOT / "configs" / "ImageNet" / f"{name}.yaml")
    assert ours.TRAIN.BATCH_SIZE == 16 * theirs.TRAIN.BATCH_SIZE
    for section in ("MODEL", "PSVIT", "SOLVER", "AUG", "MIXUP", "EMA", "DATA"):
        assert ours[section] == theirs[section], section


def test_points_follow_the_image_size(caplog):
    """Weights of another image size: everything is taken but the points, which are laid out anew."""
    large = build_model(config(SMALL | {"DATA.TRAIN_CROP_SIZE": 64}))
    points = large.point_coord.clone()
    caplog.set_level("INFO")
    load_weights(large, net(dtype=torch.float32).state_dict())
    assert torch.equal(large.point_coord, points)
    assert "using the points for 64 pixels" in caplog.text
    with pytest.raises(UserError, match=r"takes images \[B, 3, 64, 64\], not \[2, 3, 32, 32\]"):
        large(inputs().float())


def test_layer_decay_knows_the_order_of_the_layers():
    layers = group_parameters(net(), net().group_matcher(), reverse=True)
    names = ["stem.0.weight", *(f"ps_layers.{i}.transformer_layer.norm1.weight" for i in range(2))]
    names += [f"trans_layers.{i}.norm1.weight" for i in range(4)]
    assert [layers[name] for name in names] == list(range(7))
    assert layers["cls_token"] == layers["trans_layers.0.norm1.weight"]
    assert layers["head.weight"] > layers["norm.weight"] == 6


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"ATS.ENABLE": True, "ATS.BLOCKS": [1, 3]}, "Blocks that can sample: 2 to 5"),
        ({"ATS.ENABLE": True, "ATS.BLOCKS": [6]}, "block 6 does not exist"),
        ({"ATS.ENABLE": True, "PSVIT.NUM_ITERS": 6}, "blocks 0 to 5 of PS-ViT move the points"),
        ({"PSVIT.NUM_POINTS": [14]}, "PSVIT.NUM_POINTS [14]: give 2 numbers"),
        ({"PSVIT.STEM_DIMS": [64, 64]}, "PSVIT.STEM_DIMS [64, 64]: give 3 numbers"),
        ({"PSVIT.POINT_GRADIENT": "release"}, "choose from released, grid_sample. Did you mean released?"),
        ({"PSVIT.NUM_ITERS": 7}, "PSVIT.NUM_ITERS 7: give 1 to PSVIT.DEPTH, 6"),
        ({"PSVIT.NUM_HEADS": 5}, "PSVIT.EMBED_DIM 24 is not a multiple of PSVIT.NUM_HEADS 5"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_configs_are_named(settings, text):
    with pytest.raises(UserError) as error:
        build_model(config(SMALL | settings))
    assert text in str(error.value)


def test_unknown_point_gradient_is_named_without_a_config_too():
    with pytest.raises(UserError, match=r"PSVIT\.POINT_GRADIENT true: choose from released, grid_sample"):
        PSViT(point_gradient="true")
