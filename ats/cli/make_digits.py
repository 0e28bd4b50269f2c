"""Make the Digits data set: real handwritten digits on cluttered canvases, in the ImageNet folder layout.

    python tools/make_digits.py --output data/digits

scikit-learn ships 1,797 handwritten digits of 8 x 8 pixels. They are split by digit image, stratified by class: 80 %
for training, 20 % for validation. Each digit is enlarged, slightly rotated and placed at random on several canvases,
among fragments (about half a digit each) of other digits of the *same split*. So nothing in the validation images, not
even a fragment, was seen in training. The number of fragments varies between canvases, and with it the number of tokens
an image needs. The label is unambiguous: fragments stay out of the digit's box, and each is smaller than a digit.
Training canvases slant, stretch and thicken the digit more than validation canvases do. This is augmentation that,
unlike crops, never cuts off a digit.

    <output>/train/<class>/<digit>_<copy>.png     <digit> is the index in sklearn.datasets.load_digits()
    <output>/val/<class>/<digit>_<copy>.png
    <output>/SHA256SUMS                           one checksum per split, over the names and bytes of all its files
    <output>/digits.json                          settings, counts, number of distractors in every image

Each image depends only on (seed, split, digit, copy, size), not on the number of processes or copies.
"""

from __future__ import annotations

import io
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from ats.cli.generated_folder import Kind, make_folder, map_in_processes, run_tool
from ats.cli.parser import command_parser, in_range, to_path
from ats.errors import UserError, needing
from ats.options import SEED, Range

KIND = Kind("Digits", "digits.json")
SOURCE = "scikit-learn's load_digits(): optical recognition of handwritten digits, UCI (Alpaydin and Kaynak)"
VERSION = 2  # of the pictures: raise it when they change, so that old folders are remade
VAL_FRACTION = 0.2
NUM_CELLS = 8  # per side of the grid that digits are placed on; each cell is a patch of configs/Digits
MAX_DISTRACTORS = 10  # per canvas; a crowded canvas gets as many as fit
NUM_ATTEMPTS = 12  # to place a distractor
NUM_FRAGMENTS = 4096  # drawn once per split and reused, because drawing them is slow
MIN_SIZE = 32


class Digits(NamedTuple):
    """The source digits of one split: images [N, 8, 8] in 0..1, labels [N], ids [N] (index in load_digits())."""

    images: np.ndarray
    labels: np.ndarray
    ids: np.ndarray


class Variation(NamedTuple):
    """How much a digit varies between canvases; values are half-widths of uniform distributions."""

    angle: float  # degrees
    shear: float  # horizontal, in pixels per pixel
    stretch: float  # logarithm of height over width
    weight: float  # of the strokes: how dark a pixel must be to count as ink


VARIATION = {
    "train": Variation(angle=16.0, shear=0.25, stretch=0.22, weight=0.09),
    "val": Variation(angle=8.0, shear=0.08, stretch=0.0, weight=0.0),
}


class Box(NamedTuple):
    """A rectangle of pixels: top, left, height, width."""

    top: int
    left: int
    height: int
    width: int

    def meets_any(self, others: list[Box], *, gap: int) -> bool:
        """Whether fewer than `gap` pixels lie between this box and any of the others."""
        top, left, height, width = self
        return any(
            top < other_top + other_height + gap
            and other_top < top + height + gap
            and left < other_left + other_width + gap
            and other_left < left + width + gap
            for other_top, other_left, other_height, other_width in others
        )


def split_digits(*, seed: int) -> dict[str, Digits]:
    """Split scikit-learn's digits by image, stratified by class.

    Returns:
        `{"train": Digits, "val": Digits}`, about 80 % and 20 % of every class.
    """
    with needing("scikit-learn", what="These digits need"):
        from sklearn.datasets import load_digits  # takes a second to import; not needed if up to date

    source = load_digits()
    rng = np.random.default_rng(seed)
    val_ids: list[int] = []
    for label in range(10):
        ids = rng.permutation(np.flatnonzero(source.target == label))
        val_ids.extend(ids[: round(len(ids) * VAL_FRACTION)])
    in_val = np.isin(np.arange(len(source.target)), val_ids)
    images = (source.images / 16).astype(np.float32)
    return {
        split: Digits(images[mask], source.target[mask], np.flatnonzero(mask))
        for split, mask in (("train", ~in_val), ("val", in_val))
    }


def draw_strokes(
    glyph: np.ndarray,
    *,
    scale: float,
    angle: float,
    shear: float = 0.0,
    stretch: float = 0.0,
    threshold: float = 0.3,
) -> np.ndarray:
    """Enlarge and rotate a small glyph, and crop it to its ink.

    Args:
        glyph: [h, w] in 0..1.
        scale: pixels per glyph cell. angle: degrees. shear: horizontal, in pixels per pixel.
        stretch: logarithm of height over width. threshold: the darkness at which ink starts; lower is bolder.

    Returns:
        Opacity [H, W] in 0..1 whose first and last rows and columns have ink; [0, 0] if the glyph is blank.
    """
    padded = np.zeros((glyph.shape[0] + 4, glyph.shape[1] + 4), np.float32)  # bicubic needs a blank surround
    padded[2:-2, 2:-2] = glyph
    out_size = math.ceil(math.hypot(*padded.shape) * scale * math.exp(abs(stretch) / 2))
    cos, sin = math.cos(math.radians(angle)) / scale, math.sin(math.radians(angle)) / scale
    wide, tall = math.exp(stretch / 2), math.exp(-stretch / 2)
    a, b, d, e = cos * wide, (sin + shear * cos) * wide, -sin * tall, (cos - shear * sin) * tall  # pixel -> glyph cell
    c = padded.shape[1] / 2 - (a + b) * out_size / 2
    f = padded.shape[0] / 2 - (d + e) * out_size / 2
    image = Image.fromarray(padded).transform(
        (out_size, out_size), Image.Transform.AFFINE, (a, b, c, d, e, f), resample=Image.Resampling.BICUBIC
    )
    ink = np.clip((np.asarray(image) - threshold) / 0.45, 0, 1)  # enlarging blurs; make the strokes crisp again
    rows, columns = np.flatnonzero(ink.any(axis=1)), np.flatnonzero(ink.any(axis=0))
    if not len(rows):
        return np.zeros((0, 0), np.float32)
    return ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


class Fragment(NamedTuple):
    """A distractor: the opacity of its strokes, [H, W] in 0..1, and the index in `Digits` of its source digit."""

    strokes: np.ndarray
    source: int


def cut_fragments(digits: Digits, *, seed: list[int], num_fragments: int, cell: float) -> list[Fragment]:
    """Cut pieces of about half a digit - upper or lower half, or a corner - and draw them at any angle.

    Args:
        cell: pixels of the canvas per 1/60 of its side.
    """
    # Not the left or right half: in 4, 7 and 9 that is a stroke as tall as a digit, which looks like a 1.
    pieces = [np.s_[:4, :], np.s_[4:, :], np.s_[:5, :5], np.s_[:5, 3:], np.s_[3:, :5], np.s_[3:, 3:]]
    rng = np.random.default_rng(seed)
    fragments: list[Fragment] = []
    while len(fragments) < num_fragments:
        source, piece = int(rng.integers(len(digits.ids))), pieces[rng.integers(len(pieces))]
        strokes = draw_strokes(
            digits.images[source][piece], scale=rng.uniform(1.8, 2.4) * cell, angle=rng.uniform(0, 360)
        )
        if min(strokes.shape) >= 4 * cell:  # a corner may be nearly blank
            fragments.append(Fragment(strokes, source))
    return fragments


def draw_background(rng: np.random.Generator, size: int) -> np.ndarray:
    """A dark, tinted gradient with soft blotches and a little sensor noise, [size, size, 3] in 0..1."""
    tint = rng.uniform(0.06, 0.30, 3).astype(np.float32)
    ramp = np.linspace(-0.1, 0.1, 6)
    grid = rng.normal(0, 0.03, (6, 6)) + rng.normal() * ramp + rng.normal() * ramp[:, None]
    shade = Image.fromarray(grid.astype(np.float32)).resize((size, size), Image.Resampling.BICUBIC)
    noise = rng.standard_normal((size, size), dtype=np.float32) * rng.uniform(0.002, 0.02)
    return tint + (np.asarray(shade) + noise)[..., None]


def draw_digit(rng: np.random.Generator, glyph: np.ndarray, *, variation: Variation, size: int) -> np.ndarray:
    """Draw a digit [8, 8] for a canvas of `size` pixels, as `draw_strokes` returns it."""
    return draw_strokes(
        glyph,
        scale=rng.uniform(2.7, 3.2) * size / 60,  # everything scales with the canvas
        angle=rng.uniform(-1, 1) * variation.angle,
        shear=rng.uniform(-1, 1) * variation.shear,
        stretch=rng.uniform(-1, 1) * variation.stretch,
        threshold=0.3 + rng.uniform(-1, 1) * variation.weight,
    )


def draw_ink(rng: np.random.Generator) -> np.ndarray:
    """The colour of a canvas's strokes, [3] in 0..1."""
    return rng.uniform(0.7, 1.0, 3).astype(np.float32)


def place(canvas: np.ndarray, strokes: np.ndarray, box: Box, *, ink: np.ndarray, opacity: float) -> None:
    """Paint strokes into their box of the canvas."""
    window = canvas[box.top : box.top + box.height, box.left : box.left + box.width]
    window += (opacity * strokes)[..., None] * (ink - window)


def box_at(strokes: np.ndarray, y: float, x: float, *, size: int) -> Box:
    """The box of strokes at y, x in 0..1, which covers all positions that fit on the canvas."""
    height, width = strokes.shape
    return Box(int(y * (size - height + 1)), int(x * (size - width + 1)), height, width)


def scatter_fragments(
    rng: np.random.Generator,
    canvas: np.ndarray,
    fragments: list[Fragment],
    *,
    ink: np.ndarray,
    taken: list[Box],
    avoid: int,
    max_distractors: int = MAX_DISTRACTORS,
) -> int:
    """Place up to `max_distractors` fragments that touch neither a box in `taken` nor each other.

    Args:
        avoid: use no fragment of this digit (an index in `Digits`).

    Returns:
        The number of fragments placed.
    """
    size = len(canvas)
    gap = round(size / 30)
    boxes = list(taken)
    num_distractors = rng.integers(max_distractors + 1)
    choices = rng.integers(len(fragments), size=num_distractors)
    opacities = rng.uniform(0.6, 1.0, num_distractors)
    attempts = rng.random((num_distractors, NUM_ATTEMPTS, 2)).tolist()
    for choice, opacity, corners in zip(choices, opacities, attempts, strict=True):
        strokes, source = fragments[choice]
        if source == avoid:
            continue
        for y, x in corners:
            box = box_at(strokes, y, x, size=size)
            if not box.meets_any(boxes, gap=gap):
                boxes.append(box)
                place(canvas, strokes, box, ink=ink, opacity=opacity)
                break
    return len(boxes) - len(taken)


def to_pixels(canvas: np.ndarray) -> np.ndarray:
    """A canvas in 0..1 as uint8."""
    return (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)


def make_canvas(
    rng: np.random.Generator,
    digits: Digits,
    index: int,
    *,
    fragments: list[Fragment],
    variation: Variation,
    size: int,
) -> tuple[Image.Image, int, Box]:
    """Place digit `index` of `digits` on a canvas among fragments of other digits.

    Returns:
        The RGB image [size, size], the number of distractors on it, and the digit's box.
    """
    canvas, ink = draw_background(rng, size), draw_ink(rng)
    strokes = draw_digit(rng, digits.images[index], variation=variation, size=size)
    box = snap(box_at(strokes, *rng.random(2), size=size), size=size)
    place(canvas, strokes, box, ink=ink, opacity=rng.uniform(0.75, 1.0))
    num_distractors = scatter_fragments(rng, canvas, fragments, ink=ink, taken=[box], avoid=index)
    return Image.fromarray(to_pixels(canvas)), num_distractors, box


def snap(box: Box, *, size: int) -> Box:
    """Move the box so that its centre is on an 8 x 8 grid and the box inside the canvas.

    A vision transformer is not translation invariant, and learning every offset between digits and patches takes more
    training than a demo can afford. So digits move in steps of a patch; size, slant and angle vary freely.
    """
    cell = size / NUM_CELLS

    def nearest(low: int, length: int) -> int:
        centre = round((low + length / 2) / cell) * cell
        return int(min(max(centre - length / 2, 0), size - length))

    return box._replace(top=nearest(box.top, box.height), left=nearest(box.left, box.width))


def _write_digit(
    index: int,
    *,
    digits: Digits,
    fragments: list[Fragment],
    variation: Variation,
    folder: Path,
    per_digit: int,
    size: int,
    seed: list[int],
) -> list[tuple[str, int]]:
    """Write all canvases of one digit; returns (name relative to `folder`, number of distractors) for each."""
    digit_id, label = int(digits.ids[index]), int(digits.labels[index])
    written = []
    for copy in range(per_digit):
        rng = np.random.default_rng([*seed, digit_id + 1, copy])  # the fragments use stream 0
        image, num_distractors, _ = make_canvas(rng, digits, index, fragments=fragments, variation=variation, size=size)
        name = f"{label}/{digit_id:04d}_{copy:02d}.png"
        png = io.BytesIO()
        image.save(png, format="png", compress_level=1)
        (folder / name).write_bytes(png.getvalue())  # one write is faster than saving straight to the file
        written.append((name, num_distractors))
    return written


def _write_split(
    folder: Path, digits: Digits, *, seed: list[int], per_digit: int, size: int, num_workers: int | None
) -> dict[str, int]:
    """Write one split; returns file name -> number of distractors, sorted by name."""
    for label in range(10):
        (folder / str(label)).mkdir(parents=True)
    fragments = cut_fragments(digits, seed=[*seed, 0], num_fragments=NUM_FRAGMENTS, cell=size / 60)
    write = partial(
        _write_digit,
        digits=digits,
        fragments=fragments,
        variation=VARIATION[folder.name],
        folder=folder,
        per_digit=per_digit,
        size=size,
        seed=seed,
    )
    num_distractors: dict[str, int] = {}
    shown: dict[str, Any] = {"desc": f"digits {folder.name}", "unit": "image", "mininterval": 0.5, "disable": None}
    with tqdm(total=len(digits.ids) * per_digit, **shown) as bar:
        for written in map_in_processes(write, len(digits.ids), num_workers=num_workers):
            num_distractors.update(written)
            bar.update(len(written))
    return dict(sorted(num_distractors.items()))


def check_settings(*, seed: int, train_per_digit: int, val_per_digit: int, size: int) -> None:
    """Refuse settings that are out of range, naming the option."""
    if seed < 0:
        raise UserError(f"--seed must not be negative; got {seed}.")
    for name, value in (("--train-per-digit", train_per_digit), ("--val-per-digit", val_per_digit)):
        if value < 1:
            raise UserError(f"{name} must be at least 1; got {value}.")
    if size < MIN_SIZE:
        raise UserError(f"--size must be at least {MIN_SIZE} pixels; got {size}.")


def make_digits(
    output: str | Path,
    *,
    seed: int = 0,
    train_per_digit: int = 16,
    val_per_digit: int = 5,
    size: int = 56,
    num_workers: int | None = None,
) -> bool:
    """Make the Digits data set in `output`, unless it already holds the same files.

    Args:
        output: a folder that does not exist, is empty, or holds an older Digits data set (which is replaced).
        seed: of the split, the placement and the clutter.
        train_per_digit, val_per_digit: canvases per source digit.
        size: of the square canvas, in pixels; the digits scale with it.
        num_workers: processes, by default one per core. Does not change the result.

    Returns:
        True if the files were made, False if they were up to date.

    Raises:
        UserError: `output` is a folder with other contents, or a setting is out of range.
    """
    check_settings(seed=seed, train_per_digit=train_per_digit, val_per_digit=val_per_digit, size=size)
    settings = {
        "version": VERSION,
        "seed": seed,
        "train_per_digit": train_per_digit,
        "val_per_digit": val_per_digit,
        "size": size,
    }

    def fill(folder: Path) -> dict:
        splits: dict[str, dict[str, int]] = {}
        for split, digits in split_digits(seed=seed).items():
            splits[split] = _write_split(
                folder / split,
                digits,
                seed=[seed, 1 + len(splits)],
                per_digit=train_per_digit if split == "train" else val_per_digit,
                size=size,
                num_workers=num_workers,
            )
        num_images = {split: len(files) for split, files in splits.items()}
        return {"source": SOURCE, "num_images": num_images, "num_distractors": splits}

    return make_folder(output, kind=KIND, settings=settings, fill=fill)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = command_parser(__doc__)
    count, pixels = in_range(int, Range(1, 10**4)), in_range(int, Range(1, 2**12))
    default = "(default: %(default)s)"
    parser.option("--output", f"output folder {default}", type=to_path, default="data/digits", metavar="DIR")
    parser.option("--seed", default, type=in_range(int, SEED), default=0)
    parser.option("--train-per-digit", f"training canvases per digit {default}", type=count, default=16, metavar="N")
    parser.option("--val-per-digit", f"validation canvases per digit {default}", type=count, default=5, metavar="N")
    parser.option("--size", f"side of the canvas in pixels {default}", type=pixels, default=56)
    return run_tool(parser, make_digits, argv)
