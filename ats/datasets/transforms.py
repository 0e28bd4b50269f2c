"""Transforms for training and evaluation: timm's (DeiT's) for images, SlowFast's and XViT's for clips.

PIL RGB images become float32 [3, crop_size, crop_size]. Clips, uint8 RGB frames [T, H, W, 3], become float32
[3, T, crop_size, crop_size], with one random draw per clip: all its frames get the same crop, flip and colours. Both
are normalised by mean and std. Random numbers come from the global generators of `random`, `numpy` and `torch`, which
the data set seeds for each sample.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform
from timm.data.auto_augment import auto_augment_transform, rand_augment_transform
from timm.data.auto_augment import posterize as timm_posterize
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import str_to_pil_interp
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import CenterCrop, Compose, Resize, v2
from torchvision.transforms.v2.functional import resized_crop as resized_crop_of_images

from ats.datasets.base import generators_unchanged
from ats.errors import UserError

MEAN, STD = IMAGE_MEAN_STD = IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
CLIP_MEAN, CLIP_STD = CLIP_MEAN_STD = (0.45, 0.45, 0.45), (0.225, 0.225, 0.225)  # SlowFast's

Transform = Callable[[Image.Image], Tensor]
ClipTransform = Callable[[np.ndarray], Tensor]
RGB = Sequence[float]  # a number per channel

# Images and clips up to this long side / short side are resized as a whole.
MAX_IMAGE_ASPECT, MAX_CLIP_ASPECT = 64, 8


class Augmentation(NamedTuple):
    """The random part of training transforms: arguments of timm's `create_transform`, and their meaning for clips."""

    scale: Sequence[float] = ()  # range of crop area / image area; (): 0.08 to 1, or for clips another kind of crop
    ratio: Sequence[float] = (3 / 4, 4 / 3)  # range of the crop's width / height
    hflip: float = 0.5  # probability
    interpolation: str = "bicubic"  # of image crops ("random" draws bilinear or bicubic), or of rotations of clips
    auto_augment: str = ""  # timm's policy name, such as "rand-m9-mstd0.5-inc1" or "v0"; "" for none
    color_jitter: float | None = None  # strength, images only; as in DeiT, not combined with `auto_augment`
    re_prob: float = 0.0  # random erasing, after normalisation; all frames of a clip get the same rectangles
    re_mode: str = "pixel"
    re_count: int = 1


def eval_transform(
    crop_size: int, *, crop_ratio: float = 0.875, interpolation: str = "bicubic", mean: RGB = MEAN, std: RGB = STD
) -> Transform:
    """Resize the short side to `floor(crop_size / crop_ratio)` pixels, then crop the centre.

    With `crop_ratio` 1 an image that already has the crop's size is not resampled.
    """
    assert 0 < crop_ratio <= 1, crop_ratio
    settings: dict[str, Any] = {"crop_pct": crop_ratio, "interpolation": interpolation, "mean": mean, "std": std}
    resize, crop, *rest = create_transform(crop_size, is_training=False, **settings).transforms
    return Compose([ResizeAndCrop(resize, crop), *rest])


@dataclass(frozen=True)
class ResizeAndCrop:
    """`resize` the short side, then `crop` the centre. Of a very elongated image, only the cropped part is resized:
    60,000 x 1 pixels, a PNG of 254 bytes, would otherwise take 12 GB.
    """

    resize: Resize
    crop: CenterCrop

    def __call__(self, image: Image.Image) -> Image.Image:
        short, short_resized, (side, _) = min(image.size), self.resize.size, self.crop.size
        if short >= short_resized or max(image.size) <= MAX_IMAGE_ASPECT * short:
            return self.crop(self.resize(image))
        starts, ends, corners = list[float](), list[float](), (list[int](), list[int]())
        for length in image.size:
            resized = int(short_resized * length / short)
            first = round((resized - side) / 2)
            start, end = first * length / resized, (first + side) * length / resized
            # Crop the image too, because Pillow rounds the box to 24 bits; the filters reach 2 pixels beyond the box.
            low, high = max(0, math.floor(start) - 4), min(length, math.ceil(end) + 4)
            starts.append(start - low)
            ends.append(end - low)
            corners[0].append(low)
            corners[1].append(high)
        interpolation = str_to_pil_interp(self.resize.interpolation.value)
        return image.crop((*corners[0], *corners[1])).resize((side, side), interpolation, box=(*starts, *ends))  # type: ignore[arg-type]


def train_transform(crop_size: int, augmentation: Augmentation, *, mean: RGB = MEAN, std: RGB = STD) -> Transform:
    """Random resized crop and flip, then RandAugment or colour jitter, then random erasing.

    Raises a UserError if a range is empty or timm does not know the policy.
    """
    _check_ranges(augmentation)
    with _timm_errors(augmentation.auto_augment):
        transform = create_transform(crop_size, is_training=True, **augmentation._asdict() | {"mean": mean, "std": std})
    for step in transform.transforms:
        fix_posterize(step)
    return transform


def fix_posterize(policy: Callable) -> None:
    """Make timm's RandAugment, AutoAugment or AugMix use `posterize`, in place. Other transforms stay as they are."""
    for op in [*getattr(policy, "ops", ()), *chain(*getattr(policy, "policy", ()))]:
        if op.aug_fn is timm_posterize:
            op.aug_fn = posterize


def posterize(image: Image.Image, bits_to_keep: int, **kwargs: object) -> Image.Image:
    """timm's posterize. At full strength timm 1.0.31 keeps 0 bits, i.e. black, but Pillow 13 refuses 0."""
    return timm_posterize(image, bits_to_keep, **kwargs) if bits_to_keep else image.point(lambda _: 0)


@contextmanager
def _timm_errors(policy: str) -> Iterator[None]:
    try:
        yield
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(
            f"timm cannot make the augmentation AUG.AA_TYPE {policy!r}: {type(error).__name__} {error}. DeiT uses "
            "rand-m9-mstd0.5-inc1, MViT rand-m7-n4-mstd0.5-inc1, XViT v0."
        ) from error


def _check_ranges(augmentation: Augmentation) -> None:
    for key, values in (("SCALES", augmentation.scale), ("ASPECT", augmentation.ratio)):
        low, high = values or (1, 1)
        if not 0 < low <= high:
            key = f"DATA.TRAIN_JITTER_{key}_RELATIVE"
            raise UserError(f"{key} must be a range [low, high] with 0 < low <= high; got [{low}, {high}].")


def normalise(frames: np.ndarray, *, mean: RGB = CLIP_MEAN, std: RGB = CLIP_STD) -> Tensor:
    """uint8 [T, H, W, 3] -> float32 [3, T, H, W], `(x / 255 - mean) / std`."""
    clip = torch.from_numpy(np.ascontiguousarray(frames.transpose(3, 0, 1, 2))).float().div_(255)
    return clip.sub_(torch.tensor(mean).view(3, 1, 1, 1)).div_(torch.tensor(std).view(3, 1, 1, 1))


def resized_shape(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Height and width of a frame resized to `short_side`, with the long side rounded down."""
    if min(height, width) == short_side:
        return height, width
    long_side = math.floor(max(height, width) / min(height, width) * short_side)
    return (long_side, short_side) if width < height else (short_side, long_side)


def resize_short_side(clip: Tensor, size: int) -> Tensor:
    """Resize [3, T, H, W] to short side `size`: bilinear, no antialiasing, the long side rounded down."""
    shape = resized_shape(clip.shape[2], clip.shape[3], size)
    return clip if shape == clip.shape[2:] else interpolate(clip, shape, mode="bilinear", align_corners=False)


def resized_crop(clip: Tensor, short_side: int, *, top: int, left: int, size: int) -> Tensor:
    """[3, T, H, W] -> [3, T, size, size]: the square at (top, left) of the clip resized to `short_side`."""
    shape = resized_shape(clip.shape[2], clip.shape[3], short_side)
    if max(shape) > MAX_CLIP_ASPECT * short_side:  # resized as a whole, a thin strip would fill the memory
        is_wide = shape[1] > shape[0]
        clip = sample_along(clip, 3 if is_wide else 2, shape[is_wide], start=left if is_wide else top, size=size)
        shape, top, left = (shape[0], size) if is_wide else (size, shape[1]), *((top, 0) if is_wide else (0, left))
    if shape != clip.shape[2:]:
        clip = interpolate(clip, shape, mode="bilinear", align_corners=False)
    return clip[:, :, top : top + size, left : left + size]


def sample_along(clip: Tensor, dim: int, length: int, *, start: int, size: int) -> Tensor:
    """Entries `start` to `start + size` of dimension `dim` resized to `length`, as `interpolate` computes them."""
    last = clip.shape[dim] - 1
    place = ((torch.arange(start, start + size).double() + 0.5) * (last + 1) / length - 0.5).clamp(0, last)
    low = place.floor().long()
    weight = (place - low).float().view(-1, *[1] * (clip.ndim - 1 - dim))
    return torch.lerp(clip.index_select(dim, low), clip.index_select(dim, (low + 1).clamp(max=last)), weight)


def crop_along(clip: Tensor, *, short_side: int, size: int, crop: int) -> Tensor:
    """[3, T, H, W] -> [3, T, size, size] of the resized clip: left (0), middle (1), right (2); top, middle, bottom for
    a portrait clip.
    """
    height, width = resized_shape(clip.shape[2], clip.shape[3], short_side)
    tops, lefts = ((0, math.ceil(free / 2), free) for free in (height - size, width - size))
    top, left = (tops[crop], lefts[1]) if height > width else (tops[1], lefts[crop])
    return resized_crop(clip, short_side, top=top, left=left, size=size)


def eval_clip_transform(
    crop_size: int, *, short_side: int, crop: int = 1, mean: RGB = CLIP_MEAN, std: RGB = CLIP_STD
) -> ClipTransform:
    """Normalise, resize the short side, then take `crop` (0, 1, 2) along the long side.

    Raises a UserError if the crop is larger than the short side.
    """
    if short_side < crop_size:
        raise UserError(
            f"Clips are tested at a short side of {short_side} pixels, too small for a crop of DATA.TEST_CROP_SIZE "
            f"{crop_size}. With one spatial crop the short side is DATA.TRAIN_JITTER_SCALES[0]: raise it."
        )
    cut = partial(crop_along, short_side=short_side, size=crop_size, crop=crop)
    return Compose([partial(normalise, mean=mean, std=std), cut, Tensor.contiguous])


def train_clip_transform(
    crop_size: int,
    augmentation: Augmentation,
    *,
    jitter_scales: Sequence[int] = (256, 320),
    multi_scales: Sequence[float] = (),
    mean: RGB = CLIP_MEAN,
    std: RGB = CLIP_STD,
) -> ClipTransform:
    """Crop and flip, with AutoAugment or RandAugment and random erasing.

    There are three kinds of crop. `multi_scales` (crop sides / short side of the frame) selects XViT's, before the
    augmentation; `augmentation.scale` selects MViT's random resized crop; with neither, SlowFast's and TimeSformer's
    random crop, after resizing the short side to a random size in `jitter_scales` (pixels).

    Raises:
        UserError: a range is empty or does not fit the crop, or a name is unknown.
    """
    a, steps = augmentation, list[Callable]()
    if multi_scales:
        steps.append(partial(multi_scale_crop, crop_size=crop_size, scales=tuple(multi_scales)))
    if a.auto_augment:
        policy = _auto_augment(a.auto_augment, crop_size=crop_size, interpolation=a.interpolation)
        steps.append(partial(augment_alike, policy=policy))
    steps.append(partial(normalise, mean=mean, std=std))
    if a.scale and not multi_scales:
        _check_ranges(a)
        steps.append(v2.RandomResizedCrop(crop_size, tuple(a.scale), tuple(a.ratio), antialias=False))
    elif not multi_scales:
        low, high = jitter_scales
        if not crop_size <= low <= high:
            raise UserError(
                f"DATA.TRAIN_JITTER_SCALES must be [low, high], the range of the short side, at least the crop size: "
                f"{crop_size} <= low <= high; got [{low}, {high}]."
            )
        steps.append(partial(jittered_crop, scales=(low, high), size=crop_size))
    if a.hflip:
        steps.append(v2.RandomHorizontalFlip(a.hflip))
    steps.append(Tensor.contiguous)
    if a.re_prob:
        erase = RandomErasing(a.re_prob, mode=a.re_mode, max_count=a.re_count, device="cpu")
        steps.append(partial(erase_alike, erase=erase))
    return Compose(steps)


# The steps are module-level functions, not closures, because they are pickled for data workers that are not forked.


def jittered_crop(clip: Tensor, *, scales: tuple[float, float], size: int) -> Tensor:
    """SlowFast's crop: resize the short side to a random size in `scales` (pixels), then take a random square."""
    short_side = round(random.uniform(*scales))
    free = (side - size for side in resized_shape(clip.shape[2], clip.shape[3], short_side))
    top, left = (int(torch.randint(space + 1, ())) if space else 0 for space in free)  # v2.RandomCrop's draws
    return resized_crop(clip, short_side, top=top, left=left, size=size)


def multi_scale_crop(frames: np.ndarray, *, crop_size: int, scales: Sequence[float]) -> np.ndarray:
    """TSN's crop: sides of equal or adjacent scales, at one of 13 places; resized to `crop_size` with antialiasing."""
    sides = [(i, j) for i in range(len(scales)) for j in range(len(scales)) if abs(i - j) <= 1]
    # Corners, centre, middles of the borders and of the quarters, in quarters of the free space.
    places = [(y, x) for y in range(5) for x in range(5) if (y + x) % 2 == 0]
    full_height, full_width = frames.shape[1:3]
    short_side = min(full_height, full_width)
    i, j = random.choice(sides)
    height, width = round(short_side * scales[i]), round(short_side * scales[j])
    y, x = random.choice(places)
    top, left = (full_height - height) * y // 4, (full_width - width) * x // 4
    clip = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
    clip = resized_crop_of_images(clip, top, left, height, width, [crop_size, crop_size], antialias=True)
    return clip.permute(0, 2, 3, 1).numpy()


def erase_alike(clip: Tensor, *, erase: RandomErasing) -> Tensor:
    """Random erasing with frames as channels: all frames share the rectangle, but not the noise."""
    return erase(clip.view(-1, *clip.shape[2:])).view_as(clip)


def augment_alike(frames: np.ndarray, *, policy: Callable[[Image.Image], Image.Image]) -> np.ndarray:
    """Apply timm's policy to every frame with the same random numbers."""
    *others, last = map(Image.fromarray, frames)
    result = []
    for image in others:
        with generators_unchanged():
            result.append(np.asarray(policy(image)))
    return np.stack([*result, np.asarray(policy(last))])


def _auto_augment(policy: str, *, crop_size: int, interpolation: str) -> Callable[[Image.Image], Image.Image]:
    """timm's policy, for clips."""
    settings = {"translate_const": int(crop_size * 0.45)}
    if interpolation != "random":
        settings["interpolation"] = str_to_pil_interp(interpolation)
    make = rand_augment_transform if policy.startswith("rand") else auto_augment_transform
    with _timm_errors(policy):
        augment = make(policy, settings)
    fix_posterize(augment)
    return augment
