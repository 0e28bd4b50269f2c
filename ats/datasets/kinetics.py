"""Video clips listed in a csv file in SlowFast's format: one `path<separator>label` per line, no header.

    abseiling/4YTwq0-73Y8_000044_000054.mp4 0
    air drumming/-VtLx-mcPds_000012_000022.mp4 1

The label follows the last separator, so paths may contain separators. Quoted paths are read as pandas and Excel write
them.
"""

from __future__ import annotations

import csv
import logging
import os
import random
import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ats.datasets.base import FileDataset, Split
from ats.datasets.decode import ClipSampling, Video, import_av
from ats.datasets.transforms import ClipTransform
from ats.errors import NoSuchSplit, UserError
from ats.files import encoding_of

logger = logging.getLogger(__name__)

SEPARATORS = (" ", ",", "\t", ";")
NO_TABLE = "Remove it; pandas omits it with to_csv(..., header=False, index=False)."


class Listing(NamedTuple):
    """The videos of a csv file."""

    csv: str  # its path
    folder: str  # root of relative paths
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
        import_av()  # fail here, so that no file is blamed
        self.num_videos, self.num_views = len(self.listing.labels), self.num_clips * len(self.transforms)
        assert self.split == "test" or self.num_views == 1, "only testing has several views"
        self._last: tuple[tuple[int, int], np.ndarray] | None = None  # the last decoded (video, clip) and its frames

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
            # SlowFast validates on random clips; the middle clip is deterministic.
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
        prefix: root folder that paths must stay in; `..` in them is resolved. "": the folder of the csv file, and any
            path is allowed.
        allow_outside: accept paths that leave `prefix`.

    Raises:
        UserError: the file is missing or empty, a line is not a path and a label, a label is out of range, there is a
            header or a column of row numbers, or a path leaves `prefix`.
    """
    separator = separator.replace("\\t", "\t")
    if not separator:
        raise UserError('DATA.PATH_LABEL_SEPARATOR must not be empty: type " ", "," or "\\t".')
    if not os.path.isfile(path):
        raise NoSuchSplit(
            f"There is no {path}. DATA.PATH_TO_DATA_DIR must be a folder with train.csv, val.csv and test.csv: one "
            f"line `path{separator}label` per video; tools/prepare_kinetics.py writes them."
        )
    # As in SlowFast, but without a prefix SlowFast resolves relative paths against the working directory.
    folder = os.path.expanduser(prefix) or os.path.dirname(path)
    lines = _lines(path)
    if not lines:
        raise UserError(f"{path} is empty: it needs one line `path{separator}label` per video.")
    _refuse_header(lines, separator, where=f"{path}, line {lines[0][0]}")
    parsed = [_parse(line, separator, where=f"{path}, line {n}", num_classes=num_classes) for n, line in lines]
    videos = _as_here([video for video, _ in parsed], folder=folder, separator=separator, listing=path)
    if prefix and not allow_outside:
        numbered = zip(lines, videos, strict=True)
        videos = [_resolve(video, prefix, where=f"{path}, line {n}") for (n, _), video in numbered]
    columns = [os.fsencode(video) for video in videos], [label for _, label in parsed], [n for n, _ in lines]
    return Listing(path, folder, *map(np.array, columns))


def _lines(path: str) -> list[tuple[int, str]]:
    """The lines that are not empty, with their numbers from 1."""
    try:
        with open(path, encoding=encoding_of(path), errors="surrogateescape") as file:
            return [(number, line) for number, text in enumerate(file, start=1) if (line := text.strip())]
    except (OSError, UnicodeError) as error:
        raise UserError(f"Cannot read {path}: {getattr(error, 'strerror', None) or error}.") from error


def _split(line: str, separator: str) -> tuple[str, int] | None:
    """The path and the label of a line; None if it has no such form."""
    path, _, label = line.rpartition(separator)
    mark = separator.strip() or separator[0]
    if '"' in line and len(mark) == 1:
        try:
            fields = next(csv.reader([line], delimiter=mark, skipinitialspace=True, strict=True))
        except csv.Error:  # the quotation mark is part of the path
            fields = []
        path, label = fields if len(fields) == 2 else (path, label)
    path, label = path.strip(), label.strip()
    is_number = label.isascii() and label.isdigit() and len(label) < 19
    return (path, int(label)) if path and is_number else None


def _parse(line: str, separator: str, *, where: str, num_classes: int) -> tuple[str, int]:
    parsed = _split(line, separator)
    if parsed is None:
        shape = f"`path{separator}label` with a label from 0 on"
        raise UserError(f"{where}: {_shown(line)} is not {shape}.{_advise_separator(line, separator)}")
    if (label := parsed[1]) >= num_classes:
        rule = f"is not below MODEL.NUM_CLASSES {num_classes}: labels count from 0"
        raise UserError(f"{where}: label {label} {rule}. Correct the line or the key.")
    return parsed


def _refuse_header(lines: list[tuple[int, str]], separator: str, *, where: str) -> None:
    """Refuse a first line that names columns: words, none of which looks like a path."""
    first = lines[0][1]
    words = re.split(r"[ ,;\t]+", first.replace('"', ""))
    is_words = len(words) > 1 and words[-1][:1].isalpha() and not re.search(r"[./\\]", first)
    if is_words or first.lower().startswith("sep="):
        advice = _advise_separator(lines[1][1], separator) if len(lines) > 1 else ""
        raise UserError(f"{where}: {_shown(first)} is a header. {NO_TABLE}{advice}")


def _advise_separator(line: str, separator: str) -> str:
    """What to type if another separator fits the line."""
    others = [other for other in SEPARATORS if _split(line, other)]
    return f" Type DATA.PATH_LABEL_SEPARATOR {others[0]!r}." if others and not _split(line, separator) else ""


def _shown(line: str) -> str:
    return repr(line if len(line) <= 100 else f"{line[:100]}...")


def _as_here(videos: list[str], *, folder: str, separator: str, listing: str) -> list[str]:
    """Replace the \\ of Windows paths by /; refuse the column or row numbers that pandas adds. A line that names an
    existing file is taken unchanged.
    """

    def exists(video: str) -> bool:
        return os.path.exists(os.path.join(folder, video))

    if len(videos) > 1 and not exists(videos[0]):
        if videos[0].strip(separator) == "0":
            raise UserError(f"{listing}, line 1: it numbers the columns. {NO_TABLE}")
        if all(video.startswith(f"{i}{separator}") for i, video in enumerate(videos)):
            raise UserError(f"{listing}: the first column numbers the lines. {NO_TABLE}")
    first = next((video for video in videos if "\\" in video), None)
    if first is None or exists(first) or not exists(first.replace("\\", "/")):
        return videos
    logger.warning("%s has Windows paths: each \\ is read as /.", listing)
    return [video.replace("\\", "/") for video in videos]


def _resolve(path: str, prefix: str, *, where: str) -> str:
    """Resolve `..` in a path. Refuses absolute paths and paths that leave the prefix: the author of the csv must not
    choose which files are read. Symbolic links are followed, because the owner of the folder made them.
    """
    # Not left to the OS, which would resolve the .. of `link/../file` after following the link.
    inside = os.path.normpath(path)
    if os.path.isabs(inside) or inside.split("/")[0] == "..":
        raise UserError(
            f"{where}: {path} leads out of DATA.PATH_PREFIX {prefix}. Correct the line, or type "
            "DATA.ALLOW_PATHS_OUTSIDE_PREFIX True."
        )
    return inside
