"""Pictures in files: figures with captions (matplotlib), and animated GIFs of clips."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ats.errors import needing, printable_lines, rounded
from ats.files import write_picture
from ats.visualize.compare import Guess, SampleView
from ats.visualize.grids import BlockView
from ats.visualize.pictures import draw, heat

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

# Captions; dense network; network with ATS; wrong.
GREY, BLUE, ORANGE, RED = "#667085", "#5b7fb5", "#e07b39", "#b42318"
SPACE = {"wspace": 0.02, "hspace": 0.02}  # between pictures, as a share of their size
SHEET_COLUMNS = 6
LEAST_PIXELS = 192  # smaller pictures are enlarged to about this width
# Of animations: height of the line above, white pixels around each clip, time per frame.
TITLE_PIXELS, MARGIN, FRAME_MILLISECONDS = 22, 4, 150


def draw_strip(path: str | Path, view: SampleView, *, title: str, names: Sequence[str]) -> Path:
    """Write a PNG of one sample: input, tokens kept after the ATS blocks and their counts, significance, and predicted
    class and confidence with and without ATS.

    For an image the columns are blocks. For a clip they are frames, and rows are the first, middle and last block.
    `title` names the sample, `names` the classes.
    """
    figure = _image_strip(view, names) if view.picture.shape[1] == 1 else _clip_strip(view, names)
    share = 100 * view.gflops / view.dense_gflops
    cost = f"{rounded(view.gflops, 3)} of {rounded(view.dense_gflops, 3)} GFLOPs ({share:.0f} %)"
    figure.suptitle(f"{plain(title)}   ", x=0.01, ha="left", fontsize=10, fontweight="bold")
    figure.text(0.99, 0.985, cost, ha="right", va="top", fontsize=8.5, color=GREY)
    write_picture(path, figure.savefig, dpi=150)
    return Path(path)


class SheetCell(NamedTuple):
    """A sample on a contact sheet."""

    pictures: Tensor  # [3, H, 2 W]: the input (of a clip the middle frame) and what the last ATS block kept of it
    caption: str
    is_right: bool | None  # the class predicted with ATS; None if the true one is not known


def sheet_cell(view: SampleView, *, label: int | None, names: Sequence[str]) -> SheetCell:
    """A sample with its true class, if `label` is not None, and what both networks predict."""
    middle, block = view.picture.shape[1] // 2, view.blocks[-1]
    guesses = (f"{name} {_short(names[own.label])}" for name, own in (("dense", view.dense), ("ATS", view.ats)))
    lines = [*([] if label is None else [f"is {_short(names[label])}"]), *guesses, f"{int(block.num_kept)} tokens"]
    pictures = torch.cat([view.picture[:, middle], draw(view.picture, block)[:, middle]], dim=2)
    return SheetCell(pictures, "\n".join(lines), None if label is None else label == view.ats.label)


def draw_sheet(path: str | Path, cells: Sequence[SheetCell], *, title: str) -> Path:
    """Write a PNG with a cell for each sample; captions are red where the class predicted with ATS is wrong."""
    columns = min(len(cells), SHEET_COLUMNS)
    rows = -(-len(cells) // columns)
    figure = _figure(2.3 * columns, 1.85 * rows + 0.4)
    for axis, cell in itertools.zip_longest(figure.subplots(rows, columns, squeeze=False).flat, cells):
        if cell is None:
            axis.set_axis_off()
            continue
        _show(axis, cell.pictures, below=cell.caption)
        axis.xaxis.label.set_color(RED if cell.is_right is False else "black")
    figure.suptitle(plain(title), fontsize=10)
    write_picture(path, figure.savefig, dpi=110)
    return Path(path)


def _short(name: str) -> str:
    """A class name without its synonyms, cut if it is long."""
    name = name.split(",")[0]
    return name if len(name) <= 20 else f"{name[:19]}…"


def _image_strip(view: SampleView, names: Sequence[str]) -> Figure:
    columns = max(len(view.blocks) + 1, 4)
    figure = _figure(1.18 * columns + 0.2, 3.15)
    axes = figure.subplots(2, columns, squeeze=False)
    size, first = view.picture.shape[1:], view.blocks[0].block
    _show(axes[0, 0], view.picture[:, 0], above="input", below=f"{view.blocks[0].num_tokens} tokens")
    for column, block in zip(axes.T[1:], view.blocks, strict=False):
        kept = draw(view.picture, block)[:, 0]
        _show(column[0], kept, above=f"block {block.block}", below=f"{int(block.num_kept)} kept")
        _show(column[1], heat(block.scores, size)[:, 0], below="" if block.block > first else "significance")
    for axis in axes[:, len(view.blocks) + 1 :].flat:
        axis.set_axis_off()
    _draw_guesses(axes[1, 0], view, names)
    return figure


def _clip_strip(view: SampleView, names: Sequence[str]) -> Figure:
    num_frames, size = view.picture.shape[1], view.picture.shape[1:]
    blocks = first_middle_last(view.blocks)
    lines = [("frames", view.picture), (f"significance\nblock {blocks[0].block}", heat(blocks[0].scores, size))]
    lines += [(f"block {b.block}\n{int(b.num_kept)} of {b.num_tokens}", draw(view.picture, b)) for b in blocks]
    height = 1.05 * len(lines)
    figure = _figure(0.98 * num_frames + 2.4, height + 0.4)
    [[left, right]] = figure.subfigures(1, 2, squeeze=False, width_ratios=(1.4, 0.98 * num_frames + 1))
    _draw_lines(right, [(*line, [""] * num_frames) for line in lines])
    top, below = left.subplots(2, 1, height_ratios=(1.3, max(height - 1.3, 0.1)))
    _draw_guesses(top, view, names)
    below.set_axis_off()
    return figure


def first_middle_last(blocks: Sequence[BlockView]) -> list[BlockView]:
    """The first, middle and last block; all blocks if there are fewer than three."""
    return [blocks[i] for i in sorted({0, len(blocks) // 2, len(blocks) - 1})]


def _draw_guesses(axis: Axes, view: SampleView, names: Sequence[str]) -> None:
    """Two bars: the class each network predicts, and its confidence."""
    axis.set_axis_off()
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
    guesses: list[tuple[str, Guess, str]] = [("dense", view.dense, BLUE), ("with ATS", view.ats, ORANGE)]
    for top, (name, guess, colour) in zip((0.92, 0.42), guesses, strict=True):
        axis.text(0, top, name, fontsize=7, color=GREY, va="top")
        axis.text(1, top, f"{100 * guess.confidence:.1f} %", fontsize=7, color=GREY, va="top", ha="right")
        axis.text(0, top - 0.13, plain(_short(names[guess.label])), fontsize=9, fontweight="bold", va="top")
        axis.barh(top - 0.36, 1, height=0.05, color="#e4e7ec")
        axis.barh(top - 0.36, guess.confidence, height=0.05, color=colour)


def draw_kept_tokens(
    path: str | Path, pictures: Tensor, views: Sequence[BlockView], *, captions: Sequence[str] = ()
) -> Path:
    """Write a PNG of several samples and of what ATS blocks kept of them, with the number of tokens.

    An image has a row: itself, then a picture per block. A clip has a row of its frames, then one per block.

    Args:
        pictures: [B, 3, T, H, W] in 0..1, T = 1 for images.
        views: of these samples, one per block, see `look`. captions: one text per sample.
    """
    num_frames, names = pictures.shape[2], [f"block {view.block}" for view in views]
    scale = max(LEAST_PIXELS // pictures.shape[-1], 1)  # lines between groups are one pixel wide
    pictures = pictures.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
    drawn = [draw(pictures, view) for view in views]
    lines = []
    for i, picture in enumerate(pictures):
        caption, kept = captions[i] if captions else "", [shown[i] for shown in drawn]
        if num_frames == 1:
            below = [caption, *(int(view.num_kept[i]) for view in views)]
            lines.append(("", torch.cat([picture, *kept], dim=1), below))
        else:
            counts: list[Any] = [view.kept[i].flatten(1).sum(dim=1) for view in views]  # a cell may span several frames
            counts = [count.repeat_interleave(num_frames // len(count)).tolist() for count in counts]
            lines += [(caption or "frames", picture, [""] * num_frames), *zip(names, kept, counts, strict=True)]
    figure = _figure(1.1 * lines[0][1].shape[1] + (0.9 if num_frames > 1 else 0), 1.25 * len(lines))
    _draw_lines(figure, lines, above=["image", *names] if num_frames == 1 else ())
    write_picture(path, figure.savefig, dpi=150)
    return Path(path)


def _draw_lines(
    figure: Figure | SubFigure, lines: Sequence[tuple[str, Tensor, Sequence]], above: Sequence[str] = ()
) -> None:
    """Draw lines of N pictures: (name, pictures [3, N, H, W], N texts below them). `above`: texts above the first."""
    axes = figure.subplots(len(lines), lines[0][1].shape[1], squeeze=False, gridspec_kw=SPACE)
    for row, (name, pictures, below) in zip(axes, lines, strict=True):
        row[0].set_ylabel(plain(name), fontsize=8, rotation=0, ha="right", va="center", color=GREY)
        for axis, picture, text in zip(row, pictures.unbind(1), below, strict=True):
            _show(axis, picture, below=text)
    for axis, text in zip(axes[0], above, strict=False):
        axis.set_title(text, fontsize=8)


def _show(axis: Axes, picture: Tensor, *, above: str = "", below: str | int = "") -> None:
    """Draw a picture [3, H, W] without frame and ticks, with text above and below."""
    axis.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
    if above:
        axis.set_title(above, fontsize=8)
    axis.set_xlabel(plain(str(below)), fontsize=8, labelpad=2)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)


def plain(text: str) -> str:
    """Text for matplotlib, with $ escaped: it would parse a formula, and raise if that is malformed."""
    return printable_lines(text).replace("$", r"\$")


def _figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches."""
    with needing("matplotlib", what="Figures need"):
        from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def animate(path: str | Path, clips: Tensor, *, titles: Sequence[str] = (), scale: int = 2) -> Path:
    """Write a grid of clips as one animated GIF.

    Args:
        clips: [rows, columns, 3, T, H, W] in 0..1.
        titles: one per column, written above it. scale: pixels of the GIF per pixel.
    """
    clips = F.pad(clips.repeat_interleave(scale, -2).repeat_interleave(scale, -1), (MARGIN,) * 4, value=1.0)
    pixels = (clips.clamp(0, 1) * 255).round().byte().permute(3, 0, 4, 1, 5, 2)  # [T, rows, H, columns, W, 3]
    first, *others = (_with_titles(Image.fromarray(f.numpy()), titles) for f in pixels.flatten(3, 4).flatten(1, 2))
    options = {"append_images": others, "duration": FRAME_MILLISECONDS, "loop": 0}
    write_picture(path, first.save, save_all=True, **options)
    return Path(path)


def _with_titles(frame: Image.Image, titles: Sequence[str]) -> Image.Image:
    if not titles:
        return frame
    titled = Image.new("RGB", (frame.width, frame.height + TITLE_PIXELS), "white")
    titled.paste(frame, (0, TITLE_PIXELS))
    draw, font = ImageDraw.Draw(titled), ImageFont.load_default(size=12)
    for column, title in enumerate(titles):
        draw.text((column * frame.width / len(titles) + MARGIN, 6), title, fill=(60, 60, 60), font=font)
    return titled
