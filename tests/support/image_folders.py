"""Small folders of images, and archives of them, in ImageNet's layout, for the tests of the data sets."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from ats.config import get_cfg

SIZE = 32


def make_tree(root: Path, *, num_classes: int = 3, num_images: int = 4, size: int = SIZE) -> Path:
    """A small ImageNet tree of noise images, all different."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(num_classes):
            folder = root / split / f"n{label:08d}"
            folder.mkdir(parents=True)
            for i in range(num_images):
                Image.fromarray(rng.integers(256, size=(size, size, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return root


def make_cfg(root: Path, **changes):
    cfg = get_cfg()
    cfg.DATA.PATH_TO_DATA_DIR = str(root)
    cfg.DATA.TRAIN_CROP_SIZE = cfg.DATA.TEST_CROP_SIZE = SIZE
    cfg.DATA.TEST_CROP_RATIO = 1.0
    cfg.DATA_LOADER.NUM_WORKERS = 0
    cfg.MODEL.NUM_CLASSES = 3
    cfg.TRAIN.BATCH_SIZE = cfg.TEST.BATCH_SIZE = 5
    cfg.RNG_SEED = 1
    for key, value in changes.items():
        section, name = key.split("__")
        cfg[section][name] = value
    return cfg


def damage(path: Path, kind: str) -> None:
    content = path.read_bytes()
    if kind == "truncated png":
        path.write_bytes(content[: len(content) // 2])
    elif kind == "truncated jpeg":
        buffer = io.BytesIO()
        Image.open(io.BytesIO(content)).save(buffer, format="jpeg", quality=95)
        path.write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    elif kind == "text":
        path.write_text("<html>404 Not Found</html>")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "missing":
        path.unlink()
    else:  # a PNG of 400 bytes that claims 10 gigapixels
        chunk = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
        huge = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
        path.write_bytes(content[:8] + huge + content[33:])


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def jpeg(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(buffer, format="jpeg")
    return buffer.getvalue()


def make_archives(folder: Path) -> Path:
    """Small official archives: 2 classes and an inner node, 5 validation images, 3 training images per class."""
    from scipy.io import savemat

    folder.mkdir()
    fields = ["ILSVRC2012_ID", "WNID", "words", "gloss", "num_children", "children", "wordnet_height"]
    rows = [
        (1, "n00000007", "cat, true cat", "", 0, 0, 0),
        (2, "n00000003", "dog", "", 0, 0, 0),
        (3, "n00000001", "animal", "", 2, 0, 1),
    ]
    synsets = np.array(rows, dtype=[(name, object) for name in fields])
    meta = io.BytesIO()
    savemat(meta, {"synsets": synsets})
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as tar:
        add(tar, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        add(tar, "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt", b"2\n1\n1\n2\n2\n")
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as tar:
        for number in (3, 1, 2, 5, 4):
            add(tar, f"ILSVRC2012_val_{number:08d}.JPEG", jpeg(number))
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as tar:
        for wnid in ("n00000003", "n00000007"):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as inner_tar:
                for number in range(3):
                    add(inner_tar, f"{wnid}_{number}.JPEG", jpeg(number))
            add(tar, f"{wnid}.tar", inner.getvalue())
    return folder
