"""X-ViT: golden numbers of the release, the shift in time on packed tokens, released checkpoints, configuration."""

from __future__ import annotations

import pytest
import torch
from helpers import build_empty, check_golden, clips, golden_config, released_state, video_model
from hypothesis import given, settings
from hypothesis import strategies as st

from ats.checkpoint import load_weights
from ats.config import get_cfg
from ats.errors import UserError
from ats.flops import dense_gflops
from ats.models import build_model
from ats.models.vit import VisionTransformer
from ats.models.xvit import neighbours, shift_frames, shift_tokens
from ats.tokens import RaggedTokens


def build(*overrides: object) -> torch.nn.Module:
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.NAME", "XViT", *overrides])
    return build_model(cfg)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", ["xvit_vithead_t8_seg4", "xvit_avg_t4_aftersoftmax"])
def test_golden(name, dtype):
    """Two segments of four frames with the temporal head; four frames whose probabilities are averaged."""
    c = golden_config(name)
    model = build(
        "MODEL.NUM_CLASSES", c["classes"], "MODEL.DROPOUT_RATE", c["dropout"], "DATA.NUM_FRAMES", c["frames"],
        "VIT.IMG_SIZE", c["crop"], "VIT.PATCH_SIZE", c["patch_size"], "VIT.EMBED_DIM", c["embed_dim"],
        "VIT.DEPTH", c["depth"], "VIT.NUM_HEADS", c["num_heads"], "XVIT.TEMPORAL_EMBED_LEN", c["num_frames"],
        "XVIT.NUM_SEGMENTS", c["num_segments"], "XVIT.SHIFT_DIV", c["shift_div"], "XVIT.LOCATIONS_LIST", c["locations"],
        "XVIT.CONSENSUS_TYPE", c["consensus"], "XVIT.BEFORE_SOFTMAX", c["before_softmax"],
        "TEMPORAL_HEAD.NUM_ATTENTION_HEADS", c["thead_heads"], "TEMPORAL_HEAD.NUM_HIDDEN_LAYERS", c["thead_layers"],
        "TEMPORAL_HEAD.MLP_DIM", c["thead_mlp"],
    )  # fmt: skip
    check_golden(name, model, dtype)


def test_shift_of_dense_frames():
    """Channel by channel: the first two from the next frame, the next two from the previous one, zeros at the ends."""
    x = torch.arange(2 * 3 * 2 * 8, dtype=torch.float32).reshape(6, 2, 8) + 1  # two segments of three frames
    shifted = shift_frames(x, frames=3, fold=2)
    for frame in range(6):
        following = x[frame + 1, :, :2] if frame % 3 < 2 else torch.zeros(2, 2)
        preceding = x[frame - 1, :, 2:4] if frame % 3 > 0 else torch.zeros(2, 2)
        assert torch.equal(shifted[frame], torch.cat([following, preceding, x[frame, :, 4:]], dim=1))


@given(st.integers(0, 10**6), st.sampled_from([1, 2, 4]), st.sampled_from([0, 1, 2, 3, 7]))
@settings(max_examples=25)
def test_shift_of_packed_tokens(seed, frames, fold):
    """What scattering to the grid with zeros, shifting and gathering gives, for any kept sets; gradients too."""
    generator = torch.Generator().manual_seed(seed)
    dense = RaggedTokens.from_dense(torch.randn(8, 5, 7, generator=generator), 1, frames_per_clip=frames)
    mask = torch.rand(8, 5, generator=generator) < 0.6
    mask[:, 0] = True
    tokens, _ = dense.keep(mask, max_tokens=5)
    x = tokens.x.requires_grad_()
    want = tokens.from_grid(shift_frames(tokens.to_grid(x), frames=frames, fold=fold))
    got = shift_tokens(x, *neighbours(tokens), fold=fold)
    assert torch.equal(got, want)
    weight = torch.randn(want.shape, generator=generator)
    assert torch.equal(*(torch.autograd.grad((t * weight).sum(), x)[0] for t in (got, want)))


def test_frames_see_their_segment_alone():
    """A frame changes what its neighbours keep, and nothing in another segment; without shift, nothing but itself."""
    x = clips(1)
    other = x.clone()
    other[:, :, 2] = clips(1, seed=1)[:, :, 2]
    for shift, may_change in ((True, {0, 1, 2, 3}), (False, {2})):
        model = video_model("xvit", "ATS.ENABLE", True, "XVIT.USE_XVIT", shift)
        with torch.no_grad():
            kept, kept_other = (model.forward_tokens(clip)[1][1].patches for clip in (x, other))
        changed = {i for i in range(8) if kept[i].tolist() != kept_other[i].tolist()}
        assert {2} <= changed <= may_change
        assert len(changed) > 1 or not shift


def test_shift_of_all_channels():
    """XVIT.SHIFT_DIV 1: everything comes from the next frame and nothing is left for the previous one."""
    x = torch.randn(4, 2, 8)
    shifted = shift_frames(x, frames=2, fold=8)
    assert torch.equal(shifted[::2], x[1::2])
    assert not shifted[1::2].any()
    assert video_model("xvit", "ATS.ENABLE", True, "XVIT.SHIFT_DIV", 1)(clips(1)).shape == (1, 7)


@pytest.mark.parametrize("locations", [[], [4, 5]], ids=str)
def test_no_block_that_shifts_is_a_network_without_shift(locations, caplog):
    """As in the reference, whose default list begins at block 9; one line says so."""
    shifts_nowhere = video_model("xvit", "XVIT.LOCATIONS_LIST", locations)
    with torch.no_grad():
        assert torch.equal(shifts_nowhere(clips(1)), video_model("xvit", "XVIT.USE_XVIT", False)(clips(1)))
    assert f"XVIT.LOCATIONS_LIST {locations} names none of the blocks 0 to 3: no block shifts" in caplog.text


def test_classifier_in_front_of_the_temporal_head():
    """The release has one without dropout, and works then if it is square: as many classes as channels."""
    options = ["MODEL.NUM_CLASSES", 32, "MODEL.DROPOUT_RATE"]
    model, without = video_model("xvit", *options, 0.0), video_model("xvit", *options, 0.5)
    extra = model.state_dict().keys() - without.state_dict().keys()
    assert extra == {"base_model.head.weight", "base_model.head.bias"}
    without.load_state_dict({key: value for key, value in model.state_dict().items() if key not in extra})
    frames = without.base_model.forward_tokens(clips(2))[0].unflatten(0, (2, 8))
    want = model.consensus(model.base_model.head(frames))
    torch.testing.assert_close(model(clips(2)), want, rtol=0, atol=1e-12)
    assert (want - without(clips(2))).abs().max() > 1e-3
    assert "base_model.head.weight" not in video_model("xvit", "MODEL.DROPOUT_RATE", 0.0).state_dict()


def test_the_order_of_frames_matters():
    model, x = video_model("xvit", "ATS.ENABLE", True), clips(1)
    with torch.no_grad():
        assert (model(x) - model(x.flip(2))).abs().max() > 1e-3


def test_another_crop_resizes_the_positions():
    """Bicubic without anti-aliasing at run time, as in the release; the same as weights are loaded."""
    model = video_model("xvit").base_model
    want = torch.nn.functional.interpolate(
        model.pos_embed[:, 1:].reshape(1, 8, 8, 32).permute(0, 3, 1, 2), (12, 10), mode="bicubic", align_corners=False
    )
    got = model.positions((12, 10))
    assert torch.equal(got[:, 1:].reshape(1, 12, 10, 32), want.permute(0, 2, 3, 1))
    assert torch.equal(got[:, :1], model.pos_embed[:, :1])
    larger = video_model("xvit", "VIT.IMG_SIZE", 48)
    load_weights(larger, video_model("xvit").state_dict())
    torch.testing.assert_close(larger.base_model.pos_embed, model.positions((12, 12)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["XVIT_B16_16x16_K400", "XVIT_B16_16_SSv2"])
def test_released_checkpoints(name, caplog):
    """Keys, wrapper, size and GFLOPs of the release; its classifier without use is named and left out."""
    state, about = released_state(name)
    caplog.set_level("INFO")
    model = build_empty(
        "MODEL.NAME", "XViT", "MODEL.NUM_CLASSES", len(state["model_state"]["new_fc.bias"]), "MODEL.DROPOUT_RATE", 0.5,
        "DATA.NUM_FRAMES", 16, "ATS.ENABLE", True,
    )  # fmt: skip
    load_weights(model, state)
    assert all((value == 0.5).all() for value in model.state_dict().values())
    assert "Not used by this network: new_fc.weight, new_fc.bias." in caplog.text
    unused = sum(value.numel() for key, value in state["model_state"].items() if key.startswith("new_fc."))
    assert sum(p.numel() for p in model.parameters()) == about["num_parameters"] - unused
    assert dense_gflops(model, tuple(about["input"])) == pytest.approx(about["gmacs_per_view"], abs=0.01)


def test_an_image_network_starts_a_training(caplog):
    """Weights of a ViT fill the backbone; what it does not have stays as it is and is named."""
    vit = VisionTransformer(img_size=(32, 32), patch_size=4, embed_dim=32, depth=4, num_heads=4, mlp_ratio=2)
    torch.nn.init.normal_(vit.pos_embed)
    model = video_model("xvit", "ATS.ENABLE", True, dtype=torch.float32)
    fresh = {key: value.clone() for key, value in model.state_dict().items()}
    load_weights(model, {"model": vit.state_dict()})
    for key, value in model.state_dict().items():
        want = vit.state_dict().get(key.removeprefix("base_model."))
        assert torch.equal(value, fresh[key] if want is None or key.startswith("consensus.") else want)
    assert "left as initialised: base_model.temp_embed, consensus.cls_token" in caplog.text
    state = vit.state_dict()
    del state["blocks.1.norm1.weight"]
    with pytest.raises(UserError, match="keys missing"):
        load_weights(model, state)


def test_another_number_of_classes():
    """The file's number is named; with TRAIN.RESET_HEAD only the last layer stays fresh."""
    state = video_model("xvit").state_dict()
    model = video_model("xvit", "MODEL.NUM_CLASSES", 5, seed=1)
    with pytest.raises(UserError, match=r"set MODEL\.NUM_CLASSES 7"):
        load_weights(model, state)
    load_weights(model, state, skip=model.head_keys)
    assert torch.equal(model.consensus.mlp_head[1].weight, state["consensus.mlp_head.1.weight"])


@pytest.mark.parametrize(
    ("overrides", "text"),
    [
        (["DATA.NUM_FRAMES", 12], "DATA.NUM_FRAMES 12 is not a multiple of XVIT.NUM_SEGMENTS 8"),
        (["XVIT.TEMPORAL_EMBED_LEN", 3], "DATA.NUM_FRAMES 8 is not a multiple of XVIT.TEMPORAL_EMBED_LEN 3"),
        (["XVIT.NUM_SEGMENTS", 0], "XVIT.NUM_SEGMENTS 0: give a number from 1"),
        (["XVIT.SHIFT_DIV", 0], "XVIT.SHIFT_DIV 0: give a number from 1"),
        (["XVIT.BEFORE_SOFTMAX", False], "XVIT.BEFORE_SOFTMAX False needs XVIT.CONSENSUS_TYPE avg"),
        (["XVIT.CONSENSUS_TYPE", "identity"], "choose from vit, avg"),
        (["TEMPORAL_HEAD.NUM_ATTENTION_HEADS", 7], "not a multiple of TEMPORAL_HEAD.NUM_ATTENTION_HEADS 7"),
        (["VIT.DISTILLED", True], "MODEL.NAME XViT has no distillation token"),
    ],
)
def test_wrong_configs_are_named(overrides, text):
    with pytest.raises(UserError) as error:
        build(*overrides)
    assert text in str(error.value)


def test_clips_of_another_length():
    """The backbone takes any number of whole segments; others are refused with the key to change."""
    model = video_model("xvit")
    assert model(torch.cat([clips(1), clips(1, seed=1)], dim=2)).shape == (1, 7)
    with pytest.raises(
        UserError, match=r"Clips of 6 frames: DATA\.NUM_FRAMES must be a multiple of XVIT\.NUM_SEGMENTS 4"
    ):
        model(clips(1)[:, :, :6])
