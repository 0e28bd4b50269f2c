"""Figures with captions, drawn by matplotlib: sheets of several samples, and a strip for each sample.

`draw_strip` is what `tools/visualize.py` writes; the sheets are those of the demos.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from torch import Tensor

from ats.errors import UserError
from ats.tokens import KeptTokens
from ats.visualize.compare import Guess, SampleView, class_label
from ats.visualize.grids import BlockView
from ats.visualize.pictures import fade, heat, kept_patches_clips, kept_patches_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GREY, BLUE, ORANGE = "#667085", "#5b7fb5", "#e07b39"  # of captions; of the dense network; of that with ATS


def draw_strip(path: str | Path, view: SampleView, *, title: str, names: Sequence[str] = ()) -> Path:
    """Write what became of one sample: input, tokens kept behind the ATS blocks with their counts, significance, and
    class and confidence with and without ATS.

    Of an image columns are blocks. Of a clip columns are frames, and blocks are the first, middle and last.

    Args:
        path: of the PNG. title: a name for the sample. names: of the classes.
    """
    figure = _image_strip(view, names) if view.picture.shape[1] == 1 else _clip_strip(view, names)
    share = f"{view.gflops:.3g} of {view.dense_gflops:.3g} GFLOPs ({100 * view.gflops / view.dense_gflops:.0f} %)"
    figure.suptitle(f"{title}   ", x=0.01, ha="left", fontsize=10, fontweight="bold")
    figure.text(0.99, 0.985, share, ha="right", va="top", fontsize=8.5, color=GREY)
    return _save(figure, path)


def _image_strip(view: SampleView, names: Sequence[str]) -> Figure:
    columns = max(len(view.blocks) + 1, 4)
    figure = _pyplot().figure(figsize=(1.18 * columns + 0.2, 3.15), layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False)
    size, first = view.picture.shape[1:], view.blocks[0].block
    _show(axes[0, 0], view.picture[:, 0], above="input", below=f"{view.blocks[0].num_tokens} tokens")
    for column, block in zip(axes.T[1:], view.blocks, strict=False):
        kept = fade(view.picture, block.kept)[:, 0]
        _show(column[0], kept, above=f"block {block.block}", below=f"{int(block.num_kept)} kept")
        _show(column[1], heat(block.scores, size)[:, 0], below="" if block.block > first else "significance")
    for axis in axes[:, len(view.blocks) + 1 :].flat:
        axis.set_axis_off()
    _draw_guesses(axes[1, 0], view, names)
    return figure


def _clip_strip(view: SampleView, names: Sequence[str]) -> Figure:
    num_frames, size = view.picture.shape[1], view.picture.shape[1:]
    blocks = first_middle_last(view.blocks)
    rows = [("frames", view.picture), (f"significance\nblock {blocks[0].block}", heat(blocks[0].scores, size))]
    rows += [(f"block {b.block}\n{int(b.num_kept)} of {b.num_tokens}", fade(view.picture, b.kept)) for b in blocks]
    height = 1.05 * len(rows)
    figure = _pyplot().figure(figsize=(0.98 * num_frames + 2.4, height + 0.4), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.4, 0.98 * num_frames + 1))
    axes = right.subplots(len(rows), num_frames, squeeze=False, gridspec_kw={"wspace": 0.02, "hspace": 0.02})
    for line, (name, clip) in zip(axes, rows, strict=True):
        line[0].set_ylabel(name, fontsize=8, rotation=0, ha="right", va="center", color=GREY)
        for t, axis in enumerate(line):
            _show(axis, clip[:, t])
    top, below = left.subplots(2, 1, height_ratios=(1.3, max(height - 1.3, 0.1)))
    _draw_guesses(top, view, names)
    below.set_axis_off()
    return figure


def first_middle_last(blocks: Sequence[BlockView]) -> list[BlockView]:
    """Three of the blocks, or all if there are fewer."""
    return [blocks[i] for i in sorted({0, len(blocks) // 2, len(blocks) - 1})]


def _draw_guesses(axis: Axes, view: SampleView, names: Sequence[str]) -> None:
    """Two bars: what each network takes the sample for, and how sure it is."""
    axis.set_axis_off()
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1)
    guesses: list[tuple[str, Guess, str]] = [("dense", view.dense, BLUE), ("with ATS", view.ats, ORANGE)]
    for top, (name, guess, colour) in zip((0.92, 0.42), guesses, strict=True):
        label = class_label(names, guess.label).split(",")[0]
        label = label if len(label) <= 20 else f"{label[:19]}…"
        axis.text(0, top, name, fontsize=7, color=GREY, va="top")
        axis.text(1, top, f"{100 * guess.confidence:.1f} %", fontsize=7, color=GREY, va="top", ha="right")
        axis.text(0, top - 0.13, label, fontsize=9, fontweight="bold", va="top")
        axis.barh(top - 0.36, 1, height=0.05, color="#e4e7ec")
        axis.barh(top - 0.36, guess.confidence, height=0.05, color=colour)


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
    plt = _pyplot()
    num_rows, num_columns = len(images), len(trace) + 1
    figure, axes = plt.subplots(
        num_rows, num_columns, figsize=(1.1 * num_columns, 1.25 * num_rows), squeeze=False, layout="constrained"
    )
    for row, image in enumerate(images):
        pictures = [image] + [kept_patches_image(image, entry.patches[row], grid) for entry in trace]
        counts = [captions[row] if captions else ""] + [f"{len(entry.patches[row])}" for entry in trace]
        for axis, picture, count in zip(axes[row], pictures, counts, strict=True):
            _show(axis, picture, below=count)
    for axis, title in zip(axes[0], ["image", *(f"block {entry.block}" for entry in trace)], strict=True):
        axis.set_title(title, fontsize=8)
    return _save(figure, path)


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
    plt = _pyplot()
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
                _show(axis, strip[number, :, t], below=count[number * num_frames + t])
    return _save(figure, path)


def _show(axis: Axes, picture: Tensor, *, above: str = "", below: str = "") -> None:
    """A picture [3, H, W] without frame and ticks, with text above and below."""
    axis.imshow(picture.permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
    if above:
        axis.set_title(above, fontsize=8)
    axis.set_xlabel(below, fontsize=8, labelpad=2)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)


def _save(figure: Figure, path: str | Path) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    _pyplot().close(figure)
    return path


def _pyplot() -> ModuleType:
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("Figures are drawn by matplotlib, which is not installed: pip install matplotlib") from error
    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    return plt
