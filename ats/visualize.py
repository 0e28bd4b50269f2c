"""Pictures of what a network keeps: each image, or clip, beside its tokens after ATS blocks, dropped patches faded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from ats.datasets import Sample
from ats.tokens import KeptTokens

FADED = 0.15  # how much of a dropped patch stays visible on white


def kept_patches_image(image: Tensor, patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """The image with every patch that is not kept faded.

    Args:
        image: [3, H, W] in 0..1.
        patches: indices of the kept patches, row major over `grid` (rows, columns).

    Returns:
        [3, H, W].
    """
    keep = torch.zeros(grid[0] * grid[1])
    keep[patches.cpu()] = 1
    height, width = image.shape[1] // grid[0], image.shape[2] // grid[1]
    keep = keep.reshape(grid).repeat_interleave(height, 0).repeat_interleave(width, 1)
    visible = FADED + (1 - FADED) * keep
    return image[:, : keep.shape[0], : keep.shape[1]] * visible + (1 - visible)


def kept_tokens_sheet(images: Tensor, trace: Sequence[KeptTokens], grid: tuple[int, int]) -> Tensor:
    """The same as one picture [3, B * H, (1 + blocks) * W] without captions, for TensorBoard.

    Args:
        images, trace, grid: as of `draw_kept_tokens`.
    """
    height, width = (images.shape[2] // grid[0] * grid[0], images.shape[3] // grid[1] * grid[1])
    images = images[:, :, :height, :width].clamp(0, 1)
    rows = [
        torch.cat([image, *(kept_patches_image(image, entry.patches[row], grid) for entry in trace)], dim=2)
        for row, image in enumerate(images)
    ]
    return torch.cat(rows, dim=1)


@torch.no_grad()
def draw_fixed_images(
    model: nn.Module, dataset: Dataset[Sample], num_images: int, *, mean: Sequence[float], std: Sequence[float]
) -> Tensor | None:
    """`kept_tokens_sheet` of images spread evenly over a data set, always the same ones.

    Args:
        model: a network with a `patch_size` and ATS blocks; of others, and of clips, there is no picture.
        mean, std: of the data set's normalisation.
    """
    num_images = min(num_images, len(dataset))
    if num_images < 1 or not hasattr(model, "patch_size"):
        return None
    x = torch.stack([dataset[index * len(dataset) // num_images].x for index in range(num_images)])
    if x.ndim != 4:
        return None
    was_training = model.training
    _, trace = model.eval().forward_tokens(x.to(next(model.parameters()).device))
    model.train(was_training)
    mean, std = (torch.tensor(values)[:, None, None] for values in (mean, std))
    grid = (x.shape[2] // model.patch_size, x.shape[3] // model.patch_size)
    return kept_tokens_sheet(x * std + mean, trace, grid) if trace else None


def draw_kept_tokens(
    path: str | Path,
    images: Tensor,
    trace: Sequence[KeptTokens],
    grid: tuple[int, int],
    *,
    captions: Sequence[str] = (),
) -> Path:
    """Write a picture: a row per image; the input, then what each ATS block kept, with the count.

    Args:
        path: of the PNG.
        images: [B, 3, H, W] in 0..1.
        trace: second result of `model.forward_tokens` for these images.
        grid: rows and columns of patches.
        captions: one text per image.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    num_rows, num_columns = len(images), len(trace) + 1
    figure, axes = plt.subplots(
        num_rows, num_columns, figsize=(1.1 * num_columns, 1.25 * num_rows), squeeze=False, layout="constrained"
    )
    for row, image in enumerate(images):
        pictures = [image] + [kept_patches_image(image, entry.patches[row], grid) for entry in trace]
        counts = [captions[row] if captions else ""] + [f"{len(entry.patches[row])}" for entry in trace]
        for axis, picture, count in zip(axes[row], pictures, counts, strict=True):
            axis.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
            axis.set_xlabel(count, fontsize=8, labelpad=2)
            axis.set_xticks([])
            axis.set_yticks([])
            axis.spines[:].set_visible(False)
    for axis, title in zip(axes[0], ["image", *(f"block {entry.block}" for entry in trace)], strict=True):
        axis.set_title(title, fontsize=8)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def kept_patches_clips(clips: Tensor, entry: KeptTokens, grid: tuple[int, int]) -> Tensor:
    """Clips with every patch that is not kept faded, frame by frame.

    Args:
        clips: [B, 3, T, H, W] in 0..1.
        entry: of the trace of a network whose sequences are frames (XViT, divided TimeSformer).
    """
    frames = clips.transpose(1, 2).flatten(0, 1)
    faded = [kept_patches_image(frame, patches, grid) for frame, patches in zip(frames, entry.patches, strict=True)]
    return torch.stack(faded).unflatten(0, (len(clips), -1)).transpose(1, 2)


def draw_kept_over_time(
    path: str | Path,
    clips: Tensor,
    trace: Sequence[KeptTokens],
    grid: tuple[int, int],
    *,
    captions: Sequence[str] = (),
) -> Path:
    """Write a picture: for every clip a row with its frames, and one per entry of `trace` with what that block kept and
    the number of patches.

    Args:
        path: of the PNG.
        clips: [B, 3, T, H, W] in 0..1.
        trace: entries to draw, see `kept_patches_clips`.
        captions: one text per clip.
    """
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    num_clips, _, num_frames = clips.shape[:3]
    figure = plt.figure(figsize=(1.05 * num_frames, (1.2 * (len(trace) + 1) + 0.2) * num_clips), layout="constrained")
    strips = [clips, *(kept_patches_clips(clips, entry, grid) for entry in trace)]
    names = ["frames", *(f"block {entry.block}" for entry in trace)]
    counts = [[""] * (num_clips * num_frames), *([f"{len(patches)}" for patches in entry.patches] for entry in trace)]
    for number, part in enumerate(figure.subfigures(num_clips, 1, squeeze=False)[:, 0]):
        axes = part.subplots(len(strips), num_frames, squeeze=False, gridspec_kw={"wspace": 0.03, "hspace": 0.03})
        if captions:
            part.suptitle(captions[number], fontsize=9)
        for row, strip, name, count in zip(axes, strips, names, counts, strict=True):
            row[0].set_ylabel(name, fontsize=8)
            for t, axis in enumerate(row):
                axis.set_xlabel(count[number * num_frames + t], fontsize=8, labelpad=2)
                axis.imshow(strip[number, :, t].permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
                axis.set_xticks([])
                axis.set_yticks([])
                axis.spines[:].set_visible(False)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def animate_kept_tokens(
    path: str | Path,
    clips: Tensor,
    trace: Sequence[KeptTokens],
    grid: tuple[int, int],
    *,
    scale: int = 2,
    margin: int = 4,
    milliseconds: int = 150,
) -> Path:
    """Write an animated GIF: a column per clip; its frames on top, what each entry of `trace` kept below.

    Args:
        clips, trace: as of `draw_kept_over_time`.
        scale: pixels of the GIF per pixel. margin: white pixels between pictures. milliseconds: per frame.
    """
    strips = torch.stack([clips, *(kept_patches_clips(clips, entry, grid) for entry in trace)])  # [R, B, 3, T, H, W]
    strips = strips.repeat_interleave(scale, -2).repeat_interleave(scale, -1)
    strips = torch.nn.functional.pad(strips, (margin,) * 4, value=1.0)
    pixels = (strips.clamp(0, 1) * 255).round().byte().permute(3, 0, 4, 1, 5, 2)  # [T, R, H, B, W, 3]
    frames = [Image.fromarray(frame.numpy()) for frame in pixels.flatten(3, 4).flatten(1, 2)]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    return path
