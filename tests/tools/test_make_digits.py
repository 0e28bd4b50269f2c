"""tools/make_digits.py and generated_folder.py: no leak, unambiguous labels, reproducible, safe to make."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ats.cli import generated_folder
from ats.cli import make_digits as tool
from ats.errors import UserError

TOOL = Path(__file__).parents[2] / "tools" / "make_digits.py"
SMALL = {"seed": 3, "train_per_digit": 1, "val_per_digit": 1, "size": 40}


@pytest.fixture(scope="module", autouse=True)
def _few_fragments():
    """Drawing 4096 fragments is most of the time that a small data set takes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tool, "NUM_FRAGMENTS", 200)
        yield


@pytest.fixture(scope="module")
def digits_dir(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("data") / "digits"
    assert tool.make_digits(output, num_workers=2, **SMALL)
    return output


@pytest.fixture
def few_digits(monkeypatch) -> dict:
    """The tool with ten source digits per split only."""
    few = {split: tool.Digits(*(array[:10] for array in digits)) for split, digits in tool.split_digits(seed=0).items()}
    monkeypatch.setattr(tool, "split_digits", lambda seed: few)
    return few


def test_layout_and_manifest(digits_dir):
    """Every source digit is there, in the folder of its class; the manifest counts the files and their distractors."""
    from sklearn.datasets import load_digits

    manifest = json.loads((digits_dir / "digits.json").read_text())
    labels = {}
    for split in ("train", "val"):
        files = sorted((digits_dir / split).glob("*/*.png"))
        assert len(files) == manifest["num_images"][split] == len(manifest["num_distractors"][split])
        labels |= {int(path.stem.split("_")[0]): int(path.parent.name) for path in files}
    assert labels == dict(enumerate(load_digits().target))
    with Image.open(files[0]) as image:
        assert (image.size, image.mode) == ((40, 40), "RGB")


def test_clutter_differs_between_images(digits_dir):
    """The number of distractors spreads from none to many, so that images need different numbers of tokens."""
    numbers = list(json.loads((digits_dir / "digits.json").read_text())["num_distractors"]["train"].values())
    assert min(numbers) == 0
    assert max(numbers) >= 8
    assert np.std(numbers) > 1.5


def test_split_is_disjoint_and_stratified():
    """No digit image is in both splits, nor an equal copy of it, and each class gives a fifth of its images to val."""
    splits = tool.split_digits(seed=0)
    train, val = splits["train"], splits["val"]
    assert not set(train.ids) & set(val.ids)
    assert len(train.ids) + len(val.ids) == 1797
    assert not {image.tobytes() for image in train.images} & {image.tobytes() for image in val.images}
    share = np.bincount(val.labels) / (np.bincount(val.labels) + np.bincount(train.labels))
    assert np.all(np.abs(share - 0.2) < 0.01)


def test_no_leak_through_distractors(few_digits, tmp_path, monkeypatch):
    """With other pictures for the val digits the train images stay byte for byte: clutter has nothing of val either."""
    train, val = few_digits["train"], few_digits["val"]
    other_val = val._replace(images=val.images[::-1].copy())
    sums = []
    for name, digits in (("a", val), ("b", other_val)):
        monkeypatch.setattr(tool, "split_digits", lambda seed, digits=digits: {"train": train, "val": digits})
        tool.make_digits(tmp_path / name, num_workers=0, **SMALL)
        sums.append((tmp_path / name / "SHA256SUMS").read_text().splitlines())
    assert sums[0][0] == sums[1][0]  # train
    assert sums[0][1] != sums[1][1]  # val: the test would notice


def test_variation_does_what_its_name_says():
    """Stretch makes a digit taller and narrower, a lower threshold makes it bolder, by about as much as they say."""
    glyph = tool.split_digits(seed=0)["train"].images[0]
    plain = tool.draw_strokes(glyph, scale=3, angle=0)
    tall = tool.draw_strokes(glyph, scale=3, angle=0, stretch=0.2)
    bold = tool.draw_strokes(glyph, scale=3, angle=0, threshold=0.2)
    assert tall.shape[0] / plain.shape[0] == pytest.approx(math.exp(0.1), rel=0.08)
    assert plain.shape[1] / tall.shape[1] == pytest.approx(math.exp(0.1), rel=0.08)
    assert bold.sum() > 1.1 * plain.sum()


def test_digit_is_never_covered():
    """No distractor comes nearer than two pixels to the box of the digit: around it there is background only."""
    train = tool.split_digits(seed=0)["train"]
    fragments = tool.cut_fragments(train, seed=[0], num_fragments=200, cell=1)
    assert max(max(fragment.strokes.shape) for fragment in fragments) < 20  # a digit is 21 pixels or more
    for index in range(40):

        def boxes(fragments, index=index):
            rng = np.random.default_rng(index)
            image, num_distractors, box = tool.make_canvas(
                rng, train, index, fragments=fragments, variation=tool.VARIATION["val"], size=60
            )
            top, left = max(box.top - 2, 0), max(box.left - 2, 0)
            pixels = np.asarray(image)[top : box.top + box.height + 2, left : box.left + box.width + 2]
            return pixels, num_distractors

        with_clutter, _ = boxes(fragments)
        alone, num_distractors = boxes([fragment._replace(source=index) for fragment in fragments])  # all refused
        assert num_distractors == 0
        np.testing.assert_array_equal(with_clutter, alone)


def test_same_files_whatever_the_number_of_processes(digits_dir, tmp_path):
    """The files depend on the seed alone (the fixture used two processes), and on the seed they do depend."""
    tool.make_digits(tmp_path / "same", num_workers=0, **SMALL)
    sums = (digits_dir / "SHA256SUMS").read_text()
    assert (tmp_path / "same" / "SHA256SUMS").read_text() == sums
    for split in ("train", "val"):
        assert f"{generated_folder.checksum(digits_dir / split)}  {split}" in sums
    train = tool.split_digits(seed=0)["train"]
    fragments = tool.cut_fragments(train, seed=[0], num_fragments=20, cell=1)

    def draw(seed):
        rng, variation = np.random.default_rng(seed), tool.VARIATION["train"]
        return tool.make_canvas(rng, train, 0, fragments=fragments, variation=variation, size=60)[0]

    assert draw(1) == draw(1) != draw(2)


def test_more_copies_keep_the_first_ones(few_digits, tmp_path):
    """Asking for more canvases per digit adds files and changes none."""
    for name, copies in (("one", 1), ("two", 2)):
        tool.make_digits(tmp_path / name, num_workers=0, **{**SMALL, "train_per_digit": copies})
    one, two = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name / "train").rglob("*.png")}
        for name in ("one", "two")
    )
    assert len(two) == 2 * len(one)
    assert one.items() <= two.items()


def test_second_run_verifies_and_repairs(few_digits, tmp_path):
    """A second run does nothing; a damaged, lost or added file, and another setting, make it run again. Hidden files do
    not count.
    """
    output = tmp_path / "digits"

    def make(**settings) -> bool:
        return tool.make_digits(output, num_workers=0, **{**SMALL, **settings})

    assert make()
    assert not make()
    file = next((output / "val").glob("*/*.png"))
    original = file.read_bytes()
    file.write_bytes(original[:-1] + b"!")
    assert make()
    assert file.read_bytes() == original
    file.unlink()
    assert make()
    (output / "train" / "0" / "stray\udcff.png").write_bytes(original)
    assert make()
    for folder in (output, output / "val", output / "val" / "0"):
        (folder / ".DS_Store").touch()
        (folder / ".ipynb_checkpoints").mkdir()
        (folder / ".ipynb_checkpoints" / "0-checkpoint.png").write_bytes(original)
    assert not make()
    assert make(size=48)
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_interrupted_run_leaves_nothing(few_digits, tmp_path, monkeypatch):
    """An interrupt leaves the older data set whole and no rubbish; a killed run's rubbish goes next time."""
    output = tmp_path / "digits"
    tool.make_digits(output, num_workers=0, **SMALL)
    sums = (output / "SHA256SUMS").read_text()

    def interrupted(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(generated_folder, "write_manifest", interrupted)
        with pytest.raises(KeyboardInterrupt):
            tool.make_digits(output, num_workers=0, **{**SMALL, "seed": 4})
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]
    assert (output / "SHA256SUMS").read_text() == sums

    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".digits.partial-{dead.pid}" / "train").mkdir(parents=True)
    assert not tool.make_digits(output, num_workers=0, **SMALL)
    assert [path.name for path in tmp_path.iterdir()] == ["digits"]


def test_refuses_what_it_did_not_make(tmp_path):
    """A folder with other content, or a file, is left alone; settings out of range are named."""
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not a Digits folder"):
        tool.make_digits(tmp_path, **SMALL)
    with pytest.raises(UserError, match="is a file"):
        tool.make_digits(tmp_path / "thesis.tex", **SMALL)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"
    with pytest.raises(UserError, match="--train-per-digit must be at least 1; got 0"):
        tool.make_digits(tmp_path / "new", **{**SMALL, "train_per_digit": 0})
    with pytest.raises(UserError, match="--size must be at least 32"):
        tool.make_digits(tmp_path / "new", **{**SMALL, "size": 8})


@pytest.mark.long
def test_command_line(digits_dir, tmp_path):
    """`make_digits.py` as it is typed: says that all is there, or one line of error and exit status 1."""
    settings = ["--seed", "3", "--train-per-digit", "1", "--val-per-digit", "1", "--size", "40"]

    def run(*args):
        return subprocess.run([sys.executable, TOOL, *settings, *args], capture_output=True, text=True)

    done = run("--output", digits_dir)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{digits_dir}: up to date\n", "")
    failed = run("--output", TOOL)
    assert failed.returncode == 1
    assert (
        failed.stderr
        == f"error: {TOOL} is a file; --output needs a folder that does not exist yet, or an older "
        + ("Digits folder.\n")
    )
    done = run("--output", tmp_path / "new")  # a redirected log gets no bar
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path}/new: made\n", "")
    with pytest.raises(UserError):  # which Python prints with its traceback
        tool.main([*settings, "--output", str(TOOL), "--debug"])
