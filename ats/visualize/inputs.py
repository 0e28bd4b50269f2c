"""Files given to look at, as inputs of a network, and the names of its classes."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from timm.data import ImageNetInfo
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, find_classes

from ats.config import CfgNode
from ats.config.schema import KEY
from ats.datasets.build import build_clip_transforms, build_transform, input_shape
from ats.datasets.decode import Video, clip_size, clip_start, frame_indices
from ats.datasets.imagenet import read_image
from ats.datasets.kinetics import read_csv
from ats.errors import UserError, suggest

CLIP_EXTENSIONS = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".mpeg")
IMAGENET_1K = "imagenet-1k"


def takes_clips(cfg: CfgNode) -> bool:
    """Whether the data sets of a configuration hold clips."""
    return len(input_shape(cfg)) == 4


def list_files(paths: Iterable[Path], *, clips: bool) -> list[Path]:
    """The files to look at: those given, and of folders all images (or clips) in them and below, sorted.

    Raises:
        UserError: a path does not exist, a folder has no such file, or a file is of the other kind.
    """
    kind, extensions = ("clip", CLIP_EXTENSIONS) if clips else ("image", IMG_EXTENSIONS)
    others = IMG_EXTENSIONS if clips else CLIP_EXTENSIONS
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(f for f in path.rglob("*") if f.suffix.lower() in extensions and f.is_file())
            if not found:
                raise UserError(f"The folder {path} holds no {kind} ({', '.join(extensions)}).")
            files += found
        elif not path.exists():
            raise UserError(f"There is no file or folder {path}.{suggest(str(path), KEY)}")
        elif path.suffix.lower() in others:
            other = "an image" if clips else "a clip"
            raise UserError(f"{path} is {other}, but the network of this config takes {kind}s.")
        else:
            files.append(path)
    return files


def read_input(path: Path, cfg: CfgNode) -> Tensor:
    """An image [3, H, W], or the middle clip of a video [3, T, H, W], as the configuration's evaluation has it.

    Raises:
        UserError: the file cannot be read; the message has its path.
    """
    try:
        if not takes_clips(cfg):
            return build_transform(cfg, "test")(read_image(str(path)))
        data = cfg.DATA
        with Video(path) as video:
            size = clip_size(
                video.fps, num_frames=data.NUM_FRAMES, sampling_rate=data.SAMPLING_RATE, target_fps=data.TARGET_FPS
            )
            start = clip_start(video.num_frames, size, view=0, num_views=1, use_offset_sampling=True)
            frames = video.read(
                frame_indices(start, size, num_frames=data.NUM_FRAMES, num_video_frames=video.num_frames)
            )
        return build_clip_transforms(cfg, "val")[0](frames)
    except UserError as error:  # speaks of a data set
        raise UserError(str(error).replace(" Restore the file, or remove it from the data set.", "")) from error


def class_names(cfg: CfgNode, source: str = "") -> list[str]:
    """A name for each class.

    Args:
        source: a file with one name per line, or "imagenet-1k" for timm's list; "": the class folders of the data, or
            if there is no data and a network for images has 1,000 classes, ImageNet's; numbers otherwise.

    Raises:
        UserError: the file cannot be read or has another number of names than the network has classes.
    """
    num_classes = cfg.MODEL.NUM_CLASSES
    if source == IMAGENET_1K:
        names = _imagenet_names()
    elif source:
        try:
            names = [line.strip() for line in Path(source).read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"--classes {source}: cannot be read ({error}). Give a file with one name per line, or {IMAGENET_1K}."
            ) from error
    else:
        names = _names_of_folders(cfg)
        if not names and num_classes == 1000 and not takes_clips(cfg):
            names = _imagenet_names()
        if len(names) != num_classes:
            return [f"class {label}" for label in range(num_classes)]
    if len(names) != num_classes:
        raise UserError(f"--classes {source} has {len(names)} names, but the network MODEL.NUM_CLASSES {num_classes}.")
    return names


def _imagenet_names() -> list[str]:
    return ImageNetInfo(IMAGENET_1K).label_descriptions()


def _names_of_folders(cfg: CfgNode) -> list[str]:
    """Names of the class folders that the labels of the data belong to; none if there are no such folders."""
    root = os.path.expanduser(cfg.DATA.PATH_TO_DATA_DIR)
    if not root:
        return []
    try:
        if not takes_clips(cfg):
            names = find_classes(os.path.join(root, "val"))[0]
            if all(re.fullmatch(r"n\d{8}", name) for name in names):
                descriptions = ImageNetInfo("imagenet-22k").label_descriptions(as_dict=True)
                names = [descriptions.get(name, name) for name in names]
            return names
        separator = cfg.DATA.PATH_LABEL_SEPARATOR.replace("\\t", "\t")
        listing = read_csv(os.path.join(root, "val.csv"), separator=separator, num_classes=cfg.MODEL.NUM_CLASSES)
    except (OSError, UserError):
        return []
    folders: dict[int, set[str]] = {}
    for path, label in zip(listing.paths, listing.labels, strict=True):
        folders.setdefault(int(label), set()).add(os.path.basename(os.path.dirname(os.fsdecode(path))))
    is_named = set(folders) == set(range(cfg.MODEL.NUM_CLASSES)) and all(len(names) == 1 for names in folders.values())
    return [next(iter(folders[label])) for label in range(cfg.MODEL.NUM_CLASSES)] if is_named else []
