"""Images in the ImageNet folder layout: a folder per split, with a folder of images per class.

    <root>/train/<class>/*.jpg
    <root>/val/<class>/*.jpg

Labels follow the sorted folder names, as in torchvision's ImageFolder.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from dataclasses import KW_ONLY, dataclass
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, has_file_allowed_extension, make_dataset

from ats.datasets.base import FileDataset
from ats.datasets.transforms import Transform
from ats.errors import NoSuchSplit, UserError, counted

logger = logging.getLogger(__name__)

MAX_PIXELS = 2 * 89_478_485  # Pillow's own default limit; checked here too because some programs turn that off
# Not every format Pillow can open: for EPS it would start Ghostscript, whatever the file's name.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")


@dataclass(eq=False, repr=False)
class ImageNet(FileDataset):
    """The images of one split.

    Raises a UserError if the folder is missing, or has no class folders or no images.
    """

    root: str | os.PathLike  # folder with train/ and val/
    _: KW_ONLY
    split: Literal["train", "val"]
    transform: Transform

    def __post_init__(self) -> None:
        self.folder = os.path.join(os.path.expanduser(self.root), self.split)
        self.classes, files = _scan(self.folder)  # the names of the class folders, sorted
        # Arrays, not lists: reading a list entry writes its reference count, so copy-on-write would end up giving
        # every worker its own copy of the 1.3 million paths.
        self.files = np.array([os.fsencode(os.path.relpath(path, self.folder)) for path, _ in files])
        self.labels = np.array([label for _, label in files])  # int64, one per image

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        return os.path.join(self.folder, os.fsdecode(self.files[index]))

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def load(self, index: int) -> Tensor:
        return self.transform(read_image(self.path(index)))


def read_image(path: str) -> Image.Image:
    """Decode an image file and convert it to RGB, as torchvision's ImageFolder does.

    Raises a UserError if the file is missing, is not an image, is damaged, or is too large to decode safely.
    """
    try:
        with open(path, "rb") as file, open_image(file) as image:
            return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise anything: OSError, SyntaxError, struct.error, ...
        reason = getattr(error, "strerror", None) or f"{error}".rstrip(".") or type(error).__name__
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "it is not an image, or its header is damaged"
        advice = "Restore the file, or remove it from the data set."
        raise UserError(f"Cannot read the image {path}: {reason}. {advice}") from error


def open_image(file: BinaryIO) -> Image.Image:
    """Open an image and read only its header.

    Raises a ValueError for more than MAX_PIXELS pixels, and whatever Pillow raises for a damaged header.
    """
    image = Image.open(file, formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
    return image


def _scan(folder: str) -> tuple[list[str], list[tuple[str, int]]]:
    """The class names, and the path and label of every image, both sorted."""
    root = os.path.dirname(folder)
    expected = (
        f"DATA.PATH_TO_DATA_DIR must be a folder with this content:\n"
        f"    {root or '<folder>'}/\n"
        f"      train/<class>/*.jpg    a folder per class; the labels follow the sorted names\n"
        f"      val/<class>/*.jpg      the same classes\n"
        f"tools/prepare_imagenet.py makes it from the official archives, tools/make_digits.py makes a small one."
    )
    if not root:
        raise UserError(f"DATA.PATH_TO_DATA_DIR is not set. {expected}")
    if not os.path.isdir(folder):
        raise NoSuchSplit(f"The data folder {folder} does not exist. {expected}")
    try:
        classes, class_to_label = find_classes(folder)
    except FileNotFoundError:
        raise UserError(f"The data folder {folder} has no class folders in it. {expected}") from None
    skipped: Counter[str] = Counter()

    def is_image(path: str) -> bool:
        name = os.path.basename(path)
        is_read = has_file_allowed_extension(name, IMG_EXTENSIONS)
        if not is_read and not name.startswith("."):
            skipped[os.path.splitext(name)[1].lower() or "without extension"] += 1
        return is_read

    files = make_dataset(folder, class_to_label, is_valid_file=is_image, allow_empty=True)
    extensions = ", ".join(IMG_EXTENSIONS)
    if not files:
        raise UserError(f"The class folders in {folder} hold no images ({extensions}). {expected}")
    if skipped:
        counts = ", ".join(f"{count} {extension}" for extension, count in skipped.most_common())
        message = "%s: %s; skipped %s: only %s are read."
        logger.warning(message, folder, counted(len(files), "image"), counts, extensions)
    with_images = {label for _, label in files}
    if empty := [name for label, name in enumerate(classes) if label not in with_images]:
        names = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        message = "%d of the %d class folders in %s hold no image: %s. Their labels keep their places."
        logger.warning(message, len(empty), len(classes), folder, names)
    return classes, files
