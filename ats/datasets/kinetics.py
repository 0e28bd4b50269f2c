"""Video clips listed in a csv file, in SlowFast's contract: one `path<separator>label` per line, no header.

    abseiling/4YTwq0-73Y8_000044_000054.mp4 0
    air drumming/-VtLx-mcPds_000012_000022.mp4 1

The label stands behind the last separator: paths may contain it.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ats.datasets.base import FileDataset, OnBad
from ats.datasets.decode import Video, clip_size, clip_start, frame_indices
from ats.datasets.video_transforms import ClipTransform
from ats.errors import NoSuchSplit, UserError

SEPARATORS = (" ", ",", "\t", ";")


class ClipSampling(NamedTuple):
    """Which frames a clip has: `num_frames`, every `sampling_rate`-th of a video of `target_fps`.

    `fps_jitter`: training adds up to so much to `target_fps`. `use_offset_sampling`: see `decode.clip_start`.
    """

    num_frames: int = 8
    sampling_rate: int = 8
    target_fps: float = 30
    fps_jitter: float = 0.0
    use_offset_sampling: bool = False


class Listing(NamedTuple):
    """The lines of a csv file: paths as they stand there (bytes), labels, and the number of each line."""

    paths: np.ndarray
    labels: np.ndarray
    lines: np.ndarray


class Kinetics(FileDataset):
    """The clips of one csv file.

    In training and validation there is one clip per video: at a random place, or in the middle. In testing there are
    `num_views` clips of every video with `len(transforms)` crops of each, next to each other: index is
    `(video * num_views + view) * num_crops + crop`.

    Args:
        csv: the file.
        split: "train", "val" or "test".
        sampling: which frames a clip has.
        transforms: one for training and validation; in testing one per spatial crop.
        num_classes: labels must be below it.
        separator: see `read_csv`.
        path_prefix: folder of the paths in the file; empty: the folder of the file itself.
        allow_outside: accept paths that lead out of `path_prefix`.
        num_views: clips per video in testing.
        on_bad, seed: see `FileDataset`.

    Raises:
        UserError: there is no such file, or a line is wrong; the message has its number.

    Attributes:
        num_videos; num_views: clips of a video with all crops.
    """

    def __init__(
        self,
        csv: str | os.PathLike,
        *,
        split: Literal["train", "val", "test"],
        sampling: ClipSampling,
        transforms: Sequence[ClipTransform],
        num_classes: int,
        separator: str = " ",
        path_prefix: str = "",
        allow_outside: bool = False,
        num_views: int = 1,
        on_bad: OnBad = "raise",
        seed: int = 0,
    ):
        if split not in ("train", "val", "test"):
            raise ValueError(f'split must be "train", "val" or "test"; got {split!r}.')
        if split != "test" and (len(transforms), num_views) != (1, 1):
            raise ValueError(f"Only testing has several views; got {len(transforms)} x {num_views} for {split!r}.")
        if sampling.num_frames < 1 or sampling.sampling_rate < 1 or sampling.target_fps <= 0 or num_views < 1:
            raise UserError(
                "DATA.NUM_FRAMES, DATA.SAMPLING_RATE, DATA.TARGET_FPS and TEST.NUM_ENSEMBLE_VIEWS must be at least 1; "
                f"got {sampling.num_frames}, {sampling.sampling_rate}, {sampling.target_fps:g}, {num_views}."
            )
        super().__init__(on_bad=on_bad, seed=seed)
        self.csv = os.fspath(csv)
        self.split, self.sampling, self.transforms = split, sampling, list(transforms)
        self.listing = read_csv(self.csv, separator=separator, num_classes=num_classes)
        # As SlowFast, but for a relative path without prefix: there it belongs to the folder the program runs in.
        self.folder = os.path.expanduser(path_prefix) or os.path.dirname(self.csv)
        if path_prefix and not allow_outside:
            self.listing = _inside(self.listing, self.csv, path_prefix)
        self.num_videos = len(self.listing.labels)
        self.num_views = num_views * len(self.transforms)
        self._last: tuple[tuple[int, int], np.ndarray] | None = None

    def __len__(self) -> int:
        return self.num_videos * self.num_views

    def path(self, index: int) -> str:
        """Path of the video of clip `index`."""
        return os.path.join(self.folder, os.fsdecode(self.listing.paths[index // self.num_views]))

    def label(self, index: int) -> int:
        """Class of clip `index`."""
        return int(self.listing.labels[index // self.num_views])

    def blank(self) -> Tensor:
        """A clip of NaN of the shape of the others."""
        return torch.full_like(self.transforms[0](np.zeros((self.sampling.num_frames, 8, 8, 3), np.uint8)), torch.nan)

    def load(self, index: int) -> Tensor:
        """Decode and transform clip `index`: float32 [3, T, H, W].

        Raises:
            UserError: the video cannot be read; the message has its line in the csv file.
        """
        video, crop = index // self.num_views, index % len(self.transforms)
        view = index % self.num_views // len(self.transforms)
        try:
            if self.split == "train":
                frames = self._decode(self.path(index))
            elif self._last is not None and self._last[0] == (video, view):
                frames = self._last[1]  # the crops of a view are next to each other: decoded once
            else:
                frames = self._decode(self.path(index), view=view)
                self._last = ((video, view), frames)
        except UserError as error:
            raise UserError(f"{self.csv}, line {self.listing.lines[video]}: {error}") from error
        return self.transforms[crop](frames)

    def _decode(self, path: str, *, view: int = 0) -> np.ndarray:
        target_fps = self.sampling.target_fps
        if self.split == "train" and self.sampling.fps_jitter > 0:
            target_fps += random.uniform(0, self.sampling.fps_jitter)
        num_frames = self.sampling.num_frames
        with Video(path) as video:
            size = clip_size(
                video.fps, num_frames=num_frames, sampling_rate=self.sampling.sampling_rate, target_fps=target_fps
            )
            if self.split == "train":
                start = random.uniform(0, max(video.num_frames - size, 0))
            else:
                # SlowFast validates on random clips; the middle one is the same in every run.
                use_offset = self.sampling.use_offset_sampling or self.split == "val"
                num_views = self.num_views // len(self.transforms)
                start = clip_start(
                    video.num_frames, size, view=view, num_views=num_views, use_offset_sampling=use_offset
                )
            return video.read(frame_indices(start, size, num_frames=num_frames, num_video_frames=video.num_frames))


def read_csv(path: str, *, separator: str, num_classes: int) -> Listing:
    """Read and check a csv file; empty lines are left out.

    Args:
        separator: between path and label; what stands behind the last one is the label.
        num_classes: labels are 0 to `num_classes - 1`.

    Raises:
        UserError: no such file, a line that is no path and label, a label out of range, or nothing at all.
    """
    if not separator:
        raise UserError('DATA.PATH_LABEL_SEPARATOR must not be empty: type " ", "," or "\\t".')
    if not os.path.isfile(path):
        raise NoSuchSplit(
            f"There is no {path}. DATA.PATH_TO_DATA_DIR must be a folder with train.csv, val.csv and test.csv, which "
            f"have a line `path{separator}label` per video; tools/prepare_kinetics.py writes them."
        )
    paths, labels, lines = [], [], []
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            for number, text in enumerate(file, start=1):
                if line := text.strip():
                    video, label = _parse(line, separator, where=f"{path}, line {number}", num_classes=num_classes)
                    paths.append(os.fsencode(video))
                    labels.append(label)
                    lines.append(number)
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    if not paths:
        raise UserError(f"{path} is empty: it needs a line `path{separator}label` per video.")
    return Listing(np.array(paths), np.array(labels), np.array(lines))


def _parse(line: str, separator: str, *, where: str, num_classes: int) -> tuple[str, int]:
    def split(separator: str) -> tuple[str, int] | None:
        path, found, label = line.rpartition(separator)
        is_number = label.strip().isascii() and label.strip().isdigit()
        return (path.strip(), int(label)) if found and path.strip() and is_number else None

    parsed = split(separator)
    if parsed is None:
        shown = line if len(line) <= 100 else f"{line[:100]}..."
        others = [other for other in SEPARATORS if other != separator and split(other)]
        advice = f" Type DATA.PATH_LABEL_SEPARATOR {others[0]!r}." if others else ""
        raise UserError(f"{where}: {shown!r} is not `path{separator}label` with a label from 0 on.{advice}")
    if parsed[1] >= num_classes:
        raise UserError(
            f"{where}: label {parsed[1]} is not below MODEL.NUM_CLASSES {num_classes}. Correct the line or the key."
        )
    return parsed


def _inside(listing: Listing, csv: str, prefix: str) -> Listing:
    """The listing with `..` resolved; refuses paths that are absolute or climb out: whoever wrote the csv does not
    choose what is read. Symbolic links are followed: they are made by who fills the folder, not by who writes the csv.
    """
    paths = []
    for path, line in zip(listing.paths, listing.lines, strict=True):
        # Resolved here, because the system would resolve the .. of `link/../file` behind the link, outside.
        inside = os.path.normpath(path)
        if os.path.isabs(inside) or inside.split(b"/")[0] == b"..":
            raise UserError(
                f"{csv}, line {line}: {os.fsdecode(path)} leads out of DATA.PATH_PREFIX {prefix}. Correct the line, or "
                "type DATA.ALLOW_PATHS_OUTSIDE_PREFIX True."
            )
        paths.append(inside)
    return listing._replace(paths=np.array(paths))
