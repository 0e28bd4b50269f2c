"""ats.datasets.kinetics: the frames of a sample, csv files and their errors, bad videos."""

from __future__ import annotations

import csv
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from clips import encode, noise, read_numbers

from ats.config import load_config
from ats.datasets import Draw, build_dataset, build_loader, kinetics
from ats.datasets import build as build_module
from ats.datasets.kinetics import read_csv
from ats.datasets.transforms import eval_clip_transform
from ats.errors import UserError

SIZE = 32


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Path:
    """Six numbered videos of 60, 64, ... frames, with spaces in their paths, listed in all three csv files."""
    root = tmp_path_factory.mktemp("kinetics")
    lines = []
    for i in range(6):
        encode(root / "class one" / f"v {i}.mp4", 60 + 4 * i)
        lines.append(f"class one/v {i}.mp4 {i % 3}\n")
    for split in ("train", "val", "test"):
        (root / f"{split}.csv").write_text("".join(lines))
    return root


def make_cfg(root: Path, *overrides: object):
    settings = {
        "MODEL.NUM_CLASSES": 3,
        "TRAIN.DATASET": "kinetics",
        "TEST.DATASET": "kinetics",
        "TRAIN.BATCH_SIZE": 2,
        "TEST.BATCH_SIZE": 5,
        "TEST.NUM_ENSEMBLE_VIEWS": 2,
        "DATA.PATH_TO_DATA_DIR": root,
        "DATA.NUM_FRAMES": 4,
        "DATA.SAMPLING_RATE": 4,
        "DATA.TRAIN_CROP_SIZE": SIZE,
        "DATA.TEST_CROP_SIZE": SIZE,
        "DATA.TRAIN_JITTER_SCALES": [32, 40],
        "DATA_LOADER.NUM_WORKERS": 0,
        "AUG.ENABLE": False,
        "RNG_SEED": 1,
    }
    words = [word for pair in settings.items() for word in pair]
    return load_config(None, [str(word) for word in (*words, *overrides)])


def shown(dataset, index: int | Draw) -> list[int]:
    """Numbers of the frames that a data set reads for a sample, before any transform."""
    taken = []
    original, dataset.transforms = dataset.transforms, [lambda frames: taken.append(frames)] * len(dataset.transforms)
    dataset[index]
    dataset.transforms = original
    return read_numbers(taken[0])


# ---------------------------------------------------------------------------------------------------------------- clips


def test_test_clips_are_views_times_crops(shared):
    """60 frames, clips of 16, so 44 free; two clips start at 0 and 22, or with offset sampling at 0 and 44."""
    dataset = build_dataset(make_cfg(shared), "test")
    assert (len(dataset), dataset.num_videos, dataset.num_views) == (36, 6, 6)
    first, second = [0, 5, 10, 15], [22, 27, 32, 37]
    assert [shown(dataset, i) for i in range(6)] == [first] * 3 + [second] * 3
    assert [dataset.label(i) for i in (0, 5, 6, 35)] == [0, 0, 1, 2]
    sample = dataset[7]
    assert (sample.x.shape, sample.x.dtype, sample.label, sample.index) == ((3, 4, 32, 32), torch.float32, 1, 7)
    dataset = build_dataset(make_cfg(shared, "DATA.USE_OFFSET_SAMPLING", True, "TEST.NUM_SPATIAL_CROPS", 1), "test")
    assert len(dataset) == 12
    assert [shown(dataset, i) for i in range(2)] == [first, [44, 49, 54, 59]]


def test_crops_of_a_clip_share_one_decoding(shared, monkeypatch):
    dataset = build_dataset(make_cfg(shared), "test")
    opened, original = [], kinetics.read_clip
    monkeypatch.setattr(
        kinetics, "read_clip", lambda path, *a, **kwargs: opened.append(path) or original(path, *a, **kwargs)
    )
    crops = [dataset[i].x for i in range(6)]
    assert len(opened) == 2
    fresh = build_dataset(make_cfg(shared), "test")
    assert all(torch.equal(crop, fresh[i].x) for i, crop in reversed(list(enumerate(crops))))
    assert not torch.equal(crops[0], crops[2])


def test_short_video_repeats_its_last_frame(tmp_path):
    encode(tmp_path / "v.mp4", 10)
    (tmp_path / "test.csv").write_text("v.mp4 0")
    assert shown(build_dataset(make_cfg(tmp_path), "test"), 0) == [0, 5, 9, 9]


def test_validation_is_the_middle_of_each_video(shared):
    dataset = build_dataset(make_cfg(shared), "val")
    assert (len(dataset), dataset.num_views) == (6, 1)
    assert shown(dataset, 0) == [22, 27, 32, 37]


def test_training_clip_is_a_function_of_the_seed(shared):
    """Different seeds give different places, all inside the video; the global generators do not change."""
    dataset = build_dataset(make_cfg(shared), "train")
    assert len(dataset) == 6
    state = random.getstate()
    clips = [shown(dataset, Draw(2, seed)) for seed in range(12)]
    assert random.getstate() == state
    assert clips == [shown(dataset, Draw(2, seed)) for seed in range(12)]
    assert len({clip[0] for clip in clips}) > 6
    assert all(clip[0] >= 0 and clip[-1] < 68 and clip[-1] - clip[0] == 15 for clip in clips)
    assert torch.equal(dataset[Draw(2, 7)].x, dataset[Draw(2, 7)].x)
    faster = build_dataset(make_cfg(shared, "DATA.TRAIN_JITTER_FPS", 30), "train")
    assert len({clip[-1] - clip[0] for clip in (shown(faster, Draw(2, seed)) for seed in range(6))}) > 2


@pytest.mark.parametrize("split", ["train", "test"])
def test_batches_do_not_depend_on_workers(shared, split, monkeypatch):
    monkeypatch.setattr(build_module, "num_cores", lambda: 2)
    cfg = ["AUG.ENABLE", True, "AUG.AA_TYPE", "rand-m7-n4-mstd0.5-inc1", "DATA.TRAIN_JITTER_SCALES_RELATIVE", [0.3, 1]]
    epochs = [
        list(build_loader(make_cfg(shared, *cfg, "DATA_LOADER.NUM_WORKERS", workers), split)) for workers in (0, 1, 2)
    ]
    for one, two, three in zip(*epochs, strict=True):
        assert torch.equal(one.x, two.x)
        assert torch.equal(one.x, three.x)
        assert one.index.tolist() == two.index.tolist() == three.index.tolist()
    assert sum(len(batch.x) for batch in epochs[0]) == (6 if split == "train" else 36)


def test_short_side_of_tests(shared):
    """The crop size with three crops; with one, the first of DATA.TRAIN_JITTER_SCALES, which must be large enough."""
    one = ["TEST.NUM_SPATIAL_CROPS", 1, "DATA.TRAIN_JITTER_SCALES"]
    frames = noise(4)
    [transform] = build_dataset(make_cfg(shared, *one, [40, 44]), "test").transforms
    expected = eval_clip_transform(SIZE, short_side=40)(np.stack(frames))
    assert torch.equal(transform(np.stack(frames)), expected)
    assert len(build_dataset(make_cfg(shared, "DATA.TRAIN_JITTER_SCALES", [20, 24]), "test").transforms) == 3
    with pytest.raises(UserError, match=r"20 pixels.*TEST_CROP_SIZE 32"):
        build_dataset(make_cfg(shared, *one, [20, 24]), "test")


# ------------------------------------------------------------------------------------------------------------------ csv


def write(folder: Path, text: str, name: str = "test.csv") -> str:
    (folder / name).write_text(text)
    return str(folder / name)


@pytest.mark.parametrize(
    ("separator", "text", "paths"),
    [
        (" ", "a b.mp4 1\n\n  c.mp4 0  \n", ["a b.mp4", "c.mp4"]),
        (",", "a, b.mp4,1\r\nc.mp4, 0\r\n", ["a, b.mp4", "c.mp4"]),
        ("\t", "a b,c.mp4\t2", ["a b,c.mp4"]),
        (",", "\ufeffä.mp4,1\n", ["ä.mp4"]),
        (" ", '"a b.mp4" 1\r\nc.mp4 "0"\r\n', ["a b.mp4", "c.mp4"]),
        (",", '"a, ""b"".mp4",1\n"c.mp4", "0"\n', ['a, "b".mp4', "c.mp4"]),
        (";", '\ufeff"a;b.mp4";1\r\n', ["a;b.mp4"]),
        ("\\t", '"a b.mp4"\t1\n', ["a b.mp4"]),
        # quotation marks that belong to the name
        (" ", '"Hi" she said.mp4 1\na "b".mp4 0\n"c.mp4 2\nd" 1\n', ['"Hi" she said.mp4', 'a "b".mp4', '"c.mp4', 'd"']),
        (",", '"Hi".mp4,1\n', ['"Hi".mp4']),
        (" ", "a\\b.mp4 1\n", ["a\\b.mp4"]),
    ],
)
def test_lines_are_split_at_the_last_separator(tmp_path, separator, text, paths):
    (tmp_path / "test.csv").write_text(text, encoding="utf-8", newline="")
    listing = read_csv(str(tmp_path / "test.csv"), separator=separator, num_classes=3)
    assert [os.fsdecode(path) for path in listing.paths] == paths


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a.mp4 0\nb.mp4\n", r"test\.csv, line 2: 'b\.mp4' is not `path label`"),
        ("path label\na.mp4 0\n", r"line 1: 'path label' is a header\. Remove it; .*header=False, index=False\)\.$"),
        ("\npath,label\na.mp4,0\n", r"line 2: 'path,label' is a header\. .* Type DATA\.PATH_LABEL_SEPARATOR ','"),
        (",path,label\n0,a.mp4,0\n", r"line 1: ',path,label' is a header"),
        ('"path";"label"\n', r"line 1: .* is a header"),
        ("sep=;\na.mp4;0\n", r"line 1: 'sep=;' is a header.*SEPARATOR ';'"),
        ("0 1\na.mp4 0\n", r"line 1: it numbers the columns\. Remove it"),
        ("0 a.mp4 1\n1 b.mp4 2\n", r"test\.csv: the first column numbers the lines\. Remove it.*index=False"),
        ("a cat\n", r"line 1: 'a cat' is a header"),
        ("a.mp4 cat\nb.mp4 0\n", r"line 1: 'a\.mp4 cat' is not `path label`"),
        ('"a b.mp4",0\n', r"line 1: .* Type DATA\.PATH_LABEL_SEPARATOR ','"),
        (f"a.mp4 {'9' * 5000}\n", r"line 1: .* is not `path label`"),
        ("a.mp4,0\n", r"line 1: .* Type DATA\.PATH_LABEL_SEPARATOR ','"),
        ("a.mp4 0\n\n\nb.mp4 -1\n", r"line 4: 'b\.mp4 -1' is not"),
        ("a.mp4 1.0\n", r"line 1: "),
        (" 7\n", r"line 1: "),
        ("a.mp4 3\n", r"line 1: label 3 is not below MODEL\.NUM_CLASSES 3: labels count from 0\."),
        ("", r"test\.csv is empty: it needs one line"),
        ("\n \n", r"test\.csv is empty"),
    ],
)
def test_csv_mistakes(tmp_path, text, match):
    with pytest.raises(UserError, match=match):
        read_csv(write(tmp_path, text), separator=" ", num_classes=3)


def test_classes_are_counted(tmp_path):
    """MODEL.NUM_CLASSES None: the labels up to the highest in any of the csv files."""
    write(tmp_path, "a.mp4 1\nb.mp4 4\n")
    assert make_cfg(tmp_path, "MODEL.NUM_CLASSES", "None").MODEL.NUM_CLASSES == 5
    (tmp_path / "train.csv").write_text("a.mp4 6\n")
    assert make_cfg(tmp_path, "MODEL.NUM_CLASSES", "None").MODEL.NUM_CLASSES == 7
    (tmp_path / "train.csv").write_text("a.mp4 99999999\n")
    with pytest.raises(UserError, match=r"train\.csv, line 1: label 99999999 is not below"):
        make_cfg(tmp_path, "MODEL.NUM_CLASSES", "None")


@pytest.mark.parametrize("separator", [" ", ",", ";", "\t"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_what_pandas_and_excel_write_is_read(tmp_path, separator, quoting, encoding, end):
    """Python's csv writer, which pandas uses, on names that need quotation marks."""
    rows = [("plain.mp4", 0), ("with space.mp4", 1), ("a,b;c.mp4", 2), ('say "hi", Zoë.mp4', 1), ("tab\there/x.mp4", 0)]
    with open(tmp_path / "test.csv", "w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=separator, quoting=quoting, lineterminator=end).writerows(rows)
    listing = read_csv(str(tmp_path / "test.csv"), separator=separator, num_classes=3)
    assert [(os.fsdecode(p), int(n)) for p, n in zip(listing.paths, listing.labels, strict=True)] == rows
    assert listing.lines.tolist() == [1, 2, 3, 4, 5]


def test_quotation_marks_and_a_separator_with_a_space(tmp_path):
    listing = read_csv(write(tmp_path, '"a, b.mp4", 1\nc.mp4, 0\n'), separator=", ", num_classes=2)
    assert [os.fsdecode(path) for path in listing.paths] == ["a, b.mp4", "c.mp4"]


def test_paths_written_on_windows(tmp_path, caplog):
    """A backslash is part of the name only if there is such a file; the prefix holds for either."""
    (tmp_path / "a").mkdir()
    for name in ("a/b.mp4", "we\\ird.mp4"):
        (tmp_path / name).touch()
    listing = read_csv(write(tmp_path, "a\\b.mp4 0\na\\none.mp4 1\n"), separator=" ", num_classes=2)
    assert [os.fsdecode(path) for path in listing.paths] == ["a/b.mp4", "a/none.mp4"]
    assert "has Windows paths: each \\ is read as /." in caplog.text
    listing = read_csv(write(tmp_path, "we\\ird.mp4 0\n"), separator=" ", num_classes=2)
    assert [os.fsdecode(path) for path in listing.paths] == ["we\\ird.mp4"]
    (tmp_path / "videos").mkdir()
    with pytest.raises(UserError, match=r"line 1: \.\./a/b\.mp4 leads out of DATA\.PATH_PREFIX"):
        build_dataset(
            make_cfg(Path(write(tmp_path, "..\\a\\b.mp4 0\n")).parent, "DATA.PATH_PREFIX", tmp_path / "videos"), "test"
        )


def test_files_named_like_the_columns_of_a_table(tmp_path):
    """`0 a.mp4` and `1 b.mp4`, or a file called 0, are read as SlowFast reads them if they exist."""
    for name in ("0 a.mp4", "0"):
        (tmp_path / name).touch()
    for text, paths in (("0 a.mp4 1\n1 b.mp4 2\n", ["0 a.mp4", "1 b.mp4"]), ("0 1\na.mp4 2\n", ["0", "a.mp4"])):
        listing = read_csv(write(tmp_path, text), separator=" ", num_classes=3)
        assert [os.fsdecode(path) for path in listing.paths] == paths


def test_missing_csv_and_folder(tmp_path):
    with pytest.raises(UserError, match=r"There is no .*val\.csv\. DATA\.PATH_TO_DATA_DIR must be.*prepare_kinetics"):
        build_loader(make_cfg(tmp_path), "val")
    with pytest.raises(UserError, match=r"DATA\.PATH_TO_DATA_DIR is not set"):
        build_loader(load_config(None, ["TEST.DATASET", "kinetics"]), "test")


def test_missing_file_names_its_line(shared, tmp_path):
    write(tmp_path, f"{shared}/class one/v 0.mp4 0\n\nnone.mp4 1\n")
    dataset = build_dataset(make_cfg(tmp_path), "test")
    assert dataset[0].label == 0  # absolute
    with pytest.raises(UserError, match=rf"test\.csv, line 3: .* {tmp_path}/none\.mp4: there is no such file"):
        dataset[6]


@pytest.mark.parametrize("path", ["../v.mp4", "/etc/v.mp4", "a/../../v.mp4", "..", "./../v.mp4"])
def test_paths_stay_below_the_prefix(tmp_path, path):
    write(tmp_path, f"a/../ok.mp4 0\n{path} 0\n")
    prefix = ["DATA.PATH_PREFIX", tmp_path / "videos"]
    with pytest.raises(UserError, match=r"test\.csv, line 2: .* leads out of DATA\.PATH_PREFIX"):
        build_dataset(make_cfg(tmp_path, *prefix), "test")
    dataset = build_dataset(make_cfg(tmp_path, *prefix, "DATA.ALLOW_PATHS_OUTSIDE_PREFIX", True), "test")
    assert dataset.path(0) == f"{tmp_path}/videos/a/../ok.mp4"
    assert dataset.path(6) == os.path.join(tmp_path, "videos", path)
    assert len(build_dataset(make_cfg(tmp_path), "test")) == 12  # without a prefix there is nothing to leave


# ------------------------------------------------------------------------------------------------------------ bad files


@pytest.fixture
def damaged(shared, tmp_path) -> Path:
    """The six videos, one of them truncated."""
    (tmp_path / "class one").mkdir()
    for path in (shared / "class one").iterdir():
        content = path.read_bytes()
        (tmp_path / "class one" / path.name).write_bytes(
            content[: -len(content) // 3] if "v 3" in str(path) else content
        )
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}.csv").write_text((shared / f"{split}.csv").read_text())
    return tmp_path


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_video_in_training_is_replaced_and_reported(damaged, num_workers):
    cfg = make_cfg(damaged, "DATA_LOADER.NUM_WORKERS", num_workers)
    batches = list(build_loader(cfg, "train"))
    reported = [path for batch in batches for path in batch.bad if path]
    assert reported == [str(damaged / "class one" / "v 3.mp4")]
    index = torch.cat([batch.index for batch in batches])
    assert 3 not in index
    assert torch.cat([batch.label for batch in batches]).tolist() == (index % 3).tolist()
    for batch, again in zip(batches, build_loader(cfg, "train"), strict=True):
        assert torch.equal(batch.x, again.x)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_bad_video_in_testing(damaged, num_workers):
    cfg = make_cfg(damaged, "DATA_LOADER.NUM_WORKERS", num_workers)
    for split in ("val", "test"):
        with pytest.raises(UserError, match=rf"{split}\.csv, line 4: Cannot read the video .*v 3\.mp4: "):
            list(build_loader(cfg, split))
    batches = list(build_loader(make_cfg(damaged, "TEST.ON_BAD_VIDEO", "skip"), "test"))
    bad = [i for batch in batches for i, path in zip(batch.index.tolist(), batch.bad, strict=True) if path]
    assert bad == list(range(18, 24))
    assert all(batch.x[[not path for path in batch.bad]].isfinite().all() for batch in batches)


def run_without_av(*arguments: object) -> subprocess.CompletedProcess:
    """`run_net` in a process that cannot import `av`."""
    code = "import sys; sys.modules['av'] = None; from ats.cli.run_net import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


def test_only_videos_need_av(tiny_config, shared):
    """Images are trained on and evaluated without it; a data set of videos says what to install, once."""
    done = run_without_av("--cfg", tiny_config, "TRAIN.ENABLE", True, "SOLVER.MAX_EPOCH", 1, "SOLVER.WARMUP_EPOCHS", 0)
    assert done.returncode == 0, done.stderr
    assert "top-1 %" in done.stdout
    videos = ["MODEL.NUM_CLASSES", 3, "TRAIN.DATASET", "kinetics", "DATA.PATH_TO_DATA_DIR", shared]
    done = run_without_av("--cfg", tiny_config, "TRAIN.ENABLE", True, *videos)
    assert done.returncode == 1
    assert done.stderr == "error: Videos need av, which is not installed: pip install av\n"
