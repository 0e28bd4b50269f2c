"""Clip transforms for training and testing: SlowFast's and XViT's.

All take uint8 RGB frames [T, H, W, 3] and return a float32 tensor [3, T, crop_size, crop_size], normalised by mean and
std. There is one random draw per clip: all its frames are cropped, flipped and coloured alike. Draws come from the
global generators of `random`, `numpy` and `torch`; the data set seeds them sample by sample.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import auto_augment_transform, rand_augment_transform
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import str_to_pil_interp
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import resized_crop

from ats.datasets.base import random_states, set_random_states
from ats.datasets.transforms import mended_posterize
from ats.errors import UserError

MEAN = (0.45, 0.45, 0.45)  # SlowFast's, of clips
STD = (0.225, 0.225, 0.225)

ClipTransform = Callable[[np.ndarray], Tensor]
Frames = Callable[[np.ndarray], np.ndarray]


def normalise(frames: np.ndarray, *, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """uint8 [T, H, W, 3] -> float32 [3, T, H, W], `(x / 255 - mean) / std`."""
    clip = torch.from_numpy(np.ascontiguousarray(frames.transpose(3, 0, 1, 2))).float().div_(255)
    return clip.sub_(torch.tensor(mean).view(3, 1, 1, 1)).div_(torch.tensor(std).view(3, 1, 1, 1))


def resize_short_side(clip: Tensor, size: int) -> Tensor:
    """[3, T, H, W] bilinear, without antialiasing, to short side `size`; the long side is rounded down."""
    height, width = clip.shape[2:]
    if min(height, width) == size:
        return clip
    if width < height:
        shape = (math.floor(height / width * size), size)
    else:
        shape = (size, math.floor(width / height * size))
    return interpolate(clip, shape, mode="bilinear", align_corners=False)


def crop_along(clip: Tensor, size: int, crop: int) -> Tensor:
    """[3, T, H, W] -> [3, T, size, size]: the left (0), middle (1) or right (2), or top to bottom if it is upright."""
    height, width = clip.shape[2:]
    top, left = math.ceil((height - size) / 2), math.ceil((width - size) / 2)
    if height > width:
        top = (0, top, height - size)[crop]
    else:
        left = (0, left, width - size)[crop]
    return clip[:, :, top : top + size, left : left + size]


def eval_clip_transform(
    crop_size: int,
    *,
    short_side: int,
    crop: int = 1,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> ClipTransform:
    """Normalise, resize the short side, then take `crop` (0, 1, 2) along the long side.

    Raises:
        UserError: the crop does not fit.
    """
    if short_side < crop_size:
        raise UserError(
            f"Clips are tested at a short side of {short_side} pixels, which a crop of DATA.TEST_CROP_SIZE {crop_size} "
            f"does not fit into. With one spatial crop the short side is DATA.TRAIN_JITTER_SCALES[0]: raise it."
        )

    def transform(frames: np.ndarray) -> Tensor:
        clip = resize_short_side(normalise(frames, mean=mean, std=std), short_side)
        return crop_along(clip, crop_size, crop).contiguous()

    return transform


def train_clip_transform(
    crop_size: int,
    *,
    jitter_scales: Sequence[int] = (256, 320),
    scale: Sequence[float] = (),
    ratio: Sequence[float] = (3 / 4, 4 / 3),
    multi_scales: Sequence[float] = (),
    flip: bool = True,
    auto_augment: str = "",
    interpolation: str = "bicubic",
    erase_prob: float = 0.0,
    erase_mode: str = "pixel",
    erase_count: int = 1,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> ClipTransform:
    """Crop and flip, with AutoAugment or RandAugment and random erasing.

    The crop is one of three: `multi_scales` given, XViT's (before the augmentation); `scale` given, MViT's random
    resized crop; else SlowFast's and TimeSformer's random crop after the short side was resized to `jitter_scales`.

    Args:
        jitter_scales: range of the short side in pixels.
        scale, ratio: ranges of the crop's area over the frame's and of its width over its height.
        multi_scales: sides of the crop over the short side of the frame.
        auto_augment, interpolation: timm's policy name, such as "rand-m7-n4-mstd0.5-inc1" or "v0", and how it rotates.
        erase_prob, erase_mode, erase_count: timm's random erasing; the rectangles are the same in all frames.

    Raises:
        UserError: a range is empty or does not fit the crop, or a name is unknown.
    """
    on_frames: list[Frames] = [_multi_scale_crop(crop_size, multi_scales)] if multi_scales else []
    if auto_augment:
        on_frames.append(_auto_augment(auto_augment, crop_size=crop_size, interpolation=interpolation))
    on_clip: list[Callable[[Tensor], Tensor]] = []
    if not multi_scales and scale:
        for key, (low, high) in {"SCALES": scale, "ASPECT": ratio}.items():
            if not 0 < low <= high:
                raise UserError(
                    f"DATA.TRAIN_JITTER_{key}_RELATIVE must be [low, high], 0 < low <= high; not {low, high}"
                )
        on_clip.append(v2.RandomResizedCrop(crop_size, tuple(scale), tuple(ratio), antialias=False))
    elif not multi_scales:
        on_clip += [_short_side_jitter(crop_size, jitter_scales), v2.RandomCrop(crop_size)]
    if flip:
        on_clip.append(v2.RandomHorizontalFlip())
    erase = None
    if erase_prob:
        erase = RandomErasing(erase_prob, mode=erase_mode, max_count=erase_count, device="cpu")

    def transform(frames: np.ndarray) -> Tensor:
        for step in on_frames:
            frames = step(frames)
        clip = normalise(frames, mean=mean, std=std)
        for step in on_clip:
            clip = step(clip)
        clip = clip.contiguous()
        if erase:
            erase(clip.view(-1, crop_size, crop_size))  # in place; frames as channels: one rectangle, own noise each
        return clip

    return transform


def _short_side_jitter(crop_size: int, scales: Sequence[int]) -> Callable[[Tensor], Tensor]:
    if len(scales) != 2 or not crop_size <= scales[0] <= scales[1]:
        raise UserError(
            f"DATA.TRAIN_JITTER_SCALES must be [low, high], the range of the short side, not below the crop: "
            f"{crop_size} <= low <= high; got {list(scales)}."
        )
    return lambda clip: resize_short_side(clip, round(random.uniform(*scales)))


def _multi_scale_crop(crop_size: int, scales: Sequence[float]) -> Frames:
    """TSN's crop: sides of two neighbouring scales, at one of 13 places, resized to `crop_size` (with antialiasing)."""
    if not all(0 < scale <= 1 for scale in scales):
        raise UserError(f"DATA.TRAIN_MULTI_SCALE_CROP must be shares of the short side, in (0, 1]; got {list(scales)}.")
    sides = [(i, j) for i in range(len(scales)) for j in range(len(scales)) if abs(i - j) <= 1]
    # Corners, centre, middles of the borders and of the quarters, in quarters of the free length.
    places = [(y, x) for y in range(5) for x in range(5) if (y + x) % 2 == 0]

    def crop(frames: np.ndarray) -> np.ndarray:
        full_height, full_width = frames.shape[1:3]
        short_side = min(full_height, full_width)
        i, j = random.choice(sides)
        height, width = round(short_side * scales[i]), round(short_side * scales[j])
        y, x = random.choice(places)
        top, left = (full_height - height) * y // 4, (full_width - width) * x // 4
        clip = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
        clip = resized_crop(clip, top, left, height, width, [crop_size, crop_size], antialias=True)
        return clip.permute(0, 2, 3, 1).numpy()

    return crop


def _auto_augment(policy: str, *, crop_size: int, interpolation: str) -> Frames:
    """timm's policy, on every frame with the same random numbers."""
    settings = {"translate_const": int(crop_size * 0.45)}
    if interpolation != "random":
        settings["interpolation"] = str_to_pil_interp(interpolation)
    make = rand_augment_transform if policy.startswith("rand") else auto_augment_transform
    try:
        with mended_posterize():
            augment = make(policy, settings)
    except (AssertionError, KeyError, ValueError) as error:
        raise UserError(
            f"timm cannot make the augmentation AUG.AA_TYPE {policy!r}: {type(error).__name__} {error}. MViT uses "
            "rand-m7-n4-mstd0.5-inc1, XViT v0."
        ) from error

    def run(frames: np.ndarray) -> np.ndarray:
        states, result = random_states(), []
        for frame in frames:
            set_random_states(states)
            result.append(np.asarray(augment(Image.fromarray(frame))))
        return np.stack(result)

    return run
