"""Pictures as tensors: kept patches with the rest faded, merged ones as groups, significance as colours, and sheets.

Shapes: T frames (1 for images), H x W pixels, h x w cells; values in 0..1.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ats.datasets import Sample
from ats.errors import UserError
from ats.visualize.grids import BlockView, look

logger = logging.getLogger(__name__)

FADED = 0.15  # opacity of a dropped patch on white
# Colours of `relative_scores` from 0 to 1.
RAMP = ((20, 22, 48), (88, 44, 131), (196, 60, 94), (245, 146, 65), (253, 242, 190))
GONE = 0.93  # grey level of a patch without a score, because an earlier block dropped it


def as_pictures(x: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Network inputs, images [B, 3, H, W] or clips [B, 3, T, H, W], as pictures [B, 3, T, H, W] in 0..1, the
    normalisation by `mean` and `std` undone.
    """
    shift, factor = (torch.as_tensor(values)[:, None, None, None] for values in (mean, std))
    return ((x if x.ndim == 5 else x[:, :, None]).cpu() * factor + shift).clamp(0, 1)


def fade(picture: Tensor, kept: Tensor) -> Tensor:
    """The picture [..., 3, T, H, W] with every cell faded that is not in `kept` [..., T', h, w] (bool)."""
    visible = FADED + (1 - FADED) * enlarge(kept.float(), picture.shape[-3:]).unsqueeze(-4)
    return picture * visible + (1 - visible)


def draw(picture: Tensor, view: BlockView) -> Tensor:
    """What a block left of the picture [..., 3, T, H, W]: dropped cells are faded; where tokens merged, each group of
    cells has its mean colour, between white lines.
    """
    return fade(picture, view.kept) if view.groups is None else blend(picture, view.groups)


def blend(picture: Tensor, groups: Tensor) -> Tensor:
    """The picture [..., 3, T, H, W] with each group of cells, equal in `groups` [..., T', h, w], in its mean colour."""
    size, (frames, height, width) = picture.shape[-3:], groups.shape[-3:]
    cells = F.adaptive_avg_pool3d(picture.reshape(-1, 3, *size), (frames, height, width)).movedim(1, -1)
    _, group = groups.unique(return_inverse=True)
    flat = group.flatten()
    total = torch.zeros(int(flat.max()) + 1, 3).index_add(0, flat, cells.flatten(0, -2))
    colours = (total / flat.bincount()[:, None])[group].movedim(-1, -4)
    blended, group = enlarge(colours, size), enlarge(group.float(), size)
    line = torch.zeros_like(group, dtype=torch.bool)
    line[..., :, 1:] |= group[..., :, 1:] != group[..., :, :-1]
    line[..., 1:, :] |= group[..., 1:, :] != group[..., :-1, :]
    return torch.where(line.unsqueeze(-4), 0.5 + 0.5 * blended, blended)


def heat(scores: Tensor, size: Sequence[int]) -> Tensor:
    """Significance [T', h, w] as a picture [3, T, H, W] of `size` (T, H, W), in the colours of RAMP; NaN is grey."""
    position = relative_scores(scores).nan_to_num() * (len(RAMP) - 1)
    ramp = torch.tensor(RAMP, dtype=torch.float32) / 255
    low = position.long().clamp(max=len(RAMP) - 2)
    share = (position - low)[..., None]
    colours = (ramp[low] * (1 - share) + ramp[low + 1] * share).movedim(-1, 0)
    colours = torch.where(scores.isnan(), GONE, colours)
    return enlarge(colours, size)


def relative_scores(scores: Tensor) -> Tensor:
    """Square root of score / highest score, which spreads small scores; NaN stays NaN."""
    return (scores / scores.nan_to_num().amax().clamp_min(1e-12)).sqrt()


def enlarge(values: Tensor, size: Sequence[int]) -> Tensor:
    """Scale cells [..., T', h, w] to pixels [..., T, H, W], nearest neighbour."""
    pixels = F.interpolate(values.reshape(-1, 1, *values.shape[-3:]), size=tuple(size), mode="nearest-exact")
    return pixels.reshape(*values.shape[:-3], *size)


def sample_sheet(picture: Tensor, blocks: Sequence[BlockView]) -> Tensor:
    """One sample [3, T, H, W] and its views as a single picture [3, height, width] without captions, for TensorBoard.

    For an image, one row: the input, the significance in the first block, the patches each block kept. For a clip, one
    row of frames for each of these, with the first and last block only.
    """
    is_image = picture.shape[1] == 1
    shown = blocks if is_image else [blocks[0], *blocks[1:][-1:]]
    parts = [picture, heat(blocks[0].scores, picture.shape[1:]), *(draw(picture, view) for view in shown)]
    rows = [part.transpose(1, 2).flatten(2) for part in parts]  # [3, H, T * W]
    return torch.cat(rows, dim=2 if is_image else 1).clamp(0, 1)


@torch.no_grad()
def draw_fixed_images(
    model: nn.Module, dataset: Sequence[Sample], num_images: int, *, mean: Sequence[float], std: Sequence[float]
) -> Tensor | None:
    """`sample_sheet`s, one below the other, of samples spread evenly over a data set: the same ones every time.

    Returns:
        [3, height, width]; None without samples or ATS blocks, or if `look` does not know the network.
    """
    num_images = min(num_images, len(dataset))
    if num_images < 1:
        return None
    x = torch.stack([dataset[index * len(dataset) // num_images].x for index in range(num_images)])
    was_training = model.training
    try:
        _, _, views = look(model.eval(), x.to(next(model.parameters()).device))
    except UserError as error:  # a user-defined network
        logger.info("TensorBoard gets no picture of the kept tokens. %s", error)
        return None
    finally:
        model.train(was_training)
    if not views:
        return None
    pictures = as_pictures(x, mean, std)
    return torch.cat([sample_sheet(p, [v.sample(i) for v in views]) for i, p in enumerate(pictures)], dim=1)
