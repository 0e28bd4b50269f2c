"""tools/prepare_kinetics.py: csv files for a folder of videos, and smaller copies of the videos."""

from __future__ import annotations

from pathlib import Path

import av
import pytest
from clips import encode, noise, numbered_frame, read_numbers

from ats.cli import prepare_kinetics
from ats.config import load_config
from ats.datasets import build_dataset


@pytest.fixture
def raw(tmp_path) -> Path:
    """Two classes: numbered, rotated, large and broken videos."""
    folder = tmp_path / "raw"
    encode(folder / "train" / "zebra" / "a.mp4", noise(6, height=96, width=128))
    encode(folder / "train" / "a horse" / "b c.webm", 20, codec="vp9")
    encode(folder / "val" / "zebra" / "d.mp4", noise(6, height=96, width=160), rotation=90)
    (folder / "val" / "zebra" / "broken.mp4").write_bytes(b"nothing")
    (folder / "val" / "zebra" / "notes.txt").write_text("")
    return folder


def test_prepare_kinetics(raw, capsys, monkeypatch):
    """Sorted classes, relative paths, bad files listed; a second run changes nothing and rechecks only the bad file.
    Without a terminal there is no progress bar.
    """
    checked, check = [], prepare_kinetics.prepare
    monkeypatch.setattr(prepare_kinetics, "prepare", lambda name, **how: checked.append(name) or check(name, **how))
    arguments = ["--videos", str(raw), "--separator", ",", "--workers", "1"]
    assert prepare_kinetics.main(arguments) == 0
    assert (raw / "train.csv").read_text() == "train/a horse/b c.webm,0\ntrain/zebra/a.mp4,1\n"
    assert (raw / "test.csv").read_text() == (raw / "val.csv").read_text() == "val/zebra/d.mp4,1\n"
    assert "broken.mp4\tCannot read the video" in (raw / "bad_files.txt").read_text()
    assert "1 files cannot be read and are left out" in capsys.readouterr().out
    before = {path: path.read_bytes() for path in raw.rglob("*") if path.is_file()}
    assert len(checked) == 4
    assert prepare_kinetics.main(arguments) == 0
    assert before == {path: path.read_bytes() for path in raw.rglob("*") if path.is_file()}
    assert [Path(name).name for name in checked[4:]] == ["broken.mp4"]
    assert capsys.readouterr().err == ""
    settings = ["TRAIN.DATASET", "kinetics", "TEST.DATASET", "kinetics", "TEST.NUM_ENSEMBLE_VIEWS", "2"]
    settings += ["DATA.PATH_TO_DATA_DIR", str(raw), "DATA.PATH_LABEL_SEPARATOR", ",", "MODEL.NUM_CLASSES", "2"]
    cfg = load_config(None, settings)
    assert [len(build_dataset(cfg, split)) for split in ("train", "val", "test")] == [2, 1, 6]


def test_prepare_kinetics_shrinks(raw, tmp_path):
    """Short side 48, upright, same frames; small videos are copied; the originals stay."""
    output = tmp_path / "small"
    sizes = {path: path.stat().st_size for path in raw.rglob("*.*")}
    counts = prepare_kinetics.prepare_kinetics(raw, output, short_side=48, num_workers=2)
    assert counts == {"train": 2, "val": 1, "test": 1, "bad": 1}
    assert {path: path.stat().st_size for path in raw.rglob("*.*")} == sizes
    shapes = {}
    for name in ("train/zebra/a.mp4", "train/a horse/b c.webm", "val/zebra/d.mp4"):
        with prepare_kinetics.Video(output / name) as video:
            shapes[name] = (video.num_frames, *video.read([0]).shape[1:3])
            if name.endswith("webm"):
                assert read_numbers(video.read([0, 7, 19])) == [0, 7, 19]
    assert list(shapes.values()) == [(6, 48, 64), (20, 48, 64), (6, 80, 48)]
    stamps = {path: path.stat().st_mtime_ns for path in output.rglob("*.mp4")}
    assert prepare_kinetics.prepare_kinetics(raw, output, short_side=48, num_workers=1) == counts
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*.mp4")} == stamps
    assert not [*output.rglob("*.partial"), *output.rglob("*.tmp")]


def test_prepare_kinetics_names_what_is_wrong(raw, tmp_path, capsys):

    def error(*arguments) -> str:
        assert prepare_kinetics.main(["--workers", "1", *map(str, arguments)]) == 1
        return capsys.readouterr().err

    assert "has no train/<class>" in error("--videos", tmp_path / "none")
    assert "type --output FOLDER" in error("--videos", raw, "--short-side", 48)
    assert "--short-side 47 must be an even" in error("--videos", raw, "--output", tmp_path / "o", "--short-side", 47)
    (raw / "val" / "lion").mkdir()
    assert "val has classes that train/ does not have: lion" in error("--videos", raw)
    (tmp_path / "flat" / "train" / "cat").mkdir(parents=True)
    assert "hold no videos (.mp4" in error("--videos", tmp_path / "flat")
    (tmp_path / "flat" / "train" / "cat" / "a.mp4").write_text("")
    assert "None of the 1 videos can be read" in error("--videos", tmp_path / "flat")


def test_prepare_kinetics_and_odd_names(tmp_path, caplog):
    """Each video is listed once under its own name, and no name breaks a line of the csv files."""
    raw, output = tmp_path / "raw", tmp_path / "small"
    folder = raw / "train" / "a"
    encode(folder / "x.mp4", noise(3, height=96, width=128))
    encode(folder / "x.mkv", noise(4, height=96, width=128))
    encode(folder / "bytes \udcff.mp4", noise(5, height=96, width=128))
    for name in ("two\nlines 0.mp4", "two\rlines.mp4", "deep/y.mp4"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes((folder / "x.mp4").read_bytes())
    (folder / "gone.mp4").symlink_to("/nowhere")
    (folder / "loop").symlink_to(".")
    assert (
        prepare_kinetics.main(["--videos", str(raw), "--output", str(output), "--short-side", "48", "--workers", "2"])
        == 0
    )
    lines = (output / "train.csv").read_text(errors="surrogateescape").splitlines()
    names = ["bytes \udcff.mp4", "x.mkv.mp4", "x.mp4"]
    assert lines == [f"train/a/{name} 0" for name in names]
    for name, num_frames in zip(names, (5, 4, 3), strict=True):
        with prepare_kinetics.Video(output / "train" / "a" / name) as video:
            assert video.num_frames == num_frames
    bad = (output / "bad_files.txt").read_text().splitlines()
    assert len(bad) == 3
    assert r"two\nlines 0.mp4" in "".join(bad)
    assert "gone.mp4\t" in bad[0]
    assert "there is no such file" in bad[0]
    assert "7 videos; left out 1 linked twice or in a loop" in caplog.text
    assert "1 video is not directly in a class folder" in caplog.text


def test_frames_whose_times_do_not_ascend_are_shrunk(tmp_path):
    """AVI gives times of decoding, so frames that were reordered come with 1, 4, 3, 5, 2, ...; none gets lost."""
    frames = [numbered_frame(i).repeat(2, axis=0).repeat(2, axis=1) for i in range(60)]
    encode(tmp_path / "raw" / "train" / "a" / "x.avi", frames, options={"bf": "3", "x264-params": "b-adapt=0"})
    with av.open(str(tmp_path / "raw" / "train" / "a" / "x.avi")) as container:
        stamps = [frame.pts for frame in container.decode(video=0)]
    assert stamps != sorted(stamps), "the file no longer shows the case"
    counts = prepare_kinetics.prepare_kinetics(tmp_path / "raw", tmp_path / "small", short_side=48, num_workers=1)
    assert counts["bad"] == 0
    with prepare_kinetics.Video(tmp_path / "small" / "train" / "a" / "x.mp4") as video:
        assert read_numbers(video.read(range(video.num_frames))) == list(range(60))
        assert video.fps == pytest.approx(30, rel=0.1)
