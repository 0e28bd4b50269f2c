"""Frames out of video files: which ones belong to a clip, and how to read them without decoding the rest.

    with Video(path) as video:
        size = clip_size(video.fps, num_frames=16, sampling_rate=4)
        start = clip_start(video.num_frames, size, view=0, num_views=5)
        frames = video.read(frame_indices(start, size, num_frames=16, num_video_frames=video.num_frames))

The first three functions are SlowFast's rule (`get_start_end_idx`, `temporal_sampling`). Frames are counted in the
order they are shown: frame i is the i-th that decoding the whole file would give. `Video` knows their time stamps from
the file's packets, which costs no decoding, and starts at the last key frame before the clip.
"""

from __future__ import annotations

import math
import os
from collections.abc import Container, Iterator, Sequence
from fractions import Fraction

import av
import numpy as np
import torch
from av.stream import Disposition
from av.video.reformatter import VideoReformatter

from ats.datasets.container import is_cut_off
from ats.errors import UserError

MAX_PIXELS = 8192 * 8192  # of a frame; more is a mistake, or made to exhaust the memory
# What FFmpeg may take a file for: containers of videos, not lists of other files (concat, hls, dash, image2, sdp, ...).
CONTAINERS = "mov,matroska,avi,mpeg,mpegts,mpegvideo,flv,asf,ogg"


def clip_size(fps: float, *, num_frames: int, sampling_rate: int, target_fps: float = 30) -> float:
    """Length of a clip in frames of a video of `fps`: that of `num_frames` every `sampling_rate`-th at `target_fps`."""
    return max(1.0, sampling_rate * num_frames / target_fps * fps)


def clip_start(
    num_video_frames: int, size: float, *, view: int, num_views: int, use_offset_sampling: bool = False
) -> float:
    """Start, in frames, of test clip `view` of `num_views` of length `size`.

    With `use_offset_sampling` they reach from the first to the last frame, and a single one is in the middle; without,
    they are `1 / num_views` of the free length apart: the last one ends before the video does.
    """
    free = max(num_video_frames - size, 0)
    if not use_offset_sampling:
        return free * view / num_views
    return float(math.floor(free / 2) if num_views == 1 else view * math.floor(free / (num_views - 1)))


def frame_indices(start: float, size: float, *, num_frames: int, num_video_frames: int) -> list[int]:
    """The `num_frames` frames of a clip: evenly from its first to its last; behind the video's end its last frame."""
    # float32, as in SlowFast: float64 rounds down to another frame in some cases.
    index = torch.linspace(start, start + size - 1, num_frames)
    return index.clamp(0, num_video_frames - 1).long().tolist()


class Video:
    """An open video file; a context manager.

    Args:
        path: a local file: mp4, webm, mkv or whatever else FFmpeg reads.

    Raises:
        UserError: the file is missing, is no video, or is damaged or cut off; the message has the path and the reason.

    Attributes:
        num_frames: how many there are. fps: their rate; of a variable one the average.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = os.fspath(path)
        self._container: av.container.InputContainer | None = None
        self._reformatter = VideoReformatter()
        try:
            self._open()
            self._scan()
        except (av.FFmpegError, UserError) as error:
            self.close()
            raise self._error(error) from error

    def __enter__(self) -> Video:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._container is not None:
            self._container.close()
            self._container = None

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """Frames by index, in that order; an index may stand more than once.

        Returns:
            uint8 RGB [len(indices), H, W, 3], turned as the file says it is to be shown.

        Raises:
            UserError: a frame is damaged.
            IndexError: there is no such frame.
        """
        if not len(indices) or min(indices) < 0 or max(indices) >= self.num_frames:
            raise IndexError(f"{self.path} has frames 0 to {self.num_frames - 1}; got {indices}.")
        try:
            if self._pts is None:
                frames = self._decode_by_count(set(indices))
            else:
                frames = self._decode_by_time({self._pts[i]: i for i in set(indices)})
        except (av.FFmpegError, UserError) as error:
            raise self._error(error) from error
        return np.stack([frames[i] for i in indices])

    def frames(self) -> Iterator[tuple[av.VideoFrame, int]]:
        """Every frame as FFmpeg has it, and the quarter turns to the left in which it is to be shown.

        Raises:
            UserError: the file is damaged.
        """
        try:
            for frame in self._frames_from_start():
                if frame.is_corrupt:
                    raise UserError("it is cut off or damaged")
                yield frame, _quarter_turns(frame)
        except (av.FFmpegError, UserError) as error:
            raise self._error(error) from error

    def _open(self) -> None:
        if not os.path.isfile(self.path):
            raise UserError("there is no such file")
        # "file:" and the lists: neither a name like http:// nor a play list in the file reaches out of it.
        options = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS}
        try:
            self._container = av.open(f"file:{self.path}", metadata_errors="ignore", options=options)
        except av.ArgumentError as error:
            raise UserError(f"it is none of the containers that are read ({CONTAINERS})") from error
        streams = [s for s in self._container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:  # or the cover picture of a sound file alone
            raise UserError("it has no video stream")
        self._stream = streams[0]
        width, height = self._stream.codec_context.width, self._stream.codec_context.height
        if width * height > MAX_PIXELS:
            raise UserError(f"its frames of {width} x {height} pixels are too large")
        self._stream.codec_context.thread_count = 1  # clips are read in parallel by the workers

    def _scan(self) -> None:
        """Time stamps (in display order), key frames and rate, from the packets alone."""
        packets = [packet for packet in self._container.demux(self._stream) if packet.size and not packet.is_discard]
        if any(packet.is_corrupt for packet in packets) or is_cut_off(self.path):
            raise UserError("it is cut off or damaged")
        pts = sorted({packet.pts for packet in packets if packet.pts is not None})
        # Elsewhere (AVI) the packets' time stamps may be missing or not be those of the frames: these are counted.
        is_reliable = bool(set(self._container.format.name.split(",")) & {"mp4", "matroska"})
        self._pts = pts if is_reliable and len(pts) == len(packets) else None
        self._key_pts = sorted(packet.pts for packet in packets if packet.is_keyframe and packet.pts is not None)
        self.num_frames = len(pts) if self._pts is not None else sum(1 for _ in self._frames_from_start())
        if not self.num_frames:
            raise UserError("it has no frames")
        self.fps = self._rate(pts)

    def _rate(self, pts: list[int]) -> float:
        """The rate that the file declares, as SlowFast uses it; the measured one if it declares none or nonsense."""
        declared = float(self._stream.average_rate or self._stream.guessed_rate or 0)
        if len(pts) < 2 or not self._stream.time_base:
            return declared or 30.0
        measured = float((len(pts) - 1) / ((pts[-1] - pts[0]) * Fraction(self._stream.time_base)))
        return declared if 0.9 < declared / measured < 1.1 else measured

    def _frames_from_start(self) -> Iterator[av.VideoFrame]:
        self.close()
        self._open()  # anew: not every format can seek
        yield from self._container.decode(self._stream)

    def _frames_from(self, key_pts: int, wanted: Container[int]) -> Iterator[av.VideoFrame]:
        """Frames from a key frame on; those that are neither wanted nor needed by others are not decoded."""
        self._container.seek(key_pts, stream=self._stream)
        codec = self._stream.codec_context
        for packet in self._container.demux(self._stream):
            codec.skip_frame = "DEFAULT" if packet.pts is None or packet.pts in wanted else "NONREF"
            yield from packet.decode()

    def _decode_by_time(self, wanted: dict[int, int]) -> dict[int, np.ndarray]:
        """`wanted` maps time stamps to indices; returns the frames by index."""
        key_pts = [pts for pts in self._key_pts if pts <= min(wanted)]
        for start in key_pts[:-3:-1]:  # an open group of pictures may need the key frame before
            found = {}
            for frame in self._frames_from(start, wanted):
                if frame.pts in wanted and not frame.is_corrupt:
                    found[wanted[frame.pts]] = self._to_rgb(frame)
                if len(found) == len(wanted):
                    return found
        return self._decode_by_count(set(wanted.values()))  # the packets' time stamps are not the frames', or damage

    def _decode_by_count(self, wanted: set[int]) -> dict[int, np.ndarray]:
        """Frames by index, decoding everything before them."""
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
        turns = _quarter_turns(frame)
        return np.rot90(rgb, turns) if turns else rgb

    def _error(self, error: Exception) -> UserError:
        reason = getattr(error, "strerror", None) or str(error)
        return UserError(
            f"Cannot read the video {self.path}: {reason}. Restore the file, or remove it from the data set."
        )


def _quarter_turns(frame: av.VideoFrame) -> int:
    return round(frame.rotation / 90) % 4
