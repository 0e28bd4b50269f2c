"""ats.datasets.imagenet.read_image: which pictures come out of which kinds of files."""

from __future__ import annotations

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from ats.datasets.imagenet import read_image
from ats.errors import UserError


def _gradient() -> tuple[np.ndarray, np.ndarray]:
    y, x = np.mgrid[:16, :24]
    grey = (10 * x + y).astype(np.uint8)  # 0 to 245
    return grey, np.stack([grey, 255 - grey, grey // 2], axis=-1)


GREY, RGB = _gradient()
GREY_16, BIG_ENDIAN = GREY.astype("<u2") * 257, GREY.astype(">u2") * 257


def tiff(pixels: np.ndarray, *, bits: int, kind: int = 1, photometric: int = 1, separate: bool = False) -> bytes:
    """An uncompressed little-endian TIFF, which Pillow cannot write in all these ways.

    `kind`: 1 unsigned, 2 signed, 3 floating point. `photometric`: 0 white is zero, 1 black is zero, 2 RGB.
    """
    channels = pixels.shape[2] if pixels.ndim == 3 else 1
    planes = [plane.tobytes() for plane in np.moveaxis(pixels, 2, 0)] if separate else [pixels.tobytes()]
    tags = {256: [24], 257: [16], 258: [bits] * channels, 259: [1], 262: [photometric], 273: None, 277: [channels]}
    tags |= {278: [16], 279: list(map(len, planes)), 284: [1 + separate], 339: [kind] * channels}
    start = end = 8 + 2 + 12 * len(tags) + 4
    tags[273] = [0] * len(planes)
    end += sum(4 * len(values) for values in tags.values() if len(values) > 1)
    tags[273] = [end + sum(map(len, planes[:i])) for i in range(len(planes))]
    directory, outside = struct.pack("<H", len(tags)), b""
    for tag, values in sorted(tags.items()):
        content = struct.pack(f"<{len(values)}L", *values)
        offset = content if len(values) == 1 else struct.pack("<L", start + len(outside))
        outside += content if len(values) > 1 else b""
        directory += struct.pack("<HHL", tag, 4, len(values)) + offset
    return b"II*\0" + struct.pack("<L", 8) + directory + struct.pack("<L", 0) + outside + b"".join(planes)


def png(pixels: np.ndarray, *, colour: int) -> bytes:
    """A PNG with 16 bits per channel."""
    parts = [(b"IHDR", struct.pack(">IIBBBBB", 24, 16, 16, colour, 0, 0, 0))]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    parts += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    chunks = (struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def saved(pixels: np.ndarray, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind, **options)
    return buffer.getvalue()


def packed_12_bit() -> bytes:
    """The grey picture as a TIFF with 12 bits per pixel, two pixels in three bytes."""
    first, second = (GREY.astype(int) * 4095 // 255).reshape(16, 12, 2).transpose(2, 0, 1)
    three = np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], axis=-1)
    return tiff(three.astype(np.uint8).reshape(16, 36), bits=12)


# The same picture with more than 8 bits, and what it must be read as.
DEEP = {
    "grey png": (lambda: png(GREY_16, colour=0), GREY),
    "grey and alpha png": (lambda: png(np.stack([GREY_16, GREY_16 * 0 + 65535], -1), colour=4), GREY),
    "rgb png": (lambda: png(RGB.astype("<u2") * 257, colour=2), RGB),
    "rgba png": (lambda: png(np.dstack([RGB.astype("<u2") * 257, GREY_16]), colour=6), RGB),
    "grey tiff": (lambda: tiff(GREY_16, bits=16), GREY),
    "grey tiff, white is zero": (lambda: tiff(65535 - GREY_16, bits=16, photometric=0), GREY),
    "grey tiff, 8 bits, white is zero": (lambda: tiff(255 - GREY, bits=8, photometric=0), GREY),
    "grey tiff, big endian": (lambda: saved(BIG_ENDIAN, "tiff"), GREY),
    "grey tiff, compressed": (lambda: saved(GREY_16, "tiff", compression="tiff_lzw"), GREY),
    "grey tiff, 12 bits": (packed_12_bit, GREY),
    "rgb tiff": (lambda: tiff(RGB.astype("<u2") * 257, bits=16, photometric=2), RGB),
    "pgm": (lambda: b"P5 24 16 65535\n" + BIG_ENDIAN.tobytes(), GREY),
    "pgm, 1000 levels": (lambda: b"P5 24 16 1000\n" + (GREY.astype(int) * 1000 // 255).astype(">u2").tobytes(), GREY),
    "pgm of text": (lambda: b"P2 24 16 65535\n" + " ".join(map(str, GREY_16.flat)).encode(), GREY),
    "ppm": (lambda: b"P6 24 16 65535\n" + (RGB.astype(">u2") * 257).tobytes(), RGB),
}


@pytest.mark.parametrize("kind", DEEP)
def test_more_than_8_bits_are_scaled_to_8(kind, tmp_path):
    """A picture looks the same whether it is stored with 8 or with more bits."""
    write, want = DEEP[kind]
    (tmp_path / "a.png").write_bytes(write())
    read = np.asarray(read_image(str(tmp_path / "a.png"))).astype(int)
    want = want if want.ndim == 3 else np.repeat(want[..., None], 3, axis=-1)
    assert read.shape == want.shape
    assert abs(read - want).max() <= ("levels" in kind or "12 bits" in kind)


REFUSED = {
    "32-bit tiff": (lambda: saved(GREY.astype(np.int32), "tiff"), "signed integers, whose range is unknown"),
    "unsigned 32-bit tiff": (lambda: tiff(GREY.astype("<u4"), bits=32), "32-bit integers, whose range is unknown"),
    "signed 16-bit tiff": (lambda: tiff(GREY_16, bits=16, kind=2), "signed integers"),
    "signed 8-bit tiff": (lambda: tiff(GREY, bits=8, kind=2), "signed integers"),
    "float tiff": (lambda: saved(GREY.astype(np.float32) / 255, "tiff"), "floating-point numbers"),
    "float pfm": (lambda: b"Pf 24 16 -1.0\n" + GREY.astype("<f4").tobytes(), "floating-point numbers"),
    "16-bit planes": (
        lambda: tiff(RGB.astype("<u2") * 257, bits=16, photometric=2, separate=True),
        "in separate planes, which Pillow misreads",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_pixels_of_unknown_range_are_refused_by_path(kind, tmp_path):
    """In evaluation; training replaces them like any unreadable file."""
    write, reason = REFUSED[kind]
    path = tmp_path / "a.tiff"
    path.write_bytes(write())
    with pytest.raises(
        UserError, match=rf"Cannot read the image {path}: its pixels are .*{reason}.*; save it with 8 bits"
    ):
        read_image(str(path))


def test_8_bit_modes_are_read_as_torchvision_does(tmp_path):
    """Published checkpoints were evaluated this way: neither turned nor put on a background; the first of several."""
    from torchvision.datasets.folder import pil_loader

    colour, exif = Image.fromarray(RGB), Image.Exif()
    exif[274] = 6  # turn by 90 degrees
    cut_out = Image.fromarray(np.dstack([RGB, GREY]))
    files = {
        "1.png": (Image.fromarray(GREY > 127), {}),
        "p.png": (colour.quantize(64), {"transparency": 3}),
        "pa.png": (colour.quantize(64), {"transparency": bytes(range(64))}),
        "rgba.png": (cut_out, {}),
        "la.png": (cut_out.convert("LA"), {}),
        "cmyk.jpg": (colour.convert("CMYK"), {}),
        "ycbcr.tif": (colour.convert("YCbCr"), {}),
        "exif.jpg": (colour, {"exif": exif}),
        "exif.png": (colour, {"exif": exif}),
        "pages.tif": (colour, {"save_all": True, "append_images": [Image.new("RGB", (24, 16))]}),
        "frames.webp": (colour, {"save_all": True, "append_images": [Image.new("RGB", (24, 16))], "lossless": True}),
    }
    for name, (image, options) in files.items():
        image.save(tmp_path / name, **options)
        read = np.asarray(read_image(str(tmp_path / name)))
        assert read.shape == (16, 24, 3), name
        np.testing.assert_array_equal(read, np.asarray(pil_loader(tmp_path / name)), err_msg=name)


def test_pillows_warning_as_an_error_is_a_bad_file(tmp_path, monkeypatch, recwarn):
    """With `python -W error`, an image that Pillow takes for a bomb is named."""
    Image.new("RGB", (20, 10)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 150)
    warnings.simplefilter("error")
    with pytest.raises(
        UserError, match=rf"Cannot read the image {tmp_path}/a\.png: .*Image size \(200 pixels\) exceeds"
    ):
        read_image(str(tmp_path / "a.png"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(
        UserError, match=rf"Cannot read the image {tmp_path}/a\.png: .*Image size \(200 pixels\) exceeds"
    ):
        read_image(str(tmp_path / "a.png"))


@pytest.mark.parametrize("kind", ["jpeg2000", "tiff"])
def test_what_is_not_read_says_what_is(kind, tmp_path):
    """Pictures under another extension than their own, and multispectral ones, are whole."""
    write = {"jpeg2000": lambda: saved(RGB, "jpeg2000"), "tiff": lambda: tiff(np.zeros((16, 24, 5), np.uint8), bits=8)}
    (tmp_path / "a.jpg").write_bytes(write[kind]())
    with pytest.raises(UserError, match=r"it is not an image that can be read .JPEG, PNG, .*WEBP.*1, 3 or 4 channels"):
        read_image(str(tmp_path / "a.jpg"))
