"""Unpack the official ImageNet (ILSVRC 2012) archives into the folder layout that the loaders read.

    python tools/prepare_imagenet.py --archives ~/Downloads --output data/imagenet

The archives come from https://image-net.org (an account is needed):

    ILSVRC2012_devkit_t12.tar.gz       which classes there are, and the class of each validation image
    ILSVRC2012_img_val.tar             50,000 validation images  ->  <output>/val/<wnid>/*.JPEG
    ILSVRC2012_img_train.tar           1,281,167 images          ->  <output>/train/<wnid>/*.JPEG

Without --split, every archive found is unpacked. Archives are read once, sequentially, and are not changed. Each image
is written under a temporary name and renamed when complete, so you can stop and restart the program at any time; images
that are already there are kept.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import UnidentifiedImageError
from tqdm import tqdm

from ats.cli.parser import command, command_parser, to_path
from ats.errors import UserError, needing
from ats.files import write

DEVKIT = "ILSVRC2012_devkit_t12.tar.gz"
ARCHIVES = {"val": "ILSVRC2012_img_val.tar", "train": "ILSVRC2012_img_train.tar"}
WNID = "n[0-9]{8}"
AGAIN = "Download it again; images that are already unpacked will be kept."
MAX_BYTES = 256 * 1024**2  # per file in an archive; the largest official one has 15 MB


class Devkit(NamedTuple):
    """What the devkit says about the images."""

    wnids: set[str]  # classes that have images
    val_wnids: list[str]  # the class of each validation image, in order
    num_train: dict[str, int]  # training images per class; empty if unknown


def read_devkit(path: Path) -> Devkit:
    """Read the class list (`data/meta.mat`) and the validation labels from the devkit archive.

    Raises:
        UserError: the archive is missing, damaged or another file.
    """
    with needing("scipy", what="The devkit needs"):
        from scipy.io import loadmat  # slow to import

    names = ("meta.mat", "ILSVRC2012_validation_ground_truth.txt")
    with _open(path) as archive, _damage(path):
        meta, labels = (_read(archive, archive.getmember(f"ILSVRC2012_devkit_t12/data/{name}")) for name in names)
        while archive.fileobj.read(2**20):  # to the end, where gzip compares checksums
            pass
        synsets = np.atleast_1d(loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"])
        # Inner nodes of the WordNet tree (num_children > 0) also have ids, but no images.
        classes = {int(row["ILSVRC2012_ID"]): row for row in synsets if row["num_children"] == 0}
        wnids = {number: str(row["WNID"]) for number, row in classes.items()}
        for wnid in wnids.values():  # they become folder names
            if not re.fullmatch(WNID, wnid):
                raise tarfile.ReadError(f"meta.mat has the class {wnid!r}, which is not like n01440764")
        if not wnids or len(set(wnids.values())) < len(wnids):
            raise tarfile.ReadError("meta.mat has no classes, or one of them twice")
        if unknown := {label.decode() for label in labels.split()} - set(map(str, wnids)):
            raise tarfile.ReadError(f"{names[1]} has the label {min(unknown)[:20]!r}, which is no class of meta.mat")
        has_counts = "num_train_images" in (synsets.dtype.names or ())
        num_train = {wnids[n]: int(row["num_train_images"]) for n, row in classes.items()} if has_counts else {}
        return Devkit(set(wnids.values()), [wnids[int(label)] for label in labels.split()], num_train)


def arrange_val(archive: Path, output: Path, *, devkit: Devkit) -> int:
    """Write the validation images to `<output>/val/<wnid>/`.

    Returns:
        The number of images written; those that were already there do not count.

    Raises:
        UserError: the archive is damaged or incomplete, or does not belong to the devkit.
    """

    def target(name: str) -> str:
        match = re.fullmatch(r"(?:.*/)?(ILSVRC2012_val_([0-9]{8})\.JPEG)", name)
        number = int(match[2]) if match else 0
        if match is None or not 1 <= number <= len(devkit.val_wnids):
            raise UserError(
                f"{archive} holds {name!r}, none of the {len(devkit.val_wnids)} validation images that {DEVKIT} lists."
            )
        return f"{devkit.val_wnids[number - 1]}/{match[1]}"

    with _open(archive) as tar, tqdm(total=len(devkit.val_wnids), desc="val", unit="image", disable=None) as bar:
        num_found, num_written = _extract(tar, output / "val", archive=archive, target=target, bar=bar)
    if not num_found == len(devkit.val_wnids) > 0:
        raise UserError(
            f"{archive} is incomplete: {num_found} of the {len(devkit.val_wnids)} images that {DEVKIT} lists. Download "
            f"{'it' if devkit.val_wnids else DEVKIT} again; images that are already unpacked will be kept."
        )
    return num_written


def arrange_train(archive: Path, output: Path, *, devkit: Devkit | None = None) -> int:
    """Write the training images to `<output>/train/<wnid>/`. The archive holds one archive per class.

    Returns:
        The number of images written; those that were already there do not count.

    Raises:
        UserError: the archive is damaged, or classes or images are missing (checked if the devkit is given).
    """
    found, num_written = set(), 0
    with (
        _open(archive) as outer,
        tqdm(total=archive.stat().st_size, desc="train", unit="B", unit_scale=True, disable=None) as bar,
    ):
        for member in _files(outer, archive):
            match = re.fullmatch(rf"(?:.*/)?({WNID})\.tar", member.name)
            if not match or (devkit and match[1] not in devkit.wnids):
                raise UserError(f"{archive} holds {member.name!r}, which is not the archive of a class.")
            wnid = match[1]
            bar.set_description(f"train {wnid}")

            def target(name: str, wnid: str = wnid) -> str:
                match = re.fullmatch(rf"(?:.*/)?({wnid}_[0-9]+\.JPEG)", name)
                if not match:
                    raise UserError(f"{wnid}.tar in {archive} holds {name!r}, which is not an image of that class.")
                return f"{wnid}/{match[1]}"

            with _damage(archive):
                inner = tarfile.open(fileobj=outer.extractfile(member), mode="r:")  # noqa: SIM115 - holds no file
            num_found, num_new = _extract(inner, output / "train", archive=archive, target=target)
            expected = devkit.num_train.get(wnid, num_found) if devkit else num_found
            if num_found != expected:
                raise UserError(
                    f"{archive} is incomplete: {wnid}.tar in it has {num_found} of {expected} images. {AGAIN}"
                )
            num_written += num_new
            found.add(wnid)
            bar.update(member.size)
    if devkit and found != devkit.wnids:
        raise UserError(f"{archive} is incomplete: {len(found)} of {len(devkit.wnids)} classes. {AGAIN}")
    return num_written


def _extract(
    tar: tarfile.TarFile, folder: Path, *, archive: Path, target: Callable[[str], str], bar: tqdm | None = None
) -> tuple[int, int]:
    """Write the files of an archive to `folder / target(name)`; returns how many it holds and how many were new."""
    num_found = num_written = 0
    for member in _files(tar, archive):
        path = folder / target(member.name)
        num_found += 1
        if not (path.is_file() and path.stat().st_size == member.size):
            with _damage(archive):
                content = _read(tar, member)
                _check_image(content, member.name)
            write(path, content, sync=False)
            num_written += 1
        if bar is not None:
            bar.update()
    return num_found, num_written


def _files(tar: tarfile.TarFile, archive: Path) -> Iterator[tarfile.TarInfo]:
    """The files of an archive, except hidden ones; refuses links, other members, and repeated names."""
    names: set[str] = set()
    while True:
        with _damage(archive):
            if (member := tar.next()) is None:
                tar.fileobj.seek(tar.offset)
                if tar.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):  # tarfile takes damage for the end
                    raise tarfile.ReadError("it is cut off or damaged")
                return
            name = member.name.rpartition("/")[2]
            if member.isdir() or name.startswith("."):  # macOS adds "._" files
                continue
            if not member.isfile():
                raise tarfile.ReadError(f"{member.name!r} is not a file")
            if name in names:
                raise tarfile.ReadError(f"it holds {name!r} twice")
            names.add(name)
        yield member


def _read(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """The content of a file in an archive; refuses one that would exhaust memory."""
    if member.size > MAX_BYTES:
        raise tarfile.ReadError(f"{member.name} has {member.size} bytes, more than {MAX_BYTES}")
    content = tar.extractfile(member).read()
    if len(content) != member.size:
        raise tarfile.ReadError(f"{member.name} is cut off")
    return content


def _check_image(content: bytes, name: str) -> None:
    """Refuse a file without an image header, or whose image would exhaust memory."""
    from ats.datasets.imagenet import open_image  # imports torch

    try:
        open_image(io.BytesIO(content)).close()
    except Exception as error:  # a damaged header makes Pillow raise anything
        reason = "is not an image" if isinstance(error, UnidentifiedImageError) else f"cannot be read: {error}"
        raise tarfile.ReadError(f"{name} {reason}") from error


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Treat any exception while reading an archive as a bad download. Do not write files inside this block."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # tarfile and scipy raise anything: TarError, zlib.error, KeyError, TypeError, ...
        reason = f"{error}".partition("\n")[0].rstrip(".:") or type(error).__name__
        raise UserError(f"{path} is damaged or is not the official archive ({reason}). Download it again.") from error


@contextmanager
def _open(path: Path) -> Iterator[tarfile.TarFile]:
    if not path.is_file():
        raise UserError(
            f"{path} does not exist. Get it from https://image-net.org and name its folder with --archives."
        )
    with _damage(path):
        archive = tarfile.open(path)  # noqa: SIM115 - closed below
    with archive:
        yield archive


def prepare_imagenet(archives: str | Path, output: str | Path, *, splits: list[str] | None = None) -> dict[str, int]:
    """Unpack the archives in the folder `archives` below `output`.

    Args:
        splits: "val", "train" or both; default: those whose archive exists.

    Returns:
        The number of images written, by split.

    Raises:
        UserError: an archive is missing, damaged or incomplete.
    """
    archives, output = Path(archives), Path(output)
    if splits is None:
        splits = [split for split, name in ARCHIVES.items() if (archives / name).is_file()]
    if not splits:
        raise UserError(
            f"{archives} holds neither {' nor '.join(ARCHIVES.values())}. Get them, and {DEVKIT}, from "
            f"https://image-net.org and name their folder with --archives."
        )
    devkit = read_devkit(archives / DEVKIT) if "val" in splits or (archives / DEVKIT).is_file() else None
    num_written = {}
    for split in splits:
        arrange: Callable[..., int] = arrange_val if split == "val" else arrange_train
        num_written[split] = arrange(archives / ARCHIVES[split], output, devkit=devkit)
    return num_written


def run(argv: list[str]) -> None:
    """Unpack the archives given on the command line, and print what was written."""
    parser = command_parser(__doc__)
    parser.option(
        "--archives", "folder of the archives (default: %(default)s)", type=to_path, default=".", metavar="DIR"
    )
    parser.option(
        "--output", "output folder (default: %(default)s)", type=to_path, default="data/imagenet", metavar="DIR"
    )
    parser.add_argument(
        "--split", action="append", choices=list(ARCHIVES), help="may be repeated; default: every archive found"
    )
    args = parser.parse_args(argv)
    for split, num in prepare_imagenet(args.archives, args.output, splits=args.split).items():
        print(f"{args.output}/{split}: {f'{num} images written' if num else 'up to date'}")


main = command(run)
