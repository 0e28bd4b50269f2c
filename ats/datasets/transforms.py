"""Image transforms for training and evaluation: timm's, which are DeiT's.

Both take an RGB PIL image and return a float32 tensor [3, crop_size, crop_size], normalised by mean and std. Random
draws come from the global generators of `random`, `numpy` and `torch`; the data set seeds them sample by sample.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from unittest.mock import patch

from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.auto_augment import NAME_TO_OP as timm_ops
from timm.data.auto_augment import posterize as timm_posterize
from torch import Tensor

from ats.errors import UserError

Transform = Callable[[Image.Image], Tensor]


def eval_transform(
    crop_size: int,
    *,
    crop_ratio: float = 0.875,
    interpolation: str = "bicubic",
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> Transform:
    """Resize the short side to `floor(crop_size / crop_ratio)` pixels, then crop the centre.

    With `crop_ratio` 1 an image that already has the size of the crop is not resampled.

    Raises:
        UserError: `crop_ratio` is not in (0, 1], or `interpolation` is unknown.
    """
    if not 0 < crop_ratio <= 1:
        raise UserError(f"The evaluation crop ratio (DATA.TEST_CROP_RATIO) must be in (0, 1]; got {crop_ratio}.")
    _check_interpolation(interpolation, ("bicubic", "bilinear", "nearest"), key="DATA.TEST_INTERPOLATION")
    return create_transform(
        crop_size,
        is_training=False,
        crop_pct=crop_ratio,
        interpolation=interpolation,
        mean=tuple(mean),
        std=tuple(std),
    )


def train_transform(
    crop_size: int,
    *,
    scale: Sequence[float] = (0.08, 1.0),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
    flip: bool = True,
    interpolation: str = "bicubic",
    auto_augment: str = "",
    color_jitter: float = 0.0,
    erase_prob: float = 0.0,
    erase_mode: str = "pixel",
    erase_count: int = 1,
    mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> Transform:
    """Random resized crop and flip, then RandAugment or colour jitter, then random erasing (of the normalised image).

    Args:
        scale: range of the crop's area over the image's. ratio: range of its width over its height.
        interpolation: of the crop; "random" draws bilinear or bicubic.
        auto_augment: timm's policy name, such as "rand-m9-mstd0.5-inc1"; "" for none.
        color_jitter: strength; as in DeiT it is not used together with `auto_augment`.
        erase_prob, erase_mode, erase_count: timm's random erasing.

    Raises:
        UserError: a range is empty, or a name is unknown.
    """
    for key, (low, high) in {"TRAIN_JITTER_SCALES_RELATIVE": scale, "TRAIN_JITTER_ASPECT_RELATIVE": ratio}.items():
        if not 0 < low <= high:
            raise UserError(f"DATA.{key} must be a range [low, high] with 0 < low <= high; got [{low}, {high}].")
    _check_interpolation(interpolation, ("bicubic", "bilinear", "random"), key="AUG.INTERPOLATION")
    try:
        with mended_posterize():
            return create_transform(
                crop_size,
                is_training=True,
                scale=tuple(scale),
                ratio=tuple(ratio),
                hflip=0.5 if flip else 0.0,
                interpolation=interpolation,
                auto_augment=auto_augment or None,
                color_jitter=color_jitter or None,
                re_prob=erase_prob,
                re_mode=erase_mode,
                re_count=erase_count,
                mean=tuple(mean),
                std=tuple(std),
            )
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(
            f"timm cannot make the augmentation AUG.AA_TYPE {auto_augment!r} with AUG.RE_MODE {erase_mode!r}: "
            f"{type(error).__name__} {error}. DeiT uses AUG.AA_TYPE rand-m9-mstd0.5-inc1 and AUG.RE_MODE pixel."
        ) from error


def mended_posterize() -> AbstractContextManager:
    """Policies that timm builds inside this context use `_posterize`."""
    return patch.dict(timm_ops, {name: _posterize for name in timm_ops if name.startswith("Posterize")})


def _posterize(image: Image.Image, bits_to_keep: int, **kwargs: object) -> Image.Image:
    """timm's posterize. At full strength it keeps 0 bits: black; Pillow 13 refuses that, which timm 1.0.31 ignores."""
    return timm_posterize(image, bits_to_keep, **kwargs) if bits_to_keep else image.point(lambda _: 0)


def _check_interpolation(interpolation: str, choices: tuple[str, ...], *, key: str) -> None:
    if interpolation not in choices:
        raise UserError(f"{key} {interpolation!r} is not known; choose one of {', '.join(choices)}.")
