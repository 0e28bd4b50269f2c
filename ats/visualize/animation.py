"""Animated GIFs of clips and of what is kept of them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ats.tokens import KeptTokens
from ats.visualize.pictures import kept_patches_clips

TITLE_PIXELS = 22  # height of the line above an animation


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
    rows = [clips, *(kept_patches_clips(clips, entry, grid) for entry in trace)]
    return animate(path, torch.stack(rows), scale=scale, margin=margin, milliseconds=milliseconds)


def animate(
    path: str | Path,
    clips: Tensor,
    *,
    titles: Sequence[str] = (),
    scale: int = 2,
    margin: int = 4,
    milliseconds: int = 150,
) -> Path:
    """Write clips that run beside and below each other as an animated GIF.

    Args:
        clips: [rows, columns, 3, T, H, W] in 0..1.
        titles: one per column, written above it.
        scale, margin, milliseconds: as of `animate_kept_tokens`.
    """
    clips = clips.repeat_interleave(scale, -2).repeat_interleave(scale, -1)
    clips = F.pad(clips, (margin,) * 4, value=1.0)
    pixels = (clips.clamp(0, 1) * 255).round().byte().permute(3, 0, 4, 1, 5, 2)  # [T, rows, H, columns, W, 3]
    frames = [_with_titles(Image.fromarray(f.numpy()), titles, margin) for f in pixels.flatten(3, 4).flatten(1, 2)]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    return path


def _with_titles(frame: Image.Image, titles: Sequence[str], margin: int) -> Image.Image:
    if not titles:
        return frame
    titled = Image.new("RGB", (frame.width, frame.height + TITLE_PIXELS), "white")
    titled.paste(frame, (0, TITLE_PIXELS))
    draw, font = ImageDraw.Draw(titled), ImageFont.load_default(size=12)
    for column, title in enumerate(titles):
        draw.text((column * frame.width / len(titles) + margin, 6), title, fill=(60, 60, 60), font=font)
    return titled
