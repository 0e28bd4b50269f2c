"""ats.datasets.base: whatever is raised while a sample is read, the file is named; only what stops a run passes."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from clips import encode
from image_folders import make_cfg, make_tree
from PIL import Image
from torch import Tensor

from ats.datasets import build_dataset
from ats.datasets.base import FileDataset
from ats.datasets.decode import Video
from ats.errors import Stopped, UserError

ERRORS = [
    ValueError("all input arrays must have the same shape"),
    MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    OSError(errno.EIO, "Input/output error"),
    av.error.InvalidDataError(1, "Invalid data found"),
    Image.DecompressionBombError("Image size (400000000 pixels) exceeds limit"),
    KeyError("frame"),
    AssertionError(),
    RecursionError("maximum recursion depth exceeded"),
]


@dataclass(eq=False, repr=False)
class Numbers(FileDataset):
    """Sample i is the number i; reading sample 2 raises `error`."""

    error: BaseException

    def __len__(self) -> int:
        return 5

    def path(self, index: int) -> str:
        return f"/data/{index}.bin"

    def label(self, index: int) -> int:
        return 0

    def blank(self) -> Tensor:
        return torch.tensor(torch.nan)

    def load(self, index: int) -> Tensor:
        if index == 2:
            raise self.error
        return torch.tensor(float(index))


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_every_error_is_a_bad_file(error):
    """It is named with the reason, replaced, or skipped, and handed over by a worker like any other."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    match = rf"^Cannot read the file /data/2\.bin: .*{re.escape(reason)}\. Restore the file, or remove it"
    with pytest.raises(UserError, match=match) as caught:
        Numbers(error)[2]
    assert caught.value.__cause__ is error
    assert isinstance(Numbers(error).__getitems__([1, 2]), UserError)
    replaced = Numbers(error, on_bad="replace")[2]
    assert (replaced.bad, replaced.index == 2) == ("/data/2.bin", False)
    skipped = Numbers(error, on_bad="skip")[2]
    assert (skipped.bad, skipped.index, bool(skipped.x.isnan())) == ("/data/2.bin", 2, True)


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), SystemExit(3), Stopped(15, "here")], ids=lambda e: type(e).__name__
)
def test_what_stops_a_run_passes(error):
    """Ctrl-C, and a signal that stops an evaluation while it reads samples in its own process."""
    for on_bad in ("raise", "replace", "skip"):
        with pytest.raises(type(error)):
            Numbers(error, on_bad=on_bad)[2]


def test_when_nothing_can_be_read_the_first_reason_is_given():
    class Broken(Numbers):
        def load(self, index: int) -> Tensor:
            raise TypeError(f"no transform for sample {index}")

    with pytest.raises(UserError, match=r"2\.bin cannot be read, and neither .*TypeError: no transform for sample 2"):
        Broken(TypeError(), on_bad="replace")[2]


def out_of_memory(*args: object) -> None:
    raise MemoryError


def test_transforms_and_decoders_of_images_and_videos(tmp_path, monkeypatch):
    """The file is named whichever part of the work fails; a video also by its line in the csv file."""
    path = make_tree(tmp_path / "images", num_images=1) / "val" / "n00000000" / "0.png"
    dataset = build_dataset(make_cfg(tmp_path / "images"), "val")
    with monkeypatch.context() as patch:
        patch.setattr(dataset, "transform", out_of_memory)
        with pytest.raises(UserError, match=rf"{path}: MemoryError"):
            dataset[0]
    encode(tmp_path / "v.mp4", 5)
    (tmp_path / "test.csv").write_text("\nv.mp4 0\n")
    cfg = make_cfg(tmp_path, TEST__DATASET="kinetics")
    where = rf"test\.csv, line 2: Cannot read the (file|video) {tmp_path}/v\.mp4: MemoryError"
    for owner, name in ((Video, "_to_rgb"), (Video, "_scan"), (np, "stack"), (torch, "from_numpy")):
        dataset = build_dataset(cfg, "test")
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, out_of_memory)
            with pytest.raises(UserError, match=where):
                dataset[0]


def test_video_errors_for_the_tools(tmp_path, monkeypatch):
    """tools/prepare_kinetics.py lists such a file as bad and goes on with the others."""
    path: Path = encode(tmp_path / "v.mp4", 5)
    with Video(path) as video:
        monkeypatch.setattr(Video, "_frames_from_start", out_of_memory)
        with pytest.raises(UserError, match=f"Cannot read the video {path}: MemoryError"):
            list(video.frames())
