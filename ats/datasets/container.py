"""Whether a video file is shorter than its own headers say. FFmpeg takes what is left of a file for the whole."""

from __future__ import annotations

import os
from typing import BinaryIO

# Top-level boxes of mp4 and mov; behind others there may be anything that somebody appended.
BOXES = {b"ftyp", b"styp", b"moov", b"moof", b"mdat", b"free", b"skip", b"wide", b"sidx", b"mfra", b"uuid", b"udta"}


def is_cut_off(path: str | os.PathLike) -> bool:
    """Whether an mp4, mov, mkv, webm or avi file ends before its last box, segment or chunk does; others: False.

    A file without sizes (a live recording) or one cut between two fragments looks whole.
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
    """Where the last box at the top level ends; 0 if that is not known."""
    position = 0
    while position + 8 <= end:
        file.seek(position)
        header = file.read(16)
        size, kind = int.from_bytes(header[:4]), header[4:8]
        size = int.from_bytes(header[8:16]) if size == 1 else size
        if kind not in BOXES or size < 8:  # 0: to the end of the file
            return 0
        position += size
    return position


def _matroska_end(head: bytes) -> int:
    """Where the segment ends; 0 if that is not known."""
    header_size, position = _ebml_size(head, 4)
    position += header_size
    if header_size < 0 or head[position : position + 4] != b"\x18\x53\x80\x67":  # Segment
        return 0
    size, position = _ebml_size(head, position + 4)
    return 0 if size < 0 else position + size


def _ebml_size(data: bytes, position: int) -> tuple[int, int]:
    """The size at `position` (-1: unknown, of a live recording), and the position behind it."""
    first = data[position] if position < len(data) else 0
    length = 9 - first.bit_length()  # as many bytes as there are leading zeros, and one
    value = int.from_bytes(data[position : position + length]) & (1 << 7 * length) - 1
    return -1 if value == (1 << 7 * length) - 1 or not first else value, position + length
