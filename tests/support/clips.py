"""Small videos that the tests encode themselves; every frame shows its own number."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

NUM_BITS = 8
CODECS = {"h264": "libx264", "hevc": "libx265", "vp8": "libvpx", "vp9": "libvpx-vp9", "av1": "libsvtav1"}
CODECS |= {"mpeg4": "mpeg4", "wmv2": "wmv2"}
av.logging.set_level(None)


def numbered_frame(number: int, *, height: int = 48, width: int = 64) -> np.ndarray:
    """uint8 [height, width, 3]: the bits of `number` as black and white columns, the lowest on the left."""
    frame = np.zeros((height, width, 3), np.uint8)
    for bit in range(NUM_BITS):
        frame[:, bit * width // NUM_BITS : (bit + 1) * width // NUM_BITS] = 255 * (number >> bit & 1)
    return frame


def read_numbers(frames: np.ndarray) -> list[int]:
    """The numbers that frames [T, H, W, 3] show, whatever their size."""
    width = frames.shape[2]
    centres = [(2 * bit + 1) * width // (2 * NUM_BITS) for bit in range(NUM_BITS)]
    bits = frames[:, frames.shape[1] // 2, centres].mean(axis=-1) > 127
    return (bits * 2 ** np.arange(NUM_BITS)).sum(axis=1).tolist()


def encode(
    path: Path,
    frames: Sequence[np.ndarray] | int = 60,
    *,
    codec: str = "h264",
    fps: int = 30,
    gop_size: int = 12,
    milliseconds: Sequence[int] = (),
    rotation: int = 0,
    hflip: bool = False,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """Encode frames (a number: that many numbered ones); `milliseconds` are the time stamps of a variable rate."""
    if isinstance(frames, int):
        frames = [numbered_frame(i) for i in range(frames)]
    try:
        av.codec.Codec(CODECS[codec], "w")
    except av.codec.codec.UnknownCodecError:
        pytest.skip(f"this PyAV cannot encode {codec} ({CODECS[codec]})")
    quiet = {"hevc": {"x265-params": "log-level=none"}}.get(codec, {})
    path.parent.mkdir(parents=True, exist_ok=True)
    with _same_priority(), av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(CODECS[codec], rate=fps, options=quiet | (options or {}))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.codec_context.gop_size = "yuv420p", gop_size
        if milliseconds:
            stream.codec_context.time_base = Fraction(1, 1000)
        if rotation or hflip:
            stream.set_display_rotation(rotation, hflip=hflip)
        for i, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if milliseconds:
                frame.pts, frame.time_base = milliseconds[i], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def remux(
    path: Path, sources: Sequence[Path], change: Callable[[list[av.Packet]], list[av.Packet]] = lambda packets: packets
) -> Path:
    """Copy the packets of videos, one video after the other, to a new file; `change` gets and returns their list."""
    packets, end = [], 0
    with ExitStack() as stack, av.open(str(path), "w") as target:
        streams = [stack.enter_context(av.open(str(source))).streams.video[0] for source in sources]
        copy = target.add_stream_from_template(streams[0], opaque=True)
        for stream in streams:
            new = [packet for packet in stream.container.demux(stream) if packet.size]
            for packet in new:
                packet.pts, packet.dts = packet.pts + end, (packet.pts if packet.dts is None else packet.dts) + end
            end = max(packet.pts + packet.duration for packet in new)
            packets += new
        for packet in change(packets):
            packet.stream = copy
            target.mux(packet)
    return path


@contextmanager
def _same_priority() -> Iterator[None]:
    """SVT-AV1 puts the thread of a root user that encodes, and whatever it starts later, into the real-time class:
    a test that then waits for its own processes on one core waits for ever.
    """
    if not hasattr(os, "sched_getscheduler"):
        yield
        return
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def noise(num_frames: int, *, height: int = 48, width: int = 64, seed: int = 0) -> list[np.ndarray]:
    """Frames that take many bytes, so that there is something to damage."""
    return list(np.random.default_rng(seed).integers(256, size=(num_frames, height, width, 3), dtype=np.uint8))
