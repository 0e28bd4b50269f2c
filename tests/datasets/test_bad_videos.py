"""Every kind of bad video, in training, validation and testing, with and without workers."""

from __future__ import annotations

import json
from pathlib import Path

import av
import pytest
from clips import encode, noise, remux
from test_decode import sound

from ats.checkpoint import save_safetensors
from ats.config import load_config
from ats.datasets import build_dataset
from ats.engine.evaluate import evaluate_weights
from ats.engine.train import train
from ats.errors import UserError
from ats.models import build_model

NUM_VIDEOS, BAD = 5, 2


def _truncate(path: Path) -> None:
    """Cut at the end of a frame, so that all remaining frames decode."""
    encode(path, noise(40), container_options={"movflags": "faststart"})
    with av.open(str(path)) as container:
        start = sorted(packet.pos for packet in container.demux(video=0) if packet.size)[25]
    path.write_bytes(path.read_bytes()[:start])


def _damage(path: Path) -> None:
    encode(path, noise(40), container_options={"movflags": "faststart"})
    content = bytearray(path.read_bytes())
    content[len(content) // 4 :] = bytes(len(content) - len(content) // 4)
    path.write_bytes(content)


# kind -> (makes such a file, reason in the error)
KINDS = {
    "missing": (lambda path: path.unlink(), "there is no such file"),
    "empty": (lambda path: path.write_bytes(b""), "Invalid data"),
    "no video": (lambda path: path.write_text("<html>404</html>" * 50), "Invalid data"),
    "sound alone": (sound, "it has no video stream"),
    "truncated": (_truncate, "it is cut off or damaged"),
    "does not decode": (_damage, ""),
}
each_kind = pytest.mark.parametrize("kind", KINDS)
CASES = [(kind, 0) for kind in KINDS] + [("truncated", 1), ("does not decode", 1)]


@pytest.fixture
def folder(tmp_path) -> Path:
    for i in range(NUM_VIDEOS):
        encode(tmp_path / f"{i}.mp4", 20)
    listing = "".join(f"{i}.mp4 {i % 2}\n" for i in range(NUM_VIDEOS))
    for split in ("train", "val", "test"):
        (tmp_path / f"{split}.csv").write_text("\n" + listing)  # an empty first line, so video i is on line i + 2
    return tmp_path


def make_cfg(folder: Path, *overrides: object):
    settings = {
        "MODEL.NAME": "TimeSformer", "MODEL.NUM_CLASSES": 2, "VIT.IMG_SIZE": 16, "VIT.PATCH_SIZE": 8,
        "VIT.EMBED_DIM": 8, "VIT.DEPTH": 1, "VIT.NUM_HEADS": 1, "TRAIN.DATASET": "kinetics", "TEST.DATASET": "kinetics",
        "TRAIN.BATCH_SIZE": 4, "SOLVER.MAX_EPOCH": 2, "SOLVER.BASE_LR": 0.0, "AUG.ENABLE": False,
        "TEST.NUM_ENSEMBLE_VIEWS": 2, "TEST.NUM_SPATIAL_CROPS": 1, "DATA.PATH_TO_DATA_DIR": folder,
        "DATA.NUM_FRAMES": 4, "DATA.SAMPLING_RATE": 4, "DATA.TRAIN_CROP_SIZE": 16, "DATA.TEST_CROP_SIZE": 16,
        "DATA.TRAIN_JITTER_SCALES": [16, 20], "DATA_LOADER.NUM_WORKERS": 0, "OUTPUT_DIR": folder / "out",
    }  # fmt: skip
    return load_config(None, [str(word) for word in (*(w for pair in settings.items() for w in pair), *overrides)])


def spoil(folder: Path, kind: str) -> Path:
    path = folder / f"{BAD}.mp4"
    KINDS[kind][0](path)
    return path


@pytest.mark.parametrize(("kind", "num_workers"), CASES)
def test_training_replaces_reports_and_counts(folder, kind, num_workers, caplog):
    """Training continues and names the path once; with DATA.MAX_BAD_FRACTION 0 it stops. Validation has good files."""
    path = spoil(folder, kind)
    (folder / "val.csv").write_text("0.mp4 0\n1.mp4 1\n")
    train(make_cfg(folder, "DATA_LOADER.NUM_WORKERS", num_workers))
    named = [record.message for record in caplog.records if "another sample takes its place" in record.message]
    assert named == [f"{path} cannot be read; another sample takes its place."]
    strict = ["DATA.MAX_BAD_FRACTION", 0, "OUTPUT_DIR", folder / "strict", "DATA_LOADER.NUM_WORKERS", num_workers]
    with pytest.raises(UserError, match=rf"1 of the \d+ training samples .*DATA\.MAX_BAD_FRACTION 0(.|\n)*{path}"):
        train(make_cfg(folder, *strict))


@pytest.mark.parametrize(("kind", "num_workers"), CASES)
def test_testing_names_it_or_skips_and_counts_it(folder, kind, num_workers):
    path, workers = spoil(folder, kind), ["DATA_LOADER.NUM_WORKERS", num_workers]
    save_safetensors(folder / "w.safetensors", build_model(make_cfg(folder)).state_dict())
    weights = ["TEST.CHECKPOINT_FILE_PATH", folder / "w.safetensors", *workers]
    reason = rf"test\.csv, line {BAD + 2}: Cannot read the video {path}: .*{KINDS[kind][1]}"
    with pytest.raises(UserError, match=reason):
        evaluate_weights(make_cfg(folder, *weights))
    evaluate_weights(make_cfg(folder, *weights, "TEST.ON_BAD_VIDEO", "skip"))
    result = json.loads((folder / "out" / "result.json").read_text())
    counts = {key: result[key] for key in ("num_videos", "num_skipped_videos", "num_clips")}
    assert counts == {"num_videos": NUM_VIDEOS - 1, "num_skipped_videos": 1, "num_clips": 2 * (NUM_VIDEOS - 1)}
    whole = folder / "whole"
    whole.mkdir()
    (whole / "test.csv").write_text("".join(f"../{i}.mp4 {i % 2}\n" for i in range(NUM_VIDEOS) if i != BAD))
    evaluate_weights(make_cfg(folder, *weights, "DATA.PATH_TO_DATA_DIR", whole, "OUTPUT_DIR", whole))
    expected = json.loads((whole / "result.json").read_text())
    assert [result[key] for key in ("top1", "top5", "clip_top1")] == [
        expected[key] for key in ("top1", "top5", "clip_top1")
    ]


@each_kind
def test_validation_while_training_names_it(folder, kind):
    path = spoil(folder, kind)
    with pytest.raises(UserError, match=rf"val\.csv, line {BAD + 2}: Cannot read the video {path}"):
        train(make_cfg(folder))


def test_nothing_can_be_read(folder):
    for path in folder.glob("*.mp4"):
        path.write_bytes(b"")
    save_safetensors(folder / "w.safetensors", build_model(make_cfg(folder)).state_dict())
    weights = ["TEST.CHECKPOINT_FILE_PATH", folder / "w.safetensors", "TEST.ON_BAD_VIDEO", "skip"]
    with pytest.raises(UserError, match="nothing to evaluate: no video can be read"):
        evaluate_weights(make_cfg(folder, *weights))
    with pytest.raises(UserError, match=r"\d\.mp4 cannot be read, and neither can the 15 files tried in its place"):
        train(make_cfg(folder))


def test_shorter_than_the_clip_is_not_bad(folder):
    """SlowFast's rule, which published metrics rely on: the last frame repeats in place of missing ones."""
    encode(folder / f"{BAD}.mp4", 3)
    for split in ("train", "val", "test"):
        dataset = build_dataset(make_cfg(folder), split)
        sample = dataset[BAD * dataset.num_views]
        assert sample.bad == ""
        assert sample.x.isfinite().all()
    assert (sample.x[:, 2] == sample.x[:, 3]).all()


def test_resolution_that_changes_is_not_bad(folder):
    """Two recordings that somebody joined: every frame of a clip gets the size of the first."""
    parts = [encode(folder / f"part{s}.webm", noise(20, height=48 * s, width=64 * s), codec="vp9") for s in (1, 2)]
    remux(folder / "joined.webm", parts).rename(folder / f"{BAD}.mp4")
    for split in ("train", "val", "test"):
        dataset = build_dataset(make_cfg(folder, "DATA.SAMPLING_RATE", 8), split)
        sample = dataset[BAD * dataset.num_views]
        assert sample.bad == ""
        assert sample.x.isfinite().all()
