"""Pictures as tensors: what was kept with the rest faded, significance in colours, and sheets of both.

Shapes: T frames (1 for images), H x W pixels, h x w cells; values in 0..1.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from ats.datasets import Sample
from ats.errors import UserError
from ats.tokens import KeptTokens
from ats.visualize.grids import BlockView, look

logger = logging.getLogger(__name__)

FADED = 0.15  # how much of a dropped patch stays visible on white
# Significance from none to the highest of a picture; its square root is what is spread over these colours.
RAMP = ((20, 22, 48), (88, 44, 131), (196, 60, 94), (245, 146, 65), (253, 242, 190))
GONE = 0.93  # grey of a patch that had no score, because it had been dropped before


def fade(picture: Tensor, kept: Tensor) -> Tensor:
    """The picture [3, T, H, W] with everything faded that is not in `kept` [T', h, w] (bool)."""
    visible = FADED + (1 - FADED) * enlarge(kept.float(), picture.shape[1:])
    return picture * visible + (1 - visible)


def heat(scores: Tensor, size: Sequence[int]) -> Tensor:
    """Significance [T', h, w] in the colours of RAMP as a picture [3, T, H, W] of `size` (T, H, W); NaN is grey."""
    strength = (scores / scores.nan_to_num().amax().clamp_min(1e-12)).sqrt().nan_to_num() * (len(RAMP) - 1)
    ramp = torch.tensor(RAMP, dtype=torch.float32) / 255
    low = strength.long().clamp(max=len(RAMP) - 2)
    share = (strength - low)[..., None]
    colours = (ramp[low] * (1 - share) + ramp[low + 1] * share).movedim(-1, 0)
    colours = torch.where(scores.isnan(), GONE, colours)
    return torch.stack([enlarge(channel, size) for channel in colours])


def enlarge(values: Tensor, size: Sequence[int]) -> Tensor:
    """[T', h, w] -> [T, H, W], every cell as large as its share of the picture."""
    return F.interpolate(values[None, None], size=tuple(size), mode="nearest-exact")[0, 0]


def kept_patches_image(image: Tensor, patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """The image with every patch that is not kept faded.

    Args:
        image: [3, H, W] in 0..1.
        patches: indices of the kept patches, row major over `grid` (rows, columns).

    Returns:
        [3, H, W].
    """
    kept = torch.zeros(grid[0] * grid[1], dtype=torch.bool)
    kept[patches.cpu()] = True
    return fade(image[:, None], kept.reshape(1, *grid))[:, 0]


def kept_patches_clips(clips: Tensor, entry: KeptTokens, grid: tuple[int, int]) -> Tensor:
    """Clips with every patch that is not kept faded, frame by frame.

    Args:
        clips: [B, 3, T, H, W] in 0..1.
        entry: of the trace of a network whose sequences are frames (XViT, divided TimeSformer).
    """
    frames = clips.transpose(1, 2).flatten(0, 1)
    faded = [kept_patches_image(frame, patches, grid) for frame, patches in zip(frames, entry.patches, strict=True)]
    return torch.stack(faded).unflatten(0, (len(clips), -1)).transpose(1, 2)


def sample_sheet(picture: Tensor, blocks: Sequence[BlockView]) -> Tensor:
    """One sample as one picture without captions, for TensorBoard.

    Of an image a row: the input, the significance in the first block, what each block kept. Of a clip a row of its
    frames for each of these, with the first and the last block.

    Args:
        picture: [3, T, H, W]. blocks: of one sample.
    """
    is_image = picture.shape[1] == 1
    shown = blocks if is_image else [blocks[0], *blocks[1:][-1:]]
    parts = [picture, heat(blocks[0].scores, picture.shape[1:]), *(fade(picture, view.kept) for view in shown)]
    rows = [part.transpose(1, 2).flatten(2) for part in parts]  # [3, H, T * W]
    return torch.cat(rows, dim=2 if is_image else 1).clamp(0, 1)


@torch.no_grad()
def draw_fixed_images(
    model: nn.Module, dataset: Dataset[Sample], num_images: int, *, mean: Sequence[float], std: Sequence[float]
) -> Tensor | None:
    """`sample_sheet`s, one below the other, of samples spread evenly over a data set, always the same ones.

    Args:
        model: a network with ATS blocks; without there is no picture.
        mean, std: of the data set's normalisation.
    """
    num_images = min(num_images, len(dataset))
    if num_images < 1:
        return None
    x = torch.stack([dataset[index * len(dataset) // num_images].x for index in range(num_images)])
    was_training = model.training
    try:
        _, _, views = look(model.eval(), x.to(next(model.parameters()).device))
    except UserError as error:  # a network of the user's own
        logger.info("TensorBoard gets no picture of the tokens that are kept. %s", error)
        return None
    finally:
        model.train(was_training)
    if not views:
        return None
    mean, std = (torch.tensor(values)[:, None, None, None] for values in (mean, std))
    pictures = ((x if x.ndim == 5 else x[:, :, None]) * std + mean).clamp(0, 1)
    return torch.cat([sample_sheet(p, [v.sample(i) for v in views]) for i, p in enumerate(pictures)], dim=1)
