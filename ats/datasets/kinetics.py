"""Video clips listed in a csv file in SlowFast's format: one `path<separator>label` per line, no header.

    abseiling/4YTwq0-73Y8_000044_000054.mp4 0
    air drumming/-VtLx-mcPds_000012_000022.mp4 1

The label follows the last separator, so paths may contain separators.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ats.datasets.base import FileDataset, Split
from ats.datasets.decode import ClipSampling, Video
from ats.datasets.transforms import ClipTransform
from ats.errors import NoSuchSplit, UserError

SEPARATORS = (" ", ",", "\t", ";")


class Listing(NamedTuple):
    """The videos of a csv file."""

    csv: str  # its path
    folder: str  # that relative paths start from
    paths: np.ndarray  # bytes
    labels: np.ndarray
    lines: np.ndarray  # line numbers, from 1


@dataclass(eq=False, repr=False)
class Kinetics(FileDataset):
    """The clips of one csv file.

    Training takes one clip per video, at a random place; validation one, in the middle. Testing takes `num_clips` clips
    per video and `len(transforms)` crops per clip: index is `(video * num_clips + clip) * num_crops + crop`.

    There are `num_videos` videos with `num_views` samples each (clips x crops).
    """

    listing: Listing
    _: KW_ONLY
    split: Split
    sampling: ClipSampling
    transforms: Sequence[ClipTransform]  # one for training and validation; one per spatial crop for testing
    num_clips: int = 1

    def __post_init__(self) -> None:
        self.num_videos, self.num_views = len(self.listing.labels), self.num_clips * len(self.transforms)
        assert self.split == "test" or self.num_views == 1, "only testing has several views"
        self._last: tuple[tuple[int, int], np.ndarray] | None = None  # (video, clip) and frames decoded last

    def __len__(self) -> int:
        return self.num_videos * self.num_views

    def path(self, index: int) -> str:
        return os.path.join(self.listing.folder, os.fsdecode(self.listing.paths[index // self.num_views]))

    def label(self, index: int) -> int:
        return int(self.listing.labels[index // self.num_views])

    def blank(self) -> Tensor:
        return torch.full_like(self.transforms[0](np.zeros((self.sampling.num_frames, 8, 8, 3), np.uint8)), torch.nan)

    def listed_in(self, index: int) -> str:
        return f"{self.listing.csv}, line {self.listing.lines[index // self.num_views]}"

    def load(self, index: int) -> Tensor:
        """Decode and transform sample `index`: float32 [3, T, H, W]."""
        video, rest = divmod(index, self.num_views)
        clip, crop = divmod(rest, len(self.transforms))
        if self.split == "train":
            return self.transforms[0](read_clip(self.path(index), self.sampling))
        # The crops of a clip are consecutive samples: decode once for all of them.
        if self._last is None or self._last[0] != (video, clip):
            # SlowFast validates on random clips; the middle one is the same in every run.
            use_offset = self.sampling.use_offset_sampling or self.split == "val"
            sampling = self.sampling._replace(use_offset_sampling=use_offset)
            self._last = (video, clip), read_clip(self.path(index), sampling, clip=clip, num_clips=self.num_clips)
        return self.transforms[crop](self._last[1])


def read_clip(path: str, sampling: ClipSampling, *, clip: int | None = None, num_clips: int = 1) -> np.ndarray:
    """Decode one clip of a video: uint8 RGB [num_frames, H, W, 3]. Raises a UserError if the video cannot be read.

    `clip`: which of `num_clips` evenly spaced clips; None: one at a random place, with `fps_jitter`, as in training.
    """
    if clip is None and sampling.fps_jitter > 0:
        sampling = sampling._replace(target_fps=sampling.target_fps + random.uniform(0, sampling.fps_jitter))
    with Video(path) as video:
        size = sampling.size(video.fps)
        if clip is None:
            start = random.uniform(0, max(video.num_frames - size, 0))
        else:
            start = sampling.start(video.num_frames, size, clip=clip, num_clips=num_clips)
        return video.read(sampling.indices(video.num_frames, size, start))


def read_csv(path: str, *, separator: str, num_classes: int, prefix: str = "", allow_outside: bool = False) -> Listing:
    """Read and check a csv file. Skips empty lines.

    Args:
        separator: between path and label; the label follows the last one. A tab may be typed as backslash and t.
        num_classes: labels are 0 to `num_classes - 1`.
        prefix: folder that paths start from and must stay in; `..` in them is resolved. "": they start from the
            folder of the file, and any path will do.
        allow_outside: accept paths that leave `prefix`.

    Raises:
        UserError: the file is missing or empty, a line is not a path and a label, a label is out of range, or a path
            leaves `prefix`.
    """
    separator = separator.replace("\\t", "\t")
    if not separator:
        raise UserError('DATA.PATH_LABEL_SEPARATOR must not be empty: type " ", "," or "\\t".')
    if not os.path.isfile(path):
        raise NoSuchSplit(
            f"There is no {path}. DATA.PATH_TO_DATA_DIR must be a folder with train.csv, val.csv and test.csv: one "
            f"line `path{separator}label` per video; tools/prepare_kinetics.py writes them."
        )
    entries = []
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            for number, text in enumerate(file, start=1):
                if line := text.strip():
                    where = f"{path}, line {number}"
                    video, label = _parse(line, separator, where=where, num_classes=num_classes)
                    video = _resolve(video, prefix, where=where) if prefix and not allow_outside else video
                    entries.append((os.fsencode(video), label, number))
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    if not entries:
        raise UserError(f"{path} is empty: it needs one line `path{separator}label` per video.")
    # As in SlowFast, except that without a prefix SlowFast resolves relative paths against the working directory.
    folder = os.path.expanduser(prefix) or os.path.dirname(path)
    return Listing(path, folder, *map(np.array, zip(*entries, strict=True)))


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
    if (label := parsed[1]) >= num_classes:
        advice = "Correct the line or the key."
        raise UserError(f"{where}: label {label} is not below MODEL.NUM_CLASSES {num_classes}. {advice}")
    return parsed


def _resolve(path: str, prefix: str, *, where: str) -> str:
    """The path with `..` resolved. Refuses absolute paths and paths that climb out of the prefix: the author of the csv
    must not choose which files are read. Symbolic links are followed, because the owner of the folder made them.
    """
    # Not left to the system, which would resolve the .. of `link/../file` after following the link.
    inside = os.path.normpath(path)
    if os.path.isabs(inside) or inside.split("/")[0] == "..":
        raise UserError(
            f"{where}: {path} leads out of DATA.PATH_PREFIX {prefix}. Correct the line, or type "
            "DATA.ALLOW_PATHS_OUTSIDE_PREFIX True."
        )
    return inside
