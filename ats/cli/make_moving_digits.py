"""Make the moving Digits data set: real handwritten digits that move over a cluttered canvas, as Kinetics-style video.

    python tools/make_moving_digits.py --output data/moving_digits

A class is a digit and the direction it moves in: "3_left", "7_up", ... (10 digits x 4 directions, 40 classes). The
digits, their split into training and validation, and the fragments that clutter the canvas are those of make_digits.py:
nothing in the validation clips, not even clutter, was seen in training. Clutter stands still. The digit moves in front
of it at constant speed, with a rim of background that separates its strokes from the clutter.

Recognising the class takes both the digit and the motion. A clip played backwards is a clip of the opposite direction,
so neither a single frame nor the set of all frames tells the two apart. The digit's position has the same distribution
along and across the motion, so a frame does not reveal the axis either.

    <output>/train/<class>/<digit>_<copy>.mp4     h264; <digit> is the index in sklearn.datasets.load_digits()
    <output>/val/<class>/<digit>_<copy>.mp4
    <output>/{train,val,test}.csv                 `path label` per line, as in SlowFast; test lists the clips of val
    <output>/SHA256SUMS                           checksums of the files (FFmpeg versions encode differently)
    <output>/moving_digits.json                   settings, classes, counts, checksums of the frames before encoding

Each clip depends only on (seed, split, digit, copy, size, frames). The copies of a digit cycle through the directions.
"""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageFilter
from tqdm import tqdm

from ats.cli.generated_folder import Kind, make_folder, map_in_processes, run_tool
from ats.cli.make_digits import (
    NUM_FRAGMENTS,
    SOURCE,
    VARIATION,
    Box,
    Digits,
    Fragment,
    Variation,
    check_settings,
    cut_fragments,
    draw_background,
    draw_digit,
    draw_ink,
    place,
    scatter_fragments,
    split_digits,
    to_pixels,
)
from ats.cli.parser import command_parser, in_range, to_path
from ats.errors import UserError, needing
from ats.options import SEED, Range

KIND = Kind("moving Digits", "moving_digits.json")
VERSION = 1  # of the clips: raise it when they change, so that old folders are remade
DIRECTIONS = ("left", "right", "up", "down")
CLASSES = [f"{digit}_{direction}" for digit in range(10) for direction in DIRECTIONS]  # in label order
FPS = 15
RIM = 2  # pixels of background around the strokes
MAX_DISTRACTORS = 8
TRAVEL = (0.5, 0.9)  # how far the digit moves, as a fraction of the room it has


class Clip(NamedTuple):
    """Frames, uint8 [T, size, size, 3], and the digit's top left corner in each, int [T, 2] as y, x."""

    frames: np.ndarray
    corners: np.ndarray


def draw_path(rng: np.random.Generator, direction: str, *, room: int, num_frames: int) -> np.ndarray:
    """Position of a square in each frame, int [num_frames, 2] as y, x, with both coordinates in 0..`room` pixels.

    For a given `rng`, the positions along and across the motion do not depend on `direction`, which only decides the
    axis and the order of positions. Across the motion, the square stays at a random point of a second path.
    """
    paths = []
    for _ in range(2):
        travel = rng.uniform(*TRAVEL) * room
        start = rng.uniform(0, room - travel)
        paths.append(np.rint(start + travel * np.linspace(0, 1, num_frames)).astype(int))
    along, across = paths[0], np.full(num_frames, rng.choice(paths[1]))
    if direction in ("left", "up"):
        along = along[::-1]
    return np.stack([across, along] if direction in ("left", "right") else [along, across], axis=1)


def draw_clip(
    rng: np.random.Generator,
    digits: Digits,
    index: int,
    direction: str,
    *,
    fragments: list[Fragment],
    variation: Variation,
    size: int,
    num_frames: int,
) -> Clip:
    """Move digit `index` of `digits` over a canvas with fragments of other digits."""
    background, ink = draw_background(rng, size), draw_ink(rng)
    strokes = draw_digit(rng, digits.images[index], variation=variation, size=size)
    opacity = rng.uniform(0.75, 1.0)
    height, width = strokes.shape
    side = max(height, width)  # move a square, so that x and y have the same room
    corners = draw_path(rng, direction, room=size - side, num_frames=num_frames)
    corners += [(side - height) // 2, (side - width) // 2]
    clutter = background.copy()
    scatter_fragments(
        rng, clutter, fragments, ink=ink, taken=[], avoid=index, max_distractors=MAX_DISTRACTORS
    )  # clutter that avoided the digit's path would give it away

    around = ((RIM, RIM), (RIM, RIM))
    background, clutter = (np.pad(canvas, (*around, (0, 0)), mode="edge") for canvas in (background, clutter))
    strokes = np.pad(strokes, around)
    rim = np.asarray(Image.fromarray(strokes).filter(ImageFilter.MaxFilter(2 * RIM + 1)))
    frames = np.empty((num_frames, size, size, 3), np.uint8)
    for frame, (top, left) in zip(frames, corners.tolist(), strict=True):
        canvas, box = clutter.copy(), Box(top, left, *strokes.shape)  # the padding shifts it by RIM
        area = np.s_[box.top : box.top + box.height, box.left : box.left + box.width]
        canvas[area] += rim[..., None] * (background[area] - canvas[area])
        place(canvas, strokes, box, ink=ink, opacity=opacity)
        frame[:] = to_pixels(canvas[RIM:-RIM, RIM:-RIM])
    return Clip(frames, corners)


def encode(path: Path, frames: np.ndarray) -> None:
    """Write frames [T, H, W, 3] as h264."""
    with needing("av", what="Videos need"):
        import av  # not needed if up to date
        from av.video.reformatter import VideoReformatter

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "18", "preset": "veryfast"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # the bytes depend on it
        reformatter = VideoReformatter()  # shared by all frames: creating it takes longer than using it
        for frame in frames:
            rgb = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(stream.encode(reformatter.reformat(rgb, format=stream.pix_fmt)))
        container.mux(stream.encode(None))


def rank_in_class(digits: Digits) -> np.ndarray:
    """How many digits of the same class precede each one. Its copies start with the direction of that number, so that
    all directions are equally frequent within a class.
    """
    result = np.zeros(len(digits.labels), int)
    for label in range(10):
        members = np.flatnonzero(digits.labels == label)
        result[members] = np.arange(len(members))
    return result


def _write_digit(
    index: int, *, digits: Digits, first: np.ndarray, folder: Path, per_digit: int, seed: list[int], **drawing
) -> list[tuple[str, str]]:
    """Write all clips of one digit; returns (name relative to `folder`, checksum of the frames) for each."""
    digit_id, label = int(digits.ids[index]), int(digits.labels[index])
    written = []
    for copy in range(per_digit):
        rng = np.random.default_rng([*seed, digit_id + 1, copy])  # the fragments use stream 0
        direction = DIRECTIONS[(first[index] + copy) % len(DIRECTIONS)]
        clip = draw_clip(rng, digits, index, direction, **drawing)
        name = f"{label}_{direction}/{digit_id:04d}_{copy:02d}.mp4"
        encode(folder / name, clip.frames)
        written.append((name, hashlib.sha256(clip.frames.tobytes()).hexdigest()))
    return written


def _write_split(
    folder: Path,
    digits: Digits,
    *,
    seed: list[int],
    per_digit: int,
    size: int,
    num_frames: int,
    num_workers: int | None,
) -> dict[str, str]:
    """Write one split; returns file name -> checksum of its frames, sorted by name."""
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
    write = partial(
        _write_digit,
        digits=digits,
        first=rank_in_class(digits),
        folder=folder,
        per_digit=per_digit,
        seed=seed,
        fragments=cut_fragments(digits, seed=[*seed, 0], num_fragments=NUM_FRAGMENTS, cell=size / 60),
        variation=VARIATION[folder.name],
        size=size,
        num_frames=num_frames,
    )
    frames: dict[str, str] = {}
    shown: dict[str, Any] = {"desc": f"clips {folder.name}", "unit": "clip", "mininterval": 0.5, "disable": None}
    with tqdm(total=len(digits.ids) * per_digit, **shown) as bar:
        for written in map_in_processes(write, len(digits.ids), num_workers=num_workers):
            frames.update(written)
            bar.update(len(written))
    return dict(sorted(frames.items()))


def _write_csv(path: Path, split: str, names: list[str]) -> None:
    path.write_text("".join(f"{split}/{name} {CLASSES.index(name.split('/')[0])}\n" for name in names))


def make_moving_digits(
    output: str | Path,
    *,
    seed: int = 0,
    train_per_digit: int = 4,
    val_per_digit: int = 2,
    size: int = 56,
    num_frames: int = 16,
    num_workers: int | None = None,
) -> bool:
    """Make the moving Digits data set in `output`, unless it already holds the same files.

    Args:
        output: a folder that does not exist, is empty, or holds an older data set of this kind (which is replaced).
        seed: of the split, the paths and the clutter.
        train_per_digit, val_per_digit: clips per source digit; with a multiple of 4, each digit moves equally often in
            every direction.
        size: side of the square canvas in pixels, even; the digits scale with it.
        num_frames: frames per clip.
        num_workers: processes, by default one per core. Does not change the result.

    Returns:
        True if the files were made, False if they were up to date.

    Raises:
        UserError: `output` is a folder with other contents, or a setting is out of range.
    """
    check_settings(seed=seed, train_per_digit=train_per_digit, val_per_digit=val_per_digit, size=size)
    if size % 2:
        raise UserError(f"--size must be even, because h264 stores colours at half the resolution; got {size}.")
    if num_frames < 2:
        raise UserError(f"--num-frames must be at least 2, or nothing moves; got {num_frames}.")
    settings = {
        "version": VERSION,
        "seed": seed,
        "train_per_digit": train_per_digit,
        "val_per_digit": val_per_digit,
        "size": size,
        "num_frames": num_frames,
    }

    def fill(folder: Path) -> dict:
        frames_sha256, num_clips = {}, {}
        for number, (split, digits) in enumerate(split_digits(seed=seed).items(), start=1):
            sums = _write_split(
                folder / split,
                digits,
                seed=[seed, number],
                per_digit=train_per_digit if split == "train" else val_per_digit,
                size=size,
                num_frames=num_frames,
                num_workers=num_workers,
            )
            for listing in ("train",) if split == "train" else ("val", "test"):
                _write_csv(folder / f"{listing}.csv", split, list(sums))
            text = "".join(f"{checksum}  {name}\n" for name, checksum in sums.items())
            frames_sha256[split], num_clips[split] = hashlib.sha256(text.encode()).hexdigest(), len(sums)
        return {"source": SOURCE, "classes": CLASSES, "num_clips": num_clips, "frames_sha256": frames_sha256}

    return make_folder(output, kind=KIND, settings=settings, fill=fill)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = command_parser(__doc__)
    count, pixels = in_range(int, Range(1, 10**4)), in_range(int, Range(1, 2**12))
    default = "(default: %(default)s)"
    parser.option("--output", f"output folder {default}", type=to_path, default="data/moving_digits", metavar="DIR")
    parser.option("--seed", default, type=in_range(int, SEED), default=0)
    parser.option("--train-per-digit", f"training clips per digit {default}", type=count, default=4, metavar="N")
    parser.option("--val-per-digit", f"validation clips per digit {default}", type=count, default=2, metavar="N")
    parser.option("--size", f"side of the canvas in pixels {default}", type=pixels, default=56)
    parser.option("--num-frames", f"frames per clip {default}", type=count, default=16, metavar="N")
    return run_tool(parser, make_moving_digits, argv)
