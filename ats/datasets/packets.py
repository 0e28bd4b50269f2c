"""Inspects a video file without decoding it: how many frames each packet shows, and whether the file is complete.

FFmpeg tells neither. A packet of VP8, VP9 or AV1 may hold only an alternate reference frame, which later frames refer
to and which decodes to nothing. And FFmpeg reads a truncated file as if it were complete.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import BinaryIO

# Top-level boxes of mp4 and mov. Anything else may be appended data.
BOXES = {b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"free", b"skip", b"wide", b"sidx", b"mfra", b"uuid", b"udta"}

TINY = 20  # bytes; for other codecs, a packet smaller than this marks a skipped frame (FFmpeg's limit)


def num_shown(codec: str, data: memoryview) -> int | None:
    """How many frames a packet decodes to; None if only decoding can tell."""
    match codec:
        case "h264" | "hevc":
            return 1
        case "vp8":
            return data[0] >> 4 & 1
        case "vp9":
            return sum(map(_vp9_is_shown, _vp9_frames(data)))
        case "av1":
            return sum(map(_av1_is_shown, _av1_frame_headers(data)))
    return 1 if len(data) >= TINY else None


def _vp9_frames(data: memoryview) -> Iterator[memoryview]:
    """The frames of a packet: either one, or a superframe of several followed by an index of their sizes."""
    marker, start = data[-1], 0
    num_frames, num_bytes = (marker & 7) + 1, (marker >> 3 & 3) + 1
    index = data[-(2 + num_frames * num_bytes) :]
    if marker >> 5 != 0b110 or index[0] != marker:
        yield data
        return
    for i in range(num_frames):
        size = int.from_bytes(index[1 + i * num_bytes : 1 + (i + 1) * num_bytes], "little")
        if frame := data[start : start + size]:
            yield frame
        start += size


def _vp9_is_shown(frame: memoryview) -> bool:
    """From the first bits: marker 2, profile 2 (3 has another bit), show_existing_frame, frame_type, show_frame."""
    bits = frame[0] << (frame[0] >> 4 & 3 == 3)
    return bool(bits >> 3 & 1 or bits >> 1 & 1)


def _av1_is_shown(header: memoryview) -> bool:
    """From the first bits of a frame header: show_existing_frame, frame_type 2, show_frame."""
    return bool(header[0] >> 7 or header[0] >> 4 & 1)


def _av1_frame_headers(data: memoryview) -> Iterator[memoryview]:
    """The OBUs of a packet that start with a frame header: OBU_FRAME_HEADER and OBU_FRAME."""
    position = 0
    while position < len(data):
        header = data[position]
        position += 1 + (header >> 2 & 1)  # the header and its optional extension
        size = len(data) - position
        if header >> 1 & 1:
            size, position = _leb128(data, position)
        if header >> 3 & 15 in (3, 6) and data[position : position + size]:
            yield data[position : position + size]
        position += size


def _leb128(data: memoryview, position: int) -> tuple[int, int]:
    """A number with 7 bits per byte, lowest first, and the position after it."""
    value = 0
    for i, byte in enumerate(data[position : position + 8]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, position + i + 1
    return 0, len(data)  # damaged


def is_cut_off(path: str | os.PathLike) -> bool:
    """Whether an mp4, mov, mkv, webm or avi file ends before its last box, segment or chunk; False for other formats.

    A file without sizes (a live recording), or one cut between two fragments, looks complete.
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
