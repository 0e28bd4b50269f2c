"""ats.datasets.transforms of clips: SlowFast's crops, one draw per clip, timm's augmentation."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import noise
from torchvision.transforms.v2 import RandomCrop

from ats.config import load_config
from ats.datasets.transforms import (
    Augmentation,
    eval_clip_transform,
    fix_posterize,
    normalise,
    resize_short_side,
    train_clip_transform,
)
from ats.errors import UserError

FOLDER = Path(__file__).parents[1] / "fixtures" / "video_data_path"
GOLDEN = json.loads((FOLDER / "case.json").read_text())
SIZE = 32


@pytest.mark.parametrize("name", GOLDEN["spatial"]["cases"])
@pytest.mark.parametrize("crop", [0, 1, 2])
def test_test_crops_are_slowfasts(name, crop):
    case, arrays = GOLDEN["spatial"]["cases"][name], np.load(FOLDER / "arrays.npz")
    frames = arrays[f"{name}.video_uint8_THWC"]
    settings = {"mean": case["mean"], "std": case["std"]}
    clip = eval_clip_transform(case["crop"], short_side=case["short_side"], crop=crop, **settings)(frames)
    expected = torch.from_numpy(arrays[f"{name}.crop{crop}_CTHW"])
    torch.testing.assert_close(clip, expected, rtol=0, atol=1e-5)
    resized = resize_short_side(normalise(frames, **settings), case["short_side"])
    assert list(resized.shape[2:]) == case["per_crop"][crop]["resized_hw"]


WHOLE = Augmentation(scale=(1, 1), ratio=(1, 1), hflip=0.0)
FAMILIES = {
    "TimeSformer": (Augmentation(), {"jitter_scales": (36, 44)}),
    "MViT": (Augmentation(scale=(0.08, 1), auto_augment="rand-m7-n4-mstd0.5-inc1", re_prob=1.0), {}),
    "XViT": (Augmentation(auto_augment="v0"), {"multi_scales": (1, 0.875, 0.75, 0.66)}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_one_draw_for_all_frames(family):
    """All frames of a static clip stay equal; different seeds give different clips."""
    frames = np.repeat(np.stack(noise(1)), 5, axis=0)
    augmentation, scales = FAMILIES[family]
    transform = train_clip_transform(SIZE, augmentation._replace(re_mode="const"), **scales)
    clips = []
    for seed in range(8):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)  # noqa: NPY002
        clips.append(transform(frames))
        assert clips[-1].shape == (3, 5, SIZE, SIZE)
        assert clips[-1].is_contiguous()
        assert torch.equal(clips[-1], clips[-1][:, :1].expand(3, 5, SIZE, SIZE))
    assert not any(torch.equal(clips[0], other) for other in clips[1:])


def test_erased_rectangle_is_the_same_in_all_frames():
    """The noise differs, as in SlowFast."""
    transform = train_clip_transform(SIZE, WHOLE._replace(re_prob=1.0))
    frames = np.zeros((5, SIZE, SIZE, 3), np.uint8)
    clip = transform(frames)
    erased = (clip - normalise(frames)).abs().amax(0) > 0
    assert 0 < erased[0].sum() < SIZE * SIZE
    assert (erased == erased[0]).all()
    assert not torch.equal(clip[:, 0], clip[:, 1])


def test_crops_cut_what_they_say():
    """Each pixel encodes its position, so a crop shows where it comes from."""
    y, x = np.mgrid[:48, :64].astype(np.uint8)
    frames = np.stack([y, x, np.zeros_like(x)], axis=-1)[None]
    plain = {"augmentation": Augmentation(hflip=0.0), "mean": (0, 0, 0), "std": (1 / 255,) * 3}
    jitter = train_clip_transform(SIZE, jitter_scales=(48, 48), **plain)
    for _ in range(10):
        clip = jitter(frames)
        torch.testing.assert_close(clip[0, 0], clip[0, 0, :1, :1] + torch.arange(32.0)[:, None].expand(32, 32))
        torch.testing.assert_close(clip[1, 0], clip[1, 0, :1, :1] + torch.arange(32.0).expand(32, 32))
    multi = train_clip_transform(24, multi_scales=(1, 0.5), **plain)
    sides = {round(float(clip[0, 0, -1, 0] - clip[0, 0, 0, 0])) for clip in (multi(frames) for _ in range(40))}
    assert all(min(abs(side - full) for full in (22, 47)) <= 2 for side in sides)
    assert max(sides) - min(sides) > 20
    flips = [
        float(train_clip_transform(SIZE, Augmentation(), jitter_scales=(48, 48))(frames)[1, 0, 0].diff()[0]) > 0
        for _ in range(20)
    ]
    assert 0 < sum(flips) < 20


def thin(height: int, width: int) -> np.ndarray:
    return np.stack(noise(1, height=height, width=width))


@pytest.mark.parametrize(("height", "width"), [(3, 60), (60, 3), (1, 50)])
def test_thin_clips_are_cropped_before_they_are_resized(height, width, monkeypatch):
    """With the same result, up to rounding, as when a clip is resized as a whole, in evaluation and in training."""
    transforms = [eval_clip_transform(SIZE, short_side=40, crop=crop) for crop in (0, 1, 2)]
    transforms.append(train_clip_transform(SIZE, Augmentation(), jitter_scales=(36, 44)))
    clips = []
    for max_aspect in (8, 1000):
        monkeypatch.setattr("ats.datasets.transforms.MAX_CLIP_ASPECT", max_aspect)
        random.seed(0), torch.manual_seed(0)
        clips.append([transform(thin(height, width)) for transform in transforms])
    for cropped, whole in zip(*clips, strict=True):
        torch.testing.assert_close(cropped, whole, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("height", "width"), [(2, 400_000), (400_000, 2)])
def test_thin_clips_do_not_fill_the_memory(height, width):
    """Resized to a short side of 256 as a whole, one frame would have 157 GB."""
    for transform in (eval_clip_transform(224, short_side=256), train_clip_transform(224, Augmentation())):
        clip = transform(thin(height, width))
        assert clip.shape == (3, 1, 224, 224)
        assert clip.isfinite().all()


def test_ordinary_clips_are_resized_as_a_whole():
    """Bit for bit, with torchvision's random numbers for the place of the crop."""
    transform, frames = train_clip_transform(SIZE, Augmentation(hflip=0.0), jitter_scales=(36, 44)), noise(2, width=90)
    for seed in range(5):
        random.seed(seed), torch.manual_seed(seed)
        clip = transform(np.stack(frames))
        random.seed(seed), torch.manual_seed(seed)
        resized = resize_short_side(normalise(np.stack(frames)), round(random.uniform(36, 44)))
        assert torch.equal(clip, RandomCrop(SIZE)(resized))


def test_augmentation_is_timms():
    """Each frame equals timm's policy with the same random numbers."""
    from PIL import Image
    from timm.data.auto_augment import rand_augment_transform

    frames = np.stack(noise(3, height=32, width=32))
    policy = "rand-m7-n4-mstd0.5-inc1"
    transform = train_clip_transform(32, WHOLE._replace(auto_augment=policy), mean=(0, 0, 0), std=(1 / 255,) * 3)
    timms = rand_augment_transform(policy, {"translate_const": 14, "interpolation": Image.Resampling.BICUBIC})
    fix_posterize(timms)
    for seed in range(5):
        random.seed(seed), np.random.seed(seed)  # noqa: NPY002
        clip = transform(frames)
        for t in range(3):
            random.seed(seed), np.random.seed(seed)  # noqa: NPY002
            expected = np.asarray(timms(Image.fromarray(frames[t])))
            np.testing.assert_allclose(clip[:, t].permute(1, 2, 0).numpy(), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("augmentation", "match"),
    [
        (Augmentation(), r"TRAIN_JITTER_SCALES must be.*32 <= low <= high"),
        (Augmentation(scale=(0.5, 0.2)), r"TRAIN_JITTER_SCALES_RELATIVE"),
        (Augmentation(scale=(0.5, 1), auto_augment="rand-x9"), r"AUG\.AA_TYPE 'rand-x9'"),
    ],
)
def test_contradictory_settings(augmentation, match):
    with pytest.raises(UserError, match=match):
        train_clip_transform(SIZE, augmentation, jitter_scales=(20, 40))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("DATA.TRAIN_JITTER_SCALES", [40]),
        ("DATA.TRAIN_MULTI_SCALE_CROP", [1.5]),
        ("DATA.NUM_FRAMES", 0),
        ("DATA.SAMPLING_RATE", 0),
        ("DATA.TARGET_FPS", 0),
        ("TEST.NUM_ENSEMBLE_VIEWS", 0),
    ],
)
def test_settings_that_the_config_refuses(key, value):
    with pytest.raises(UserError, match=f"{key} .*: give"):
        load_config(None, [key, str(value)])
