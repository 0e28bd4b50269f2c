"""ats.visualize: pictures show what was kept and scored, in the right place, for every family."""

from __future__ import annotations

import pytest
import test_cvt
import test_mvit
import test_psvit
import test_timm_config
import torch
from helpers import clips, randomise, video_model
from test_models import small_vit
from test_rivals import pictures, tiny
from torch import nn

from ats.checkpoint import save_safetensors
from ats.config import get_cfg, load_config
from ats.datasets import Sample
from ats.errors import UserError
from ats.models import build_model
from ats.models.block import ats_blocks
from ats.reduction.evit import EViT
from ats.visualize import draw, draw_fixed_images, fade, heat, look
from ats.visualize.compare import Networks
from ats.visualize.figures import draw_strip
from ats.visualize.pictures import FADED, GONE, RAMP

ATS_ON = ("ATS.ENABLE", True, "ATS.NUM_TOKENS", 20)
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def timm_model(*overrides: object, small: str = test_timm_config.SMALL) -> nn.Module:
    cfg = test_timm_config.config("deit3_small_patch16_224", *overrides, small=small)
    return randomise(build_model(cfg)).double().eval()


# A network and its input, of every family and every way of placing tokens.
FAMILIES = {
    "vit": lambda: (small_vit(num_tokens=20), IMAGES),
    "vit static": lambda: (small_vit(num_tokens=20, layout="static"), IMAGES),
    "distilled": lambda: (small_vit(num_tokens=20, distilled=True), IMAGES),
    "timm": lambda: (timm_model(), IMAGES),
    "xvit": lambda: (video_model("xvit", *ATS_ON), clips(2)),
    "xvit shared": lambda: (video_model("xvit", *ATS_ON, "ATS.SHARE_FRAMES", True), clips(2)),
    "divided": lambda: (video_model("divided", *ATS_ON), clips(2)),
    "joint": lambda: (video_model("joint", "ATS.ENABLE", True, "ATS.NUM_TOKENS", 150), clips(2)),
    "space only": lambda: (video_model("space_only", *ATS_ON), clips(2)),
    "mvit": lambda: (test_mvit.net("v1", blocks=(2, 4), NUM_TOKENS=30), test_mvit.inputs("v1")),
    "mvit image": lambda: (test_mvit.net("v1 image", blocks=(2, 4), NUM_TOKENS=8), test_mvit.inputs("v1 image")),
    "mvit no CLS": lambda: (test_mvit.net("v2 no CLS", blocks=(2, 3), NUM_TOKENS=30), test_mvit.inputs("v2 no CLS")),
    "cvt": lambda: (test_cvt.net("released", blocks=(1, 3), NUM_TOKENS=8), test_cvt.inputs("released")),
    "cvt odd grid": lambda: (test_cvt.net("odd grid", blocks=(1, 3), NUM_TOKENS=8), test_cvt.inputs("odd grid")),
    "psvit": lambda: (test_psvit.net(blocks=(2, 4), NUM_TOKENS=12), test_psvit.inputs()),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_views_are_the_trace(name):
    """Counts and kept cells match the trace, scores are a distribution over the tokens present before, and looking
    changes neither the numbers nor the network.
    """
    model, x = FAMILIES[name]()
    with torch.no_grad():
        want, want_trace = model.forward_tokens(x)
    logits, trace, views = look(model, x)
    assert torch.equal(logits, want)
    assert not any(block.record_scores for block in ats_blocks(model))
    assert [view.block for view in views] == [entry.block for entry in want_trace]
    before = None
    for entry, view in zip(trace, views, strict=True):
        counts = (entry.num_tokens - entry.num_prefix_tokens).reshape(len(x), -1).sum(1)
        assert torch.equal(view.num_kept, counts)
        assert len(view.kept) == len(view.scores) == len(x)
        assert view.kept.shape[1] in (1, 4, 8)
        assert (view.num_kept < view.num_tokens).any()
        scored = ~view.scores.isnan()
        assert (view.scores[scored] >= 0).all()
        if name != "psvit":  # whose discs are cells of many pixels
            assert torch.equal(view.kept.flatten(1).sum(1), view.num_kept)
            assert view.kept[0].numel() == view.num_tokens
            num_sequences = len(entry.num_tokens) // len(x)
            torch.testing.assert_close(
                view.scores.nan_to_num().flatten(1).sum(1), torch.full((len(x),), float(num_sequences))
            )
        if before is not None and view.scores.shape == before.shape and name not in ("cvt", "cvt odd grid"):
            assert torch.equal(scored, before)  # a block scores what the one before it kept
        if view.scores.shape == view.kept.shape:
            assert not (view.kept & ~scored).any()
            before = view.kept
        picture = x[:, :, None] if x.ndim == 4 else x
        faded = fade(picture[0].float(), view.kept[0])
        assert faded.shape == heat(view.scores[0], picture.shape[2:]).shape == picture.shape[1:]


@pytest.mark.parametrize("name", ["vit", "timm", "joint", "space only", "xvit", "divided"])
def test_scores_lie_where_the_patch_is(name):
    """In the first block, with one head, changing a patch changes only its own score relative to the others, because
    softmax keeps all other ratios. (In X-ViT and the divided TimeSformer: also those at its position in other frames.)
    """
    ats, x = ("ATS.ENABLE", True, "ATS.BLOCKS", [0], "VIT.NUM_HEADS", 1), clips(1)
    if name == "timm":
        model, x = timm_model(*ats, small=test_timm_config.SMALL.replace("num_heads, 3", "num_heads, 1")), IMAGES[:1]
    elif name == "vit":
        cfg = get_cfg()
        cfg.merge_from_list(["VIT.IMG_SIZE", 32, "VIT.PATCH_SIZE", 4, "VIT.EMBED_DIM", 32, "VIT.DEPTH", 2, *ats])
        model, x = randomise(build_model(cfg)).double().eval(), IMAGES[:1]
    else:
        model = video_model(name.replace(" ", "_"), *ats)
    grid = 4 if name == "timm" else 8
    time, row, column = (0 if x.ndim == 4 else 5), 1, grid - 2
    changed, step = x.clone(), 32 // grid
    area = (..., slice(row * step, (row + 1) * step), slice(column * step, (column + 1) * step))
    (changed if x.ndim == 4 else changed[:, :, time])[area] += 2.0
    scores, others = (look(model, inputs)[2][0].scores[0].double() for inputs in (x, changed))
    ratio = others / scores
    moved = (ratio / ratio.flatten(1).median(dim=1).values[:, None, None] - 1).abs() > 1e-4
    assert moved[time, row, column]
    moved[:, row, column] = False if name in ("xvit", "divided") else moved[:, row, column]
    assert moved.sum() == (0 if name in ("xvit", "divided") else 1)


def test_points_are_drawn_where_they_are():
    """Points without offsets form a grid, y fastest: the centre of each disc shows whether the point was kept."""
    model, x = test_psvit.net(blocks=(2,), NUM_TOKENS=12), test_psvit.inputs()
    for layer in model.ps_layers:
        if layer.offset_layer is not None:
            nn.init.zeros_(layer.offset_layer.weight)
            nn.init.zeros_(layer.offset_layer.bias)
    _, [entry], [view] = look(model, x)
    rows, columns = model.num_points
    side = view.kept.shape[-1]
    for kept, patches in zip(view.kept[:, 0], entry.patches, strict=True):
        for point in range(rows * columns):
            y, x_ = (point % rows + 0.5) / rows, (point // rows + 0.5) / columns
            assert kept[int(y * side), int(x_ * side)] == (point in patches.tolist())
        assert not kept[0, 0]  # between the discs there is nothing


def test_blocks_without_scores_are_grey():
    """EViT has a picture of kept tokens but not of scores; its fused token has no position."""
    model = small_vit()
    for block in ats_blocks(model):
        block.reduction = EViT(block.index, keep_rate=0.5)
    trace, views = look(model, IMAGES)[1:]
    for entry, view in zip(trace, views, strict=True):
        assert [int(kept.sum()) for kept in view.kept] == [len(patches) for patches in entry.patches]
        assert bool(view.scores.isnan().all())
        assert (heat(view.scores[0], (1, 32, 32)) == GONE).all()


def test_unknown_networks_are_refused_by_name():
    class Mine(nn.Module):
        pass

    with pytest.raises(UserError, match="tokens of a Mine lie"):
        look(Mine(), IMAGES)


def test_fade_and_heat():
    """Kept cells stay, others fade, in time too; the highest score gets the last colour, a missing one grey."""
    picture, kept = torch.rand(3, 4, 8, 8), torch.zeros(2, 2, 2, dtype=torch.bool)
    kept[1, 0, 1] = True
    shown = fade(picture, kept)
    assert torch.equal(shown[:, 2:, :4, 4:], picture[:, 2:, :4, 4:])
    torch.testing.assert_close(shown[:, :2], picture[:, :2] * FADED + 1 - FADED)
    scores = torch.tensor([[[0.0, 0.25], [torch.nan, 1.0]]])
    colours = heat(scores, (1, 2, 2))[:, 0]
    torch.testing.assert_close(colours[:, 1, 1], torch.tensor(RAMP[-1]) / 255)
    torch.testing.assert_close(colours[:, 0, 0], torch.tensor(RAMP[0]) / 255)
    torch.testing.assert_close(colours[:, 0, 1], torch.tensor(RAMP[len(RAMP) // 2]) / 255)
    assert (colours[:, 1, 0] == GONE).all()
    assert not heat(torch.zeros(1, 2, 2), (1, 4, 4)).isnan().any()


@pytest.mark.parametrize("name", ["vit", "timm", "xvit", "mvit", "cvt", "psvit"])
def test_tensorboard_gets_a_picture_of_every_family(name):
    """One row for an image; for a clip a row each for frames, significance, first and last block."""
    model, x = FAMILIES[name]()
    dataset = [Sample(sample, 0, i, "") for i, sample in enumerate(x)]
    model.train()
    picture = draw_fixed_images(model, dataset, 2, mean=(0.5,) * 3, std=(0.25,) * 3)
    assert model.training
    num_blocks = len(look(model.eval(), x)[2])
    wide, high = (2 + num_blocks, 2) if x.ndim == 4 else (8, 2 * 4)
    assert picture.shape == (3, 32 * high, 32 * wide)
    assert picture.min() >= 0
    assert picture.max() <= 1


def test_tensorboard_goes_on_without_a_picture():
    """An unknown network, one without ATS, or no samples do not stop training."""
    dataset = [Sample(IMAGES[0], 0, 0, "")]

    class Mine(nn.Linear):
        pass

    assert draw_fixed_images(Mine(2, 2), dataset, 1, mean=(0.5,) * 3, std=(0.25,) * 3) is None
    assert draw_fixed_images(small_vit(ats=False), dataset, 1, mean=(0.5,) * 3, std=(0.25,) * 3) is None
    assert draw_fixed_images(small_vit(), [], 1, mean=(0.5,) * 3, std=(0.25,) * 3) is None


def test_networks_are_the_same_but_for_ats(tiny_config, tmp_path):
    """Dense and ATS guesses equal those of two networks with the same weights; confidence is the softmax value."""
    cfg = load_config(tiny_config, ["TEST.CHECKPOINT_FILE_PATH", str(tmp_path / "w.safetensors"), "DEVICE", "cpu"])
    model = randomise(build_model(cfg)).eval()
    save_safetensors(tmp_path / "w.safetensors", model.state_dict())
    dense = build_model(load_config(tiny_config, ["ATS.ENABLE", "False"])).eval()
    dense.load_state_dict(model.state_dict())
    x = IMAGES.float()
    with torch.no_grad():
        want = [network(x).softmax(1) for network in (dense, model)]
    views = Networks(cfg).compare(x)
    for i, view in enumerate(views):
        for guess, probability in zip((view.dense, view.ats), want, strict=True):
            assert guess.label == probability[i].argmax()
            assert guess.confidence == pytest.approx(probability[i].max().item(), abs=1e-6)
        assert 0 < view.gflops < view.dense_gflops
    torch.testing.assert_close(views[0].picture[:, 0], views[0].picture.clamp(0, 1)[:, 0])
    path = draw_strip(tmp_path / "a.png", views[0], title="a", names=["a very long name of a class, or two"] * 4)
    assert path.stat().st_size > 5000


@torch.no_grad()
def test_merged_patches_are_drawn_as_groups():
    """Those that one token stands for have their mean colour; a network that drops has no groups."""
    model, x = tiny("ATS.ENABLE", True, "ATS.SAMPLER", "tome", "TOME.R", 9), pictures(2)
    _, _, views = look(model, x)
    picture = x[:, :, None].float().sigmoid()
    for view, left in zip(views, (55, 46, 37, 28), strict=True):  # of 64
        assert view.num_kept.tolist() == [left, left]
        assert [len(own.unique()) for own in view.groups] == [left, left]
        blended = draw(picture, view)
        own = view.groups[1, 0].repeat_interleave(4, 0).repeat_interleave(4, 1)  # cells of 4 pixels
        largest = own == own.flatten().mode().values
        inner = largest & (own == own.roll(1, 0)) & (own == own.roll(1, 1))  # no line
        colour = blended[1, :, 0][:, inner]
        assert torch.allclose(
            colour, picture[1, :, 0][:, largest].mean(dim=1, keepdim=True).expand_as(colour), atol=1e-6
        )
    assert look(tiny("ATS.ENABLE", True, "ATS.NUM_TOKENS", 20), x)[2][0].groups is None
    assert look(tiny("ATS.ENABLE", True, "ATS.SAMPLER", "ppt", "PPT.R", 9), x)[2][0].groups is None
    pooled = look(tiny("ATS.ENABLE", True, "ATS.SAMPLER", "evit"), x)[2][0].groups  # the others are one group
    assert pooled.flatten().bincount().max() > 10
