"""Frames of video files: which ones form a clip, and how to read them without decoding the rest.

    sampling = ClipSampling(num_frames=16, sampling_rate=4)
    with Video(path) as video:
        size = sampling.size(video.fps)
        start = sampling.start(video.num_frames, size, clip=0, num_clips=5)
        frames = video.read(sampling.indices(video.num_frames, size, start))

The sampling is SlowFast's (`get_start_end_idx`, `temporal_sampling`). Frames are counted in display order: frame i is
the i-th frame that decoding the whole file would give. `Video` reads the time stamps from the file's packets, which
needs no decoding, and decodes from the last key frame before the clip.
"""

from __future__ import annotations

import math
import os
from collections.abc import Container, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from fractions import Fraction
from typing import BinaryIO, NamedTuple

import av
import numpy as np
import torch
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

from ats.errors import UserError

MAX_PIXELS = 8192 * 8192  # per frame; more is a mistake or an attempt to exhaust memory
# Formats FFmpeg may use: video containers, not lists of other files (concat, hls, dash, image2, sdp, ...).
CONTAINERS = "mov,matroska,avi,mpeg,mpegts,mpegvideo,flv,asf,ogg"

# Top-level boxes of mp4 and mov. Anything else may be data that somebody appended.
BOXES = {b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"free", b"skip", b"wide", b"sidx", b"mfra", b"uuid", b"udta"}


class ClipSampling(NamedTuple):
    """Which frames a clip has: `num_frames`, every `sampling_rate`-th of a video at `target_fps`.

    Training adds a random amount up to `fps_jitter` to `target_fps`. With `use_offset_sampling` test clips span the
    whole video, and a single clip is in the middle. Without it they are `1 / num_clips` of the free length apart, so
    the last one ends before the video does.
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
        """The frames, evenly spaced over the clip. Past the end of the video, its last frame repeats."""
        # float32, as in SlowFast: float64 rounds down to a different frame in some cases.
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
        self._reformatter = VideoReformatter()
        try:
            with self._errors_with_path():
                self._open()
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
        """uint8 RGB [len(indices), H, W, 3], rotated for display as the file says. Any order; indices may repeat.

        Raises:
            UserError: a frame is damaged.
            IndexError: there is no such frame.
        """
        if not len(indices) or min(indices) < 0 or max(indices) >= self.num_frames:
            raise IndexError(f"{self.path} has frames 0 to {self.num_frames - 1}; got {indices}.")
        with self._errors_with_path():
            if self._pts is None:
                frames = self._decode_by_count(set(indices))
            else:
                frames = self._decode_by_time({self._pts[i]: i for i in set(indices)})
        return np.stack([frames[i] for i in indices])

    def frames(self) -> Iterator[tuple[av.VideoFrame, int]]:
        """Every frame as FFmpeg decodes it, and the number of quarter turns to the left that display it upright.

        Raises a UserError if the file is damaged.
        """
        with self._errors_with_path():
            for frame in self._frames_from_start():
                if frame.is_corrupt:
                    raise UserError("it is cut off or damaged")
                yield frame, _quarter_turns(frame)

    def _open(self) -> None:
        if not os.path.isfile(self.path):
            raise UserError("there is no such file")
        # "file:" and the whitelists: neither a path like http:// nor a playlist in the file can open anything else.
        options = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS}
        try:
            self._container = av.open(f"file:{self.path}", metadata_errors="ignore", options=options)
        except av.ArgumentError as error:
            raise UserError(f"it is not in one of the supported containers ({CONTAINERS})") from error
        streams = [s for s in self._container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:  # a cover picture in a sound file does not count
            raise UserError("it has no video stream")
        self._stream = streams[0]
        width, height = self._stream.codec_context.width, self._stream.codec_context.height
        if width * height > MAX_PIXELS:
            raise UserError(f"its frames of {width} x {height} pixels are too large")
        self._stream.codec_context.thread_count = 1  # the workers already read clips in parallel

    def _scan(self) -> None:
        """Find time stamps (in display order), key frames and rate from the packets alone."""
        packets = [packet for packet in self._container.demux(self._stream) if packet.size and not packet.is_discard]
        if any(packet.is_corrupt for packet in packets) or is_cut_off(self.path):
            raise UserError("it is cut off or damaged")
        pts = sorted({packet.pts for packet in packets if packet.pts is not None})
        # In other containers (AVI) packets may lack time stamps or have other ones than the frames: count frames.
        is_reliable = bool(set(self._container.format.name.split(",")) & {"mp4", "matroska"})
        self._pts = pts if is_reliable and len(pts) == len(packets) else None
        self._key_pts = sorted(packet.pts for packet in packets if packet.is_keyframe and packet.pts is not None)
        self.num_frames = len(pts) if self._pts is not None else sum(1 for _ in self._frames_from_start())
        if not self.num_frames:
            raise UserError("it has no frames")
        self.fps = self._rate(pts)

    def _rate(self, pts: list[int]) -> float:
        """The declared rate, as in SlowFast; the measured one if the file declares none or a wrong one."""
        declared = float(self._stream.average_rate or self._stream.guessed_rate or 0)
        if len(pts) < 2 or not self._stream.time_base:
            return declared or 30.0
        measured = float((len(pts) - 1) / ((pts[-1] - pts[0]) * Fraction(self._stream.time_base)))
        return declared if 0.9 < declared / measured < 1.1 else measured

    def _frames_from_start(self) -> Iterator[av.VideoFrame]:
        self.close()
        self._open()  # reopen, because not every format can seek
        yield from self._container.decode(self._stream)

    def _frames_from(self, key_pts: int, wanted: Container[int]) -> Iterator[av.VideoFrame]:
        """Frames from a key frame on. Skips frames that are neither wanted nor referenced by others."""
        self._container.seek(key_pts, stream=self._stream)
        codec = self._stream.codec_context
        for packet in self._container.demux(self._stream):
            codec.skip_frame = "DEFAULT" if packet.pts is None or packet.pts in wanted else "NONREF"
            yield from packet.decode()

    def _decode_by_time(self, wanted: dict[int, int]) -> dict[int, np.ndarray]:
        """Frames by index; `wanted` maps time stamps to indices."""
        key_pts = [pts for pts in self._key_pts if pts <= min(wanted)]
        for start in key_pts[:-3:-1]:  # an open group of pictures may need the previous key frame
            found = {}
            for frame in self._frames_from(start, wanted):
                if frame.pts in wanted and not frame.is_corrupt:
                    found[wanted[frame.pts]] = self._to_rgb(frame)
                if len(found) == len(wanted):
                    return found
        return self._decode_by_count(set(wanted.values()))  # damage, or frames with other time stamps

    def _decode_by_count(self, wanted: set[int]) -> dict[int, np.ndarray]:
        """Frames by index, decoding from the start."""
        found = {}
        for i, frame in enumerate(self._frames_from_start()):
            if i in wanted and not frame.is_corrupt:
                found[i] = self._to_rgb(frame)
            if i >= max(wanted):
                break
        if missing := sorted(wanted - set(found)):
            raise UserError(f"it is cut off or damaged: frame {missing[0]} of {self.num_frames} does not decode")
        return found

    def _to_rgb(self, frame: av.VideoFrame) -> np.ndarray:
        rgb = self._reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
        return np.rot90(rgb, _quarter_turns(frame))

    @contextmanager
    def _errors_with_path(self) -> Iterator[None]:
        """Raise FFmpeg's errors, and reasons given as a UserError, as a UserError with path and advice."""
        try:
            yield
        except (av.FFmpegError, UserError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(
                f"Cannot read the video {self.path}: {reason}. Restore the file, or remove it from the data set."
            ) from error


def _quarter_turns(frame: av.VideoFrame) -> int:
    return round(frame.rotation / 90) % 4


def is_cut_off(path: str | os.PathLike) -> bool:
    """Whether an mp4, mov, mkv, webm or avi file ends before its last box, segment or chunk; False for other formats.

    FFmpeg reads such a file as if it were complete. A file without sizes (a live recording), or cut between two
    fragments, looks complete.
    """
    end = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(4096)
        if head[:4] == b"\x1a\x45\xdf\xa3":  # EBML
            return _matroska_end(head) > end
        if head[:4] == b"RIFF":
            return int.from_bytes(head[4:8], "little") + 8 > end
        return _boxes_end(file, end) > end


def _boxes_end(file: BinaryIO, end: int) -> int:
    """End of the last top-level box; 0 if unknown."""
    position = 0
    while position + 8 <= end:
        file.seek(position)
        header = file.read(16)
        size, kind = int.from_bytes(header[:4]), header[4:8]
        size = int.from_bytes(header[8:16]) if size == 1 else size
        if kind not in BOXES or size < 8:  # size 0: up to the end of the file
            return 0
        position += size
    return position


def _matroska_end(head: bytes) -> int:
    """End of the segment; 0 if unknown."""
    header_size, position = _ebml_size(head, 4)
    position += header_size
    if header_size < 0 or head[position : position + 4] != b"\x18\x53\x80\x67":  # Segment
        return 0
    size, position = _ebml_size(head, position + 4)
    return 0 if size < 0 else position + size


def _ebml_size(data: bytes, position: int) -> tuple[int, int]:
    """The size field at `position` (-1: unknown, as in a live recording), and the position after it."""
    first = data[position] if position < len(data) else 0
    length = 9 - first.bit_length()  # bytes: one plus the number of leading zero bits
    value = int.from_bytes(data[position : position + length]) & (1 << 7 * length) - 1
    return -1 if value == (1 << 7 * length) - 1 or not first else value, position + length
