"""Images in the ImageNet folder layout: a folder per split, in it a folder per class, in it the images.

    <root>/train/<class>/*.jpg
    <root>/val/<class>/*.jpg

The label of a class is the rank of its folder's name, as in torchvision's ImageFolder.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, has_file_allowed_extension, make_dataset

from ats.datasets.base import FileDataset
from ats.datasets.transforms import Transform
from ats.errors import NoSuchSplit, UserError, counted

logger = logging.getLogger(__name__)

MAX_PIXELS = 2 * 89_478_485  # where Pillow refuses by default; checked here too because programs switch that off
# Not all that Pillow can open: for EPS it would start Ghostscript, whatever the name of the file.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")


class ImageNet(FileDataset):
    """The images of one split.

    Args:
        root: folder with `train/` and `val/`.
        split: "train" or "val".
        transform: from an RGB PIL image to a tensor.
        on_bad, seed: see `FileDataset`.

    Raises:
        UserError: the folder is missing or empty, or a class has no image.

    Attributes:
        classes: names of the class folders, sorted. labels: int64 array, one per image.
    """

    def __init__(
        self,
        root: str | os.PathLike,
        *,
        split: Literal["train", "val"],
        transform: Transform,
        on_bad: Literal["raise", "replace"] = "raise",
        seed: int = 0,
    ):
        if split not in ("train", "val"):
            raise ValueError(f'split must be "train" or "val"; got {split!r}.')
        super().__init__(on_bad=on_bad, seed=seed)
        self.folder = os.path.join(os.path.expanduser(root), split)
        self.transform = transform
        self.classes, files = _scan(self.folder)
        # Arrays, not lists: a worker that reads a Python list touches the reference count of each entry, so that in
        # the end every worker holds its own copy of the 1.3 million paths.
        self.files = np.array([os.fsencode(os.path.relpath(path, self.folder)) for path, _ in files])
        self.labels = np.array([label for _, label in files])

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        """Path of the file of sample `index`."""
        return os.path.join(self.folder, os.fsdecode(self.files[index]))

    def label(self, index: int) -> int:
        """Class of image `index`."""
        return int(self.labels[index])

    def load(self, index: int) -> Tensor:
        """Decode and transform image `index`.

        Raises:
            UserError: the file cannot be read.
        """
        return self.transform(read_image(self.path(index)))


def read_image(path: str) -> Image.Image:
    """Decode an image file and convert it to RGB, as torchvision's ImageFolder does.

    Raises:
        UserError: the file is missing, is not an image, is damaged, or is too large to be decoded safely.
    """
    try:
        with open(path, "rb") as file, open_image(file) as image:
            return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # damaged files make decoders raise anything: OSError, SyntaxError, struct.error, ...
        raise UserError(
            f"Cannot read the image {path}: {_reason(error, path)}. Restore the file, or remove it from the data set."
        ) from error


def open_image(file: BinaryIO) -> Image.Image:
    """The image in an open file, of which only the header has been read.

    Raises:
        ValueError: it would unpack to more than MAX_PIXELS. Whatever Pillow raises at a damaged header.
    """
    image = Image.open(file, formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
    return image


def _reason(error: Exception, path: str) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is not an image, or its header is damaged"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{error}".rstrip(".") or type(error).__name__


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
        if has_file_allowed_extension(name, IMG_EXTENSIONS):
            return True
        if not name.startswith("."):
            skipped[os.path.splitext(name)[1].lower() or "without extension"] += 1
        return False

    files = make_dataset(folder, class_to_label, is_valid_file=is_image, allow_empty=True)
    empty = sorted(set(range(len(classes))) - {label for _, label in files})
    if not files:
        raise UserError(f"The class folders in {folder} hold no images ({', '.join(IMG_EXTENSIONS)}). {expected}")
    if skipped:
        counts = ", ".join(f"{count} {extension}" for extension, count in skipped.most_common())
        logger.warning(
            "%s: %s; skipped %s: only %s are read.",
            *(folder, counted(len(files), "image"), counts, ", ".join(IMG_EXTENSIONS)),
        )
    if empty:
        names = ", ".join(classes[label] for label in empty[:5]) + (", ..." if len(empty) > 5 else "")
        logger.warning(
            "%d of the %d class folders in %s hold no image: %s. Their labels keep their places.",
            len(empty),
            len(classes),
            folder,
            names,
        )
    return classes, files
