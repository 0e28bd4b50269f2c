"""Frames of video files: which ones form a clip, and how to read them without decoding the rest.

    sampling = ClipSampling(num_frames=16, sampling_rate=4)
    with Video(path) as video:
        size = sampling.size(video.fps)
        start = sampling.start(video.num_frames, size, clip=0, num_clips=5)
        frames = video.read(sampling.indices(video.num_frames, size, start))

The sampling is SlowFast's (`get_start_end_idx`, `temporal_sampling`). Frames are counted in display order: frame i is
the i-th frame of a full decode. `Video` reads time stamps from the packets, without decoding, and decodes from the last
key frame before the clip. If packets may not correspond to frames, it decodes everything.
"""

from __future__ import annotations

import math
import os
import unicodedata
from collections.abc import Container, Iterator, Sequence
from contextlib import AbstractContextManager
from fractions import Fraction
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from ats.datasets.base import read_errors
from ats.datasets.packets import is_cut_off, num_shown
from ats.errors import UserError, needing

if TYPE_CHECKING:
    import av

# For files found in a folder; a file given by name may have any extension.
VIDEO_EXTENSIONS: tuple[str, ...] = (".mp4", ".m4v", ".mov", ".3gp", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts")
VIDEO_EXTENSIONS += (".mts", ".m2ts", ".flv", ".wmv", ".ogv")
MAX_PIXELS = 8192 * 8192  # per frame; more is a mistake or an attempt to exhaust memory
# Formats FFmpeg may use: video containers, not lists of other files (concat, hls, dash, image2, sdp, ...).
CONTAINERS = "mov,matroska,avi,mpeg,mpegts,mpegvideo,flv,asf,ogg"
TIMED = {"mp4", "matroska"}  # containers whose packets carry the time stamps of the frames
PROGRESSIVE = (0, 1)  # FFmpeg's field orders "unknown" and "progressive"; with others a packet may be half a frame
DAMAGED = "it is cut off or damaged"


def import_av() -> ModuleType:
    """Import PyAV, which only videos need. Raises a UserError if it is not installed."""
    with needing("av", what="Videos need"):
        import av
        import av.video.reformatter
    return av


class ClipSampling(NamedTuple):
    """Which frames a clip has: `num_frames`, every `sampling_rate`-th of a video at `target_fps`.

    Training adds a random amount up to `fps_jitter` to `target_fps`. With `use_offset_sampling`, test clips span the
    whole video, and a single clip is taken from the middle. Without it, clips start `1 / num_clips` of the free length
    apart, so the last one ends before the video does.
    """

    num_frames: int = 8
    sampling_rate: int = 8
    target_fps: float = 30
    fps_jitter: float = 0.0
    use_offset_sampling: bool = False

    def size(self, fps: float) -> float:
        """Length of a clip in frames of a video at `fps`."""
        return max(1.0, self.sampling_rate * self.num_frames / self.target_fps * fps)

    def start(self, num_video_frames: int, size: float, *, clip: int, num_clips: int) -> float:
        """First frame of test clip `clip` out of `num_clips`, each `size` frames long."""
        free = max(num_video_frames - size, 0)
        if not self.use_offset_sampling:
            return free * clip / num_clips
        return float(math.floor(free / 2) if num_clips == 1 else clip * math.floor(free / (num_clips - 1)))

    def indices(self, num_video_frames: int, size: float, start: float) -> list[int]:
        """Frame indices, evenly spaced over the clip. Past the end of the video, the last frame repeats."""
        # float32, as in SlowFast: float64 sometimes rounds down to a different frame.
        index = torch.linspace(start, start + size - 1, self.num_frames)
        return index.clamp(0, num_video_frames - 1).long().tolist()


class Video(AbstractContextManager):
    """An open video file of `num_frames` at `fps` (the average if the rate varies); a context manager.

    Raises:
        UserError: `path` is missing, not a local video in one of CONTAINERS, damaged or cut off; the message has the
            path and the reason.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self._container: av.container.InputContainer | None = None
        self._av = import_av()
        self._reformatter = self._av.video.reformatter.VideoReformatter()
        try:
            with read_errors(self.path, kind="video"):
                self._open()
                self._size = self._stream.codec_context.width, self._stream.codec_context.height
                self._scan()
        except UserError:
            self.close()
            raise

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._container is not None:
            self._container.close()
            self._container = None

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """Decode frames in any order, with repeats: uint8 RGB [len(indices), H, W, 3], rotated and mirrored as the file
        says. If the resolution changes, frames are resized to that of the video's first frame.

        Raises:
            UserError: a frame is damaged.
            IndexError: there is no such frame.
        """
        if not len(indices) or min(indices) < 0 or max(indices) >= self.num_frames:
            raise IndexError(f"{self.path} has frames 0 to {self.num_frames - 1}; got {indices}.")
        with read_errors(self.path, kind="video"):
            if self._pts is None:
                frames = self._decode_by_count(set(indices))
            else:
                frames = self._decode_by_time({self._pts[i]: i for i in set(indices)})
            if any((frame.width, frame.height) != self._size for frame in frames.values()):
                first = next(self._frames_from_start())  # not self._size, the header's, which is wrong in some files
                self._size = first.width, first.height
            rgb = {i: self._to_rgb(frame) for i, frame in frames.items()}
            return np.stack([rgb[i] for i in indices])

    def frames(self) -> Iterator[av.VideoFrame]:
        """Every frame, rotated and mirrored as the file says.

        Raises a UserError if the file is damaged.
        """
        with read_errors(self.path, kind="video"):
            for frame in self._frames_from_start():
                if frame.is_corrupt:
                    raise ValueError(DAMAGED)
                if frame.side_data.get("DISPLAYMATRIX") is None:
                    yield frame
                else:
                    pixels = np.ascontiguousarray(upright(frame.to_ndarray(format="rgb24"), frame))
                    turned = self._av.VideoFrame.from_ndarray(pixels)
                    turned.pts, turned.time_base = frame.pts, frame.time_base
                    yield turned

    def _open(self) -> None:
        if not os.path.isfile(self.path):
            alike = any(os.path.isfile(unicodedata.normalize(form, self.path)) for form in ("NFC", "NFD"))
            other = ", but one with this name in other Unicode characters (NFC or NFD: macOS stores accents separately)"
            folder = "it is a folder: frames as images are not read" if os.path.isdir(self.path) else ""
            raise ValueError(folder or f"there is no such file{other if alike else ''}")
        # "file:" and the whitelists: neither a path like http:// nor a playlist in the file can open anything else.
        options = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS}
        try:
            self._container = self._av.open(f"file:{self.path}", metadata_errors="ignore", options=options)
        except self._av.ArgumentError as error:
            raise ValueError(f"it is not in one of the supported containers ({CONTAINERS})") from error
        cover = self._av.stream.Disposition.attached_pic
        streams = [s for s in self._container.streams.video if not s.disposition & cover]
        if not streams:  # the cover picture of an audio file does not count
            raise ValueError("it has no video stream")
        self._stream = streams[0]
        codec = self._stream.codec_context
        if codec.width * codec.height > MAX_PIXELS:
            raise ValueError(f"its frames of {codec.width} x {codec.height} pixels are too large")
        codec.options = {"max_pixels": str(MAX_PIXELS)}  # for frames larger than the header says
        codec.thread_count = 1  # the workers already read clips in parallel

    def _scan(self) -> None:
        """Find time stamps (in display order), key frames and frame rate from the packets alone."""
        codec, first, shown, stamps, is_counted = self._stream.codec_context, None, [], [], False
        self._key_pts: list[int] = []
        for packet in self._container.demux(self._stream):
            if not packet.size:
                continue
            first = first or packet
            if packet.is_discard:
                continue
            if packet.is_corrupt:
                raise ValueError(DAMAGED)
            if packet.is_keyframe and packet.pts is not None:
                self._key_pts.append(packet.pts)
            number = num_shown(codec.codec.canonical_name, memoryview(packet))
            is_counted |= number is None or (number > 0 and packet.pts is None)
            shown += [packet.pts] * (number or 0)
            stamps += [packet.pts] if number != 0 and packet.pts is not None else []
        if is_cut_off(self.path):
            raise ValueError(DAMAGED)
        self._key_pts.sort()
        pts = sorted({stamp for stamp in shown if stamp is not None})
        self._pts = None if is_counted or not self._are_of_frames(pts, shown, first) else pts
        self.num_frames = len(pts) if self._pts else sum(1 for _ in self._frames_from_start())
        if not self.num_frames:
            raise ValueError("it has no frames")
        self.fps = self._rate(stamps)

    def _are_of_frames(self, pts: list[int], shown: list[int], first: av.Packet | None) -> bool:
        """Whether `pts` (the packets' `shown`, sorted) are the time stamps that the decoder gives to the frames.

        If not, frames are counted by decoding.
        """
        codec = self._stream.codec_context
        if not TIMED & set(self._container.format.name.split(",")) or codec.field_order not in PROGRESSIVE:
            return False
        if not pts or len(pts) != len(shown) or not first.is_keyframe or first.pts is None or first.pts > pts[0]:
            return False  # frames shown before the first key frame may not decode
        # Some programs write decoding times instead. These ascend, starting with the first packet.
        is_delayed = first.dts is not None and first.dts < first.pts
        return shown != pts or is_delayed or not codec.has_b_frames

    def _rate(self, stamps: list[int]) -> float:
        """The declared frame rate, as in SlowFast, or the measured one if the declared one is missing or wrong.

        `stamps`: time stamps of all packets that may be frames, in any order.
        """
        declared = float(self._stream.average_rate or self._stream.guessed_rate or 0)
        length = (max(stamps) - min(stamps)) * Fraction(self._stream.time_base or 0) if stamps else 0
        if self.num_frames < 2 or not length:
            return declared or 30.0
        measured = float((self.num_frames - 1) / length)
        return declared if 0.9 < declared / measured < 1.1 else measured

    def _frames_from_start(self) -> Iterator[av.VideoFrame]:
        self.close()
        self._open()  # reopen, because not every format can seek
        yield from self._container.decode(self._stream)

    def _frames_from(self, key_pts: int, wanted: Container[int]) -> Iterator[av.VideoFrame]:
        """Frames from a key frame on, skipping those neither wanted nor referenced by others."""
        self._container.seek(key_pts, stream=self._stream)
        codec = self._stream.codec_context
        for packet in self._container.demux(self._stream):
            codec.skip_frame = "DEFAULT" if packet.pts is None or packet.pts in wanted else "NONREF"
            yield from packet.decode()

    def _decode_by_time(self, wanted: dict[int, int]) -> dict[int, av.VideoFrame]:
        """Frames by index; `wanted` maps time stamps to indices."""
        key_pts = [pts for pts in self._key_pts if pts <= min(wanted)]
        for start in key_pts[:-3:-1]:  # an open group of pictures may need the previous key frame
            found = {}
            for frame in self._frames_from(start, wanted):
                if frame.pts in wanted and not frame.is_corrupt:
                    found[wanted[frame.pts]] = frame
                if len(found) == len(wanted):
                    return found
        return self._decode_by_count(set(wanted.values()))  # damage, or frames with other time stamps

    def _decode_by_count(self, wanted: set[int]) -> dict[int, av.VideoFrame]:
        """Frames by index, decoding from the start."""
        found = {}
        for i, frame in enumerate(self._frames_from_start()):
            if i in wanted and not frame.is_corrupt:
                found[i] = frame
            if i >= max(wanted):
                break
        if missing := sorted(wanted - set(found)):
            raise ValueError(f"{DAMAGED}: frame {missing[0]} of {self.num_frames} does not decode")
        return found

    def _to_rgb(self, frame: av.VideoFrame) -> np.ndarray:
        width, height = self._size
        rgb = self._reformatter.reformat(frame, width, height, "rgb24", threads=1)
        return upright(rgb.to_ndarray(), frame)


def upright(pixels: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """Rotate (to the nearest quarter turn) and mirror the pixels [H, W, 3] of a frame by its display matrix."""
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].tolist()  # x' = a x + c y, y' = b x + d y
    if abs(a) + abs(d) < abs(b) + abs(c):
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return pixels[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
