"""Images in the ImageNet folder layout: a folder per split, in it a folder per class, in it the images.

    <root>/train/<class>/*.jpg
    <root>/val/<class>/*.jpg

The label of a class is the rank of its folder's name, as in torchvision's ImageFolder.
"""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes, make_dataset

from ats.datasets.sampler import Draw
from ats.datasets.transforms import Transform
from ats.errors import UserError

logger = logging.getLogger(__name__)

MAX_PIXELS = 2 * 89_478_485  # where Pillow refuses by default; checked here too because programs switch that off
MAX_REPLACEMENTS = 16  # unreadable files in a row before giving up


class Sample(NamedTuple):
    """One image, or after collation a batch of them."""

    x: Tensor  # [3, H, W]
    label: int
    index: int  # of the image in x: after a replacement that of the replacing one
    bad: str  # path of the file that was asked for and could not be read, or ""


class ImageNet(Dataset[Sample]):
    """The images of one split.

    Args:
        root: folder with `train/` and `val/`.
        split: "train" or "val".
        transform: from an RGB PIL image to a tensor.
        on_bad: what happens at a file that cannot be read: "raise" a UserError, or "replace" it by another sample, the
            same one in every run, and report its path in `Sample.bad`.
        seed: chooses the replacements.

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
        if on_bad not in ("raise", "replace"):
            raise ValueError(f'on_bad must be "raise" or "replace"; got {on_bad!r}.')
        self.folder = os.path.join(os.path.expanduser(root), split)
        self.transform = transform
        self.on_bad = on_bad
        self.seed = seed
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

    def __getitem__(self, key: int | Draw) -> Sample:
        """Read and transform a sample.

        Args:
            key: an index, for which random transforms draw from the global generators as they are; or a `Draw`, for
                which they are seeded by `key.seed` and afterwards put back as they were.

        Raises:
            UserError: the file cannot be read, and `on_bad` is "raise"; or too many files in a row cannot be read.
        """
        if not isinstance(key, Draw):
            return self._read(int(key))
        with seeded(key.seed):
            return self._read(key.index)

    def __getitems__(self, keys: Sequence[int | Draw]) -> list[Sample] | UserError:
        """A batch for a DataLoader. A UserError is returned, not raised: see `ats.datasets.build.Loader`."""
        try:
            return [self[key] for key in keys]
        except UserError as error:
            return error

    def _read(self, index: int) -> Sample:
        bad = ""
        for attempt in range(MAX_REPLACEMENTS):
            try:
                image = read_image(self.path(index))
            except UserError:
                if self.on_bad == "raise":
                    raise
                bad = bad or self.path(index)
                index = int(np.random.default_rng([self.seed, index, attempt]).integers(len(self)))
            else:
                return Sample(self.transform(image), int(self.labels[index]), index, bad)
        raise UserError(f"{bad} cannot be read, and nor can the {MAX_REPLACEMENTS - 1} files tried in its place.")


def read_image(path: str) -> Image.Image:
    """Decode an image file and convert it to RGB, as torchvision's ImageFolder does.

    Raises:
        UserError: the file is missing, is not an image, is damaged, or is too large to be decoded safely.
    """
    try:
        with open(path, "rb") as file, Image.open(file) as image:  # reads the header only
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {MAX_PIXELS}")
            return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # damaged files make decoders raise anything: OSError, SyntaxError, struct.error, ...
        raise UserError(
            f"Cannot read the image {path}: {_reason(error, path)}. Restore the file, or remove it from the data set."
        ) from error


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed `random`, `numpy` and `torch` (CPU) for the block, then put their states back."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - timm draws from the global generator
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would disturb the GPU's generators
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


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
        raise UserError(f"The data folder {folder} does not exist. {expected}")
    try:
        classes, class_to_label = find_classes(folder)
    except FileNotFoundError:
        raise UserError(f"The data folder {folder} has no class folders in it. {expected}") from None
    files = make_dataset(folder, class_to_label, extensions=IMG_EXTENSIONS, allow_empty=True)
    empty = sorted(set(range(len(classes))) - {label for _, label in files})
    if not files:
        raise UserError(f"The class folders in {folder} hold no images ({', '.join(IMG_EXTENSIONS)}). {expected}")
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
