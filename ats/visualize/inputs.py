"""Image and video files as network inputs, and class names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from timm.data import ImageNetInfo
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from ats.config import CfgNode
from ats.config.keys import keys
from ats.datasets.base import ADVICE, read_errors
from ats.datasets.build import build_clip_transforms, build_transform, clip_sampling, input_shape
from ats.datasets.decode import VIDEO_EXTENSIONS
from ats.datasets.folders import class_folders, files_below
from ats.datasets.imagenet import read_image
from ats.datasets.kinetics import read_clip, read_csv
from ats.errors import UserError, printable, suggest
from ats.files import encoding_of

IMAGENET_1K = "imagenet-1k"


def takes_clips(cfg: CfgNode) -> bool:
    """Whether the data sets of a config hold clips."""
    return len(input_shape(cfg)) == 4


def list_files(paths: Iterable[Path], *, clips: bool) -> list[Path]:
    """The given files and, for each folder, all images (or clips) below it, sorted. UserError if a path does not exist,
    a folder has no such file, or a file is of the wrong kind.
    """
    kind, extensions = ("clip", VIDEO_EXTENSIONS) if clips else ("image", IMG_EXTENSIONS)
    others = IMG_EXTENSIONS if clips else VIDEO_EXTENSIONS
    files: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"There is no file or folder {path}.{suggest(str(path), keys())}")
        if path.is_file() and path.suffix.lower() in others:
            other = "an image" if clips else "a clip"
            raise UserError(f"{path} is {other}, but the network of this config takes {kind}s.")
        if not path.is_dir():
            files.append(path)
            continue
        below = [path / name for name in files_below(path, extensions, noun=kind)]
        if not below:
            raise UserError(f"The folder {path} holds no {kind} ({', '.join(extensions)}).")
        files += sorted(below)
    return files


def read_input(path: Path, cfg: CfgNode) -> Tensor:
    """An image [3, H, W], or the middle clip of a video [3, T, H, W], preprocessed as in the config's evaluation.
    UserError, with the path, if it cannot be read.
    """
    try:
        with read_errors(str(path)):
            if not takes_clips(cfg):
                return build_transform(cfg, "test")(read_image(str(path)))
            frames = read_clip(str(path), clip_sampling(cfg)._replace(use_offset_sampling=True), clip=0)
            return build_clip_transforms(cfg, "val")[0](frames)
    except UserError as error:  # the file is in no data set
        raise UserError(str(error).removesuffix(f" {ADVICE}")) from error


def class_names(cfg: CfgNode, source: str = "") -> list[str]:
    """A name for each class.

    Args:
        source: a file with one name per line, or "imagenet-1k" for timm's list. "": the names of the data's class
            folders; without data, ImageNet's if the network classifies images into 1,000 classes; else numbers.

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
    """Name of a class folder -> label: the data's folders or, without data, the `names` of the classes."""
    folders = _class_folders(cfg)
    return {name: label for label, name in enumerate(folders if len(folders) == cfg.MODEL.NUM_CLASSES else names)}


def _names_of_folders(cfg: CfgNode) -> list[str]:
    """Names of the classes of the class folders in label order; none if there are no such folders."""
    names = _class_folders(cfg)
    if names and all(re.fullmatch(r"n\d{8}", name) for name in names):
        descriptions = ImageNetInfo("imagenet-22k").label_descriptions(as_dict=True)
        names = [descriptions.get(name, name) for name in names]
    return names


def _class_folders(cfg: CfgNode) -> list[str]:
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
