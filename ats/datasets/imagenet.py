"""Images in the ImageNet folder layout: a folder per split, with a folder of images per class.

    <root>/train/<class>/*.jpg
    <root>/val/<class>/*.jpg

Labels follow the sorted folder names, as in torchvision's ImageFolder.
"""

from __future__ import annotations

import logging
import os
import stat
from dataclasses import KW_ONLY, dataclass
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from ats.datasets.base import FileDataset, read_errors
from ats.datasets.folders import class_folders, files_below, warn_about_numbers
from ats.datasets.transforms import Transform
from ats.errors import NoSuchSplit, UserError, counted, printable
from ats.files import similar_folder

logger = logging.getLogger(__name__)

MAX_PIXELS = 2 * 89_478_485  # Pillow's own default limit; checked here too because some programs turn that off
# Not every format Pillow can open: for EPS it would start Ghostscript, whatever the extension.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
# Tags of TIFF, and their values.
BITS_PER_SAMPLE, PHOTOMETRIC, PLANES, SAMPLE_FORMAT = 258, 262, 284, 339
WHITE_IS_ZERO, SEPARATE, SIGNED = 0, 2, 2


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
        # Arrays, not lists: reading a list entry writes its reference count, so copy-on-write would give every worker
        # its own copy of the 1.3 million paths.
        self.files = np.array(list(map(os.fsencode, files)))
        label = {name: label for label, name in enumerate(self.classes)}
        self.labels = np.array([label[_class_of(path)] for path in files])  # int64, one per image

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        return os.path.join(self.folder, os.fsdecode(self.files[index]))

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def load(self, index: int) -> Tensor:
        return self.transform(read_image(self.path(index)))


def read_image(path: str) -> Image.Image:
    """Decode an image file and convert it to RGB like torchvision's ImageFolder, which ignores the EXIF orientation and
    drops the alpha channel without blending.

    Raises a UserError if the file is missing, is not an image, is damaged, is too large to decode safely, or holds
    numbers of unknown range.
    """
    with read_errors(path, kind="image"):
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a FIFO would wait for ever
            raise ValueError("it is not a regular file")
        try:
            with open(path, "rb") as file, open_image(file) as image:
                return to_rgb(image)
        except Image.UnidentifiedImageError as error:
            kinds = f"{', '.join(FORMATS)}, with 1, 3 or 4 channels"
            raise ValueError(f"it is not an image that can be read ({kinds}), or its header is damaged") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """The image with 8 bits for each of red, green and blue.

    16-bit values keep their upper 8 bits. Pillow does the same for several channels, but clips single-channel images.
    """
    tags = getattr(image, "tag_v2", {})  # of TIFF
    bits = max(tags.get(BITS_PER_SAMPLE, (16,)))
    is_16_bit = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if reason := (
        (SIGNED in tags.get(SAMPLE_FORMAT, ()) and "signed integers, whose range is unknown")
        or (image.mode == "F" and "floating-point numbers, whose range is unknown")
        or (image.mode == "I" and not is_16_bit and "32-bit integers, whose range is unknown")
        or (tags.get(PLANES) == SEPARATE and bits > 8 and "in separate planes, which Pillow misreads")
    ):
        raise ValueError(f"its pixels are {reason}; save it with 8 bits per channel")
    if not is_16_bit:
        return image.convert("RGB")
    pixels = (np.asarray(image) >> (bits - 8)).astype(np.uint8)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:  # Pillow inverts these with 8 bits, but not with 16
        pixels = 255 - pixels
    return Image.fromarray(pixels).convert("RGB")


def open_image(file: BinaryIO) -> Image.Image:
    """Open an image and read only its header.

    Raises a ValueError for more than MAX_PIXELS pixels, and whatever Pillow raises for a damaged header.
    """
    image = Image.open(file, formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
    return image


def _scan(folder: str) -> tuple[list[str], list[str]]:
    """The class names, and the paths of all images relative to `folder`, both sorted."""
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
        found = class_folders(root) if os.path.isdir(root) else []
        names = ", ".join(map(printable, found[:3])) + ", ..." * (len(found) > 3)
        hint = f"\n{root} has the folders {names}. If these are the classes, move them into train/ and val/."
        is_flat = found and not {"train", "val"} & {*found}
        near = "" if os.path.isdir(root) else similar_folder(root)
        raise NoSuchSplit(f"The data folder {folder} does not exist.{near} {expected}{hint * bool(is_flat)}")
    classes = class_folders(folder)
    if not classes:
        raise UserError(f"The data folder {folder} has no class folders in it. {expected}")
    paths = files_below(folder, IMG_EXTENSIONS, noun="image")
    known = set(classes)
    files = [path for path in paths if _class_of(path) in known]
    if not files:
        extensions = ", ".join(IMG_EXTENSIONS)
        raise UserError(f"The class folders in {folder} hold no images ({extensions}). {expected}")
    if num_beside := len(paths) - len(files):
        message = "%s: %s not in a class folder, and so left out."
        logger.warning(message, folder, counted(num_beside, "image is", "images are"))
    if empty := sorted(known - set(map(_class_of, files))):
        names = ", ".join(map(printable, empty[:5])) + (", ..." if len(empty) > 5 else "")
        message = "%d of the %d class folders in %s hold no image: %s. They keep their labels."
        logger.warning(message, len(empty), len(classes), folder, names)
    warn_about_numbers(root, tuple(classes))
    return classes, files


def _class_of(path: str) -> str:
    return path.split(os.sep, 1)[0]
