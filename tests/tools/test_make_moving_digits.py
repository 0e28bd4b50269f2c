"""tools/make_moving_digits.py: clips that need the digit and the motion, no leak between the splits, reproducible."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ats.cli import make_moving_digits as tool
from ats.config import load_config
from ats.datasets import build_dataset
from ats.datasets.decode import Video
from ats.errors import UserError

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "Digits" / "XViT.yaml"
SMALL = {"seed": 3, "train_per_digit": 2, "val_per_digit": 1, "size": 40}
STEP = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # y, x


@pytest.fixture(scope="module")
def few_digits() -> dict:
    """The tool with forty source digits per split and few fragments, for the tests of this file."""
    all_digits = tool.split_digits(seed=0)
    few = {split: tool.Digits(*(array[:40] for array in digits)) for split, digits in all_digits.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tool, "NUM_FRAGMENTS", 100)
        patch.setattr(tool, "split_digits", lambda seed: few)
        yield few


@pytest.fixture(scope="module")
def folder(few_digits, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("data") / "moving_digits"
    assert tool.make_moving_digits(output, num_workers=2, **SMALL)
    return output


@pytest.fixture(scope="module")
def draw(few_digits):
    """`draw(seed, direction)`: a clip of a training digit; on a black canvas if `black`."""
    train = few_digits["train"]
    fragments = tool.cut_fragments(train, seed=[0], num_fragments=50, cell=1)

    def draw(seed: int, direction: str, *, black: bool = False, **settings) -> tool.Clip:
        drawing = {"fragments": fragments, "variation": tool.VARIATION["val"], "size": 60, "num_frames": 6} | settings
        with pytest.MonkeyPatch.context() as patch:
            if black:
                patch.setattr(tool, "draw_background", lambda rng, size: np.zeros((size, size, 3), np.float32))
            return tool.draw_clip(np.random.default_rng(seed), train, seed % 40, direction, **drawing)

    return draw


def refused(seed: int) -> list[tool.Fragment]:
    """Fragments that no canvas of `draw(seed, ...)` takes: they are its own digit's."""
    return [tool.Fragment(np.zeros((4, 4), np.float32), seed % 40)]


# ---- the class needs motion


@given(seed=st.integers(0, 10**6))
@settings(max_examples=10)
def test_opposite_directions_have_the_same_frames(draw, seed):
    """In reverse order, pixel for pixel: frames without their order do not tell left from right or up from down."""
    for one, other in (("left", "right"), ("up", "down")):
        np.testing.assert_array_equal(draw(seed, one).frames, draw(seed, other).frames[::-1])


@given(seed=st.integers(0, 10**6), direction=st.sampled_from(tool.DIRECTIONS))
@settings(max_examples=20)
def test_digit_moves_as_its_class_says(draw, seed, direction):
    """Steadily along the axis, not at all across it, in pixels too; and all of it stays on the canvas."""
    clip = draw(seed, direction)
    steps = np.diff(clip.corners, axis=0)
    axis = 0 if direction in ("up", "down") else 1
    along = steps[:, axis] * STEP[direction][axis]
    assert (steps[:, 1 - axis] == 0).all()
    assert (along > 0).all()
    assert along.max() - along.min() <= 1
    assert clip.corners.min() >= 0
    bare = draw(seed, direction, fragments=refused(seed), black=True)
    ink = bare.frames.sum(-1, dtype=float, keepdims=True)
    places = np.stack(np.mgrid[:60, :60], axis=-1)
    centres = (ink * places).sum((1, 2)) / ink.sum((1, 2))
    np.testing.assert_allclose(centres[-1] - centres[0], bare.corners[-1] - bare.corners[0], atol=0.05)


def test_one_frame_does_not_tell_the_direction():
    """Whoever knows how often the digit of each class is where guesses a frame's direction right one time in four;
    two frames in their order tell it always.
    """
    rng = np.random.default_rng(0)
    directions = rng.integers(4, size=12_000)
    paths = np.stack([tool.draw_path(rng, tool.DIRECTIONS[i], room=32, num_frames=16) for i in directions])
    frame = paths[np.arange(len(paths)), rng.integers(16, size=len(paths))]
    cell = frame // 4 @ [9, 1]
    known, new = slice(0, 8000), slice(8000, None)
    counts = np.zeros((81, 4))
    np.add.at(counts, (cell[known], directions[known]), 1)
    assert (counts.argmax(1)[cell[new]] == directions[new]).mean() == pytest.approx(0.25, abs=0.02)
    # Its distribution fills the same square along both axes, for each direction.
    for axis in (0, 1):
        quantiles = [np.quantile(frame[directions == i, axis], np.linspace(0, 1, 11)) for i in range(4)]
        assert np.ptp(quantiles, axis=0).max() <= 2
    moved = np.sign(paths[:, 9] - paths[:, 5])
    assert all(tuple(moved[i]) == STEP[tool.DIRECTIONS[directions[i]]] for i in range(len(paths)))


def test_clutter_stands_still_and_does_not_avoid_the_path(draw):
    """Where neither the digit nor its rim ever is nothing changes; what they hide is there again when they are gone."""
    passed = 0
    for seed in range(12):
        clip = draw(seed, "right", num_frames=12, black=True)
        bare = draw(seed, "right", num_frames=12, fragments=refused(seed), black=True)
        ink = np.pad(bare.frames.any((0, -1)), tool.RIM)
        touched = np.lib.stride_tricks.sliding_window_view(ink, (2 * tool.RIM + 1,) * 2).any((-1, -2))
        still = clip.frames[:, ~touched].astype(int)
        assert np.ptp(still, axis=0).max() <= 1  # ink too faint to see has a rim too
        has_clutter = (clip.frames != bare.frames).any(-1)  # [T, H, W]
        passed += bool((has_clutter.any(0) & ~has_clutter.all(0)).any())
    assert passed >= 6


# ---- the files


def test_kinetics_loader_reads_the_files(folder):
    """With the demo's own config: the csv files list every file once, labels follow the classes, frames move."""
    manifest = json.loads((folder / "moving_digits.json").read_text())
    assert manifest["num_clips"] == {"train": 80, "val": 40}
    cfg = load_config(CONFIG, ["DATA.PATH_TO_DATA_DIR", str(folder)])
    for split in ("train", "val", "test"):
        dataset = build_dataset(cfg, split)
        paths = [Path(dataset.path(i)) for i in range(len(dataset))]
        assert sorted(paths) == sorted((folder / ("train" if split == "train" else "val")).glob("*/*.mp4"))
        assert [manifest["classes"][dataset.label(i)] for i in range(len(dataset))] == [p.parent.name for p in paths]
    sample = dataset[0]
    assert sample.x.shape == (3, 8, 56, 56)
    assert (sample.x.diff(dim=1).abs().amax((0, 2, 3)) > 0.5).all()


def test_classes_are_balanced(folder):
    """Every digit is where its class says, in two directions here; of each digit the directions come equally often."""
    from sklearn.datasets import load_digits

    digits, target = Counter(), load_digits().target
    for line in (folder / "train.csv").read_text().splitlines():
        path, label = line.split()
        digits[int(Path(path).stem.split("_")[0]), int(label) % 4] += 1
        assert int(label) // 4 == target[int(Path(path).stem.split("_")[0])]
    assert set(digits.values()) == {1}
    by_class = Counter((target[digit], direction) for digit, direction in digits)
    for digit in range(10):
        counts = [by_class[digit, direction] for direction in range(4)]
        assert max(counts) - min(counts) <= 2  # as many as there are copies


def test_decoded_frames_are_those_drawn(folder, few_digits):
    """The clip that a file's name promises, drawn again, is what comes out of it, but for the loss of h264."""
    train = few_digits["train"]
    fragments = tool.cut_fragments(train, seed=[3, 1, 0], num_fragments=100, cell=40 / 60)
    drawing = {"fragments": fragments, "variation": tool.VARIATION["train"], "size": 40, "num_frames": 16}
    for path in sorted((folder / "train").glob("*/*_01.mp4"))[::8]:
        digit = int(path.stem.split("_")[0])
        rng = np.random.default_rng([3, 1, digit + 1, 1])
        clip = tool.draw_clip(rng, train, train.ids.tolist().index(digit), path.parent.name.split("_")[1], **drawing)
        with Video(path) as video:
            assert video.num_frames == 16
            decoded = video.read(list(range(16)))
        assert np.abs(decoded.astype(int) - clip.frames).mean() < 5
        far = np.abs(decoded.astype(int) - clip.frames[::-1]).mean()
        assert far > 1.5 * np.abs(decoded.astype(int) - clip.frames).mean()


def test_no_leak(folder, few_digits, tmp_path, monkeypatch):
    """No digit is in both splits; with other pictures for the val digits the training frames stay the same, so their
    clutter has nothing of val either. And frames do not depend on the number of processes. (Frames are compared before
    encoding: for videos this small x264 does not always write the same bytes.)
    """
    ids = {split: {p.stem.split("_")[0] for p in (folder / split).glob("*/*.mp4")} for split in ("train", "val")}
    assert not ids["train"] & ids["val"]
    assert len(ids["train"]) == len(ids["val"]) == 40
    val = few_digits["val"]
    changed = few_digits | {"val": val._replace(images=val.images[::-1].copy())}
    monkeypatch.setattr(tool, "split_digits", lambda seed: changed)
    tool.make_moving_digits(tmp_path / "other", num_workers=0, **SMALL)
    sums, frames = [], []
    for root in (folder, tmp_path / "other"):
        sums.append(dict(line.split()[::-1] for line in (root / "SHA256SUMS").read_text().splitlines()))
        frames.append(json.loads((root / "moving_digits.json").read_text())["frames_sha256"])
    assert sums[0].keys() == {"train", "val", "train.csv", "val.csv", "test.csv"}
    for name in ("train.csv", "val.csv", "test.csv"):
        assert sums[0][name] == sums[1][name]
    assert sums[0]["val"] != sums[1]["val"]
    assert frames[0]["train"] == frames[1]["train"]
    assert frames[0]["val"] != frames[1]["val"]


def test_second_run_verifies(folder, few_digits, capsys):
    """A second run does nothing; a csv that was changed makes it run again."""
    command = ["--output", str(folder), "--seed", "3", "--train-per-digit", "2", "--val-per-digit", "1"]
    command += ["--size", "40"]
    assert tool.main(command) == 0
    assert capsys.readouterr().out == f"{folder}: up to date\n"
    lines = (folder / "val.csv").read_text()
    (folder / "val.csv").write_text(lines.replace(" 1\n", " 2\n"))
    assert tool.main(command) == 0
    assert capsys.readouterr().out == f"{folder}: made\n"
    assert (folder / "val.csv").read_text() == lines


def test_settings_out_of_range(tmp_path, capsys):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not a moving Digits folder"):
        tool.make_moving_digits(tmp_path)
    assert tool.main(["--output", str(tmp_path / "new"), "--size", "57"]) == 1
    message = "--size must be even, because h264 stores colours at half the resolution; got 57."
    assert capsys.readouterr().err == f"error: {message}\n"
    with pytest.raises(UserError, match="--num-frames must be at least 2"):
        tool.make_moving_digits(tmp_path / "new", num_frames=1)
    with pytest.raises(UserError, match="--val-per-digit must be at least 1"):
        tool.make_moving_digits(tmp_path / "new", val_per_digit=0)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
