"""Class names, and the folders of the classes."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from timm.data import ImageNetInfo

from ats.config import CfgNode
from ats.datasets.build import input_shape
from ats.datasets.folders import class_folders
from ats.datasets.kinetics import read_csv
from ats.errors import UserError, printable
from ats.files import encoding_of

IMAGENET_1K = "imagenet-1k"


def takes_clips(cfg: CfgNode) -> bool:
    """Whether the data sets of a config hold clips."""
    return len(input_shape(cfg)) == 4


def class_names(cfg: CfgNode, source: str = "") -> list[str]:
    """A name for each class.

    Args:
        source: a file with one name per line, or "imagenet-1k" for timm's list. "": the names of the data's class
            folders; without data, ImageNet's names for an image network with 1,000 classes, else numbers.

    Raises:
        UserError: the file cannot be read, or its number of names differs from the network's number of classes.
    """
    num_classes = cfg.MODEL.NUM_CLASSES
    names = [] if source else _names_of_folders(cfg)
    is_imagenet = not source and not names and num_classes == 1000 and not takes_clips(cfg)
    if source == IMAGENET_1K or is_imagenet:
        names = list(ImageNetInfo(IMAGENET_1K).label_descriptions())
    elif source:
        try:
            names = [line.strip() for line in Path(source).read_text(encoding_of(source)).splitlines() if line.strip()]
        except (OSError, UnicodeError) as error:
            raise UserError(
                f"--classes {source}: cannot be read ({error}). Give a file with one name per line, or {IMAGENET_1K}."
            ) from error
    if len(names) == num_classes:
        return list(map(printable, names))
    if source:
        raise UserError(f"--classes {source} has {len(names)} names, but MODEL.NUM_CLASSES is {num_classes}.")
    return [f"class {label}" for label in range(num_classes)]


def labels_of_folders(cfg: CfgNode, names: Sequence[str]) -> dict[str, int]:
    """Name of a class folder -> label, from the data's folders or, without data, from the class `names`."""
    folders = folders_of_classes(cfg)
    return {name: label for label, name in enumerate(folders if len(folders) == cfg.MODEL.NUM_CLASSES else names)}


def _names_of_folders(cfg: CfgNode) -> list[str]:
    """Class names from the class folders, in label order; empty if there are no such folders."""
    names = folders_of_classes(cfg)
    if names and all(re.fullmatch(r"n\d{8}", name) for name in names):
        descriptions = ImageNetInfo("imagenet-22k").label_descriptions(as_dict=True)
        names = [descriptions.get(name, name) for name in names]
    return names


def folders_of_classes(cfg: CfgNode) -> list[str]:
    """Names of the validation data's class folders, in label order.

    Empty without data, or if the folder of a video does not identify its class.
    """
    root, num_classes = cfg.DATA.PATH_TO_DATA_DIR, cfg.MODEL.NUM_CLASSES
    if not root:
        return []
    try:
        if not takes_clips(cfg):
            return class_folders(os.path.join(root, "val"))
        separator = cfg.DATA.PATH_LABEL_SEPARATOR
        listing = read_csv(os.path.join(root, "val.csv"), separator=separator, num_classes=num_classes)
    except (OSError, UserError):
        return []
    folders = (os.path.basename(os.path.dirname(os.fsdecode(path))) for path in listing.paths)
    pairs = sorted(set(zip(map(int, listing.labels), folders, strict=True)))  # one per class, if its folder is its name
    return [name for _, name in pairs] if [label for label, _ in pairs] == list(range(num_classes)) else []
