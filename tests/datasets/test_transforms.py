"""ats.datasets.transforms of images: from image to tensor, and which settings reach the transform."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image

from ats.config import load_config
from ats.datasets import build_transform, transforms
from ats.datasets.transforms import Augmentation, eval_transform, train_transform
from ats.errors import UserError


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image("china.jpg"))  # 640 x 427


def test_eval_transform_is_timms(photo):
    """Preprocessing of a real photo equals timm's (and DeiT's) bit for bit: bicubic resize to 256, centre crop 224."""
    from timm.data import create_transform

    timms = create_transform(224, is_training=False, crop_pct=0.875, interpolation="bicubic")
    ours = eval_transform(224)
    for image in (photo, photo.rotate(90, expand=True), photo.resize((100, 90))):
        assert torch.equal(ours(image), timms(image))
    assert ours(photo).shape == (3, 224, 224)


def test_eval_transform_by_hand(photo):
    """The same preprocessing written out with Pillow."""
    width, height = 256 * 640 // 427, 256
    left, top = round((width - 224) / 2), 16
    crop = photo.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + 224, top + 224))
    pixels = torch.from_numpy(np.array(crop)).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(eval_transform(224)(photo), (pixels - mean[:, None, None]) / std[:, None, None])


@pytest.mark.parametrize("size", [(3000, 40), (40, 3001), (1, 500), (641, 3), (701, 2)])
def test_thin_images_are_cropped_before_they_are_enlarged(size, photo, monkeypatch):
    """With the same result as timm's, give or take rounding."""
    from timm.data import create_transform

    image = photo.resize(size)
    plain = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    for crop_size, crop_ratio in ((56, 1.0), (56, 0.875), (50, 0.9)):
        timms = create_transform(crop_size, is_training=False, crop_pct=crop_ratio, interpolation="bicubic", **plain)
        want, ours = timms(image), eval_transform(crop_size, crop_ratio=crop_ratio, **plain)
        assert (ours(image) - want).abs().max() < 1.5 / 255
        monkeypatch.setattr(transforms, "MAX_IMAGE_ASPECT", 1000)  # not thin, so not cropped first
        assert torch.equal(ours(image), want)
        monkeypatch.undo()


@pytest.mark.parametrize("size", [(60_000, 1), (1, 60_000), (4_000_000, 2)])
def test_thin_images_take_little_memory(size, monkeypatch):
    """With a short side of 256 pixels, 60,000 x 1 would have 4 gigapixels; training crops before it resizes."""
    resize = Image.Image.resize

    def small_only(image, size, *args, **kwargs):
        assert size[0] * size[1] < 10**6
        return resize(image, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", small_only)
    augmentation, image = Augmentation(auto_augment="rand-m9-mstd0.5-inc1", re_prob=1.0), Image.new("RGB", size)
    for transform in (eval_transform(224), train_transform(224, augmentation)):
        assert transform(image).shape == (3, 224, 224)


@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_resampled_when_the_size_fits(photo, training):
    """At crop ratio 1 (or with a full training crop) an image of the right size keeps its pixels."""
    image = photo.crop((7, 5, 67, 65))
    plain = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    if training:
        transform = train_transform(60, Augmentation(scale=(1, 1), ratio=(1, 1), hflip=0.0), **plain)
    else:
        transform = eval_transform(60, crop_ratio=1.0, **plain)
    np.testing.assert_array_equal((transform(image) * 255).round().byte().permute(1, 2, 0), np.asarray(image))


def test_training_augmentations_do_something(photo):
    """Each switch of the training transform changes its output; with all off it only crops and flips."""
    image, whole = photo.resize((64, 64)), Augmentation(scale=(1, 1), ratio=(1, 1), hflip=0.0)

    def run(**kwargs):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)  # noqa: NPY002
        return train_transform(64, whole._replace(**kwargs))(image)

    plain = run()
    assert torch.equal(plain, eval_transform(64, crop_ratio=1.0)(image))
    flip = train_transform(64, whole._replace(hflip=0.5))
    flipped = [torch.equal(flip(image), plain.flip(2)) for _ in range(20)]
    assert 0 < sum(flipped) < 20
    for switch in (
        {"scale": (0.2, 0.4)},
        {"ratio": (2, 3)},
        {"auto_augment": "rand-m9-mstd0.5-inc1"},
        {"color_jitter": 0.4},
        {"re_prob": 1.0},
    ):
        assert not torch.equal(run(**switch), plain), switch


def test_every_augmentation_at_full_strength(photo):
    """All RandAugment operations run at magnitude 10 with the installed Pillow; posterizing to 0 bits gives black."""
    image = photo.resize((32, 32))
    for policy in ("rand-m10-n1-p1", "rand-m10-n1-p1-inc1", "original", "v0", "augmix-m10"):
        transform = train_transform(32, Augmentation(auto_augment=policy), mean=(0, 0, 0), std=(1, 1, 1))
        ops = getattr(transform.transforms[2], "ops", [])
        for op in ops:
            op(image)
            if op.name in ("Posterize", "PosterizeIncreasing") and op.magnitude == 10:
                black = op.aug_fn(image, 0)
                assert (black.mode, black.getextrema()) == ("RGB", ((0, 0),) * 3)
        for _ in range(20):
            transform(image)
    assert train_transform(32, Augmentation(auto_augment="rand-m9-mstd0.5-inc1")).transforms[2].ops


def test_wrong_transform_settings_are_named():
    with pytest.raises(UserError, match=r"DATA\.TEST_CROP_RATIO 2: give a number"):
        load_config(None, ["DATA.TEST_CROP_RATIO", "2"])
    for key in ("AUG.INTERPOLATION", "DATA.TEST_INTERPOLATION"):
        with pytest.raises(UserError, match=rf"{key} cubic: choose from bicubic, bilinear"):
            load_config(None, [key, "cubic"])
    with pytest.raises(UserError, match=r"DATA\.TRAIN_JITTER_SCALES_RELATIVE.*got \[1.0, 0.1\]"):
        train_transform(224, Augmentation(scale=(1.0, 0.1)))
    with pytest.raises(UserError, match=r"AUG\.AA_TYPE 'randaug-oops'"):
        train_transform(224, Augmentation(auto_augment="randaug-oops"))


def test_config_reaches_the_transform():
    """With AUG.ENABLE off only crop and flip remain; an empty jitter range means the default."""
    cfg = load_config(None, ["AUG.ENABLE", "False", "DATA.TRAIN_JITTER_SCALES_RELATIVE", "[]"])
    names = [type(step).__name__ for step in build_transform(cfg, "train").transforms]
    assert names == ["RandomResizedCropAndInterpolation", "RandomHorizontalFlip", "MaybeToTensor", "Normalize"]
    cfg = load_config(None, ["DATA.RANDOM_FLIP", "False", "DATA.TRAIN_JITTER_SCALES_RELATIVE", "[]"])
    steps = build_transform(cfg, "train").transforms
    assert [type(step).__name__ for step in steps] == [
        "RandomResizedCropAndInterpolation",
        "RandAugment",
        "MaybeToTensor",
        "Normalize",
        "RandomErasing",
    ]
    assert steps[0].scale == (0.08, 1.0)
