"""Image and video files as network inputs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from ats.config import CfgNode
from ats.config.keys import keys
from ats.datasets.base import ADVICE, read_errors
from ats.datasets.build import build_clip_transforms, build_transform, clip_sampling
from ats.datasets.class_names import takes_clips
from ats.datasets.decode import VIDEO_EXTENSIONS
from ats.datasets.folders import files_below
from ats.datasets.imagenet import read_image
from ats.datasets.kinetics import read_clip
from ats.errors import UserError, suggest


def list_files(paths: Iterable[Path], *, clips: bool) -> dict[Path, Path]:
    """Map each given file, and every image (or clip) below a given folder, sorted, to its name: its path relative to
    that folder, so that `cat/1.jpg` and `dog/1.jpg` stay distinct.

    Raises:
        UserError: a path does not exist, a folder has no such file, or a file is of the wrong kind.
    """
    kind, extensions = ("clip", VIDEO_EXTENSIONS) if clips else ("image", IMG_EXTENSIONS)
    others = IMG_EXTENSIONS if clips else VIDEO_EXTENSIONS
    files: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise UserError(f"There is no file or folder {path}.{suggest(str(path), keys())}")
        if path.is_file() and path.suffix.lower() in others:
            other = "an image" if clips else "a clip"
            raise UserError(f"{path} is {other}, but the network of this config takes {kind}s.")
        if not path.is_dir():
            files[path] = Path(path.name)
            continue
        below = sorted(files_below(path, extensions, noun=kind))
        if not below:
            raise UserError(f"The folder {path} holds no {kind} ({', '.join(extensions)}).")
        files |= {path / name: Path(name) for name in below}
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
