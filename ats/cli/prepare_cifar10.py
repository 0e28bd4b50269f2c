"""Write CIFAR-10 (Krizhevsky, 2009: 60,000 photographs of 32 x 32 pixels in 10 classes) in the folder layout that the
loaders read.

    python tools/prepare_cifar10.py --download              from https://www.cs.toronto.edu/~kriz/cifar.html, 163 MB
    python tools/prepare_cifar10.py --source ~/Downloads    from a copy of cifar-10-python.tar.gz, or unpacked
    python tools/prepare_cifar10.py --source cifar10.zip    from images in a zip file or in a folder

Images from the official archive become lossless PNG files: 50,000 in <output>/train/<class>/*.png and 10,000 in
<output>/val/<class>/*.png. Images of a zip file or folder are copied unchanged; it must hold

    train/<class>/*   and   val/<class>/* or test/<class>/*      <class>: airplane, automobile, bird, ..., truck

If the same images are already there, nothing is written.
"""

from __future__ import annotations

import io
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from ats.cli.generated_folder import Kind, checksum, make_folder, run_tool
from ats.cli.parser import command_parser, to_path
from ats.errors import UserError

KIND = Kind("CIFAR-10", "cifar10.json")
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
NUM_IMAGES = {"train": 50_000, "val": 10_000}
OFFICIAL = ARCHIVE, UNPACKED = "cifar-10-python.tar.gz", "cifar-10-batches-py"
TREE = "train/<class>/* and val/<class>/* (or test/<class>/*), where <class> is airplane, automobile, bird, ... truck"
MAX_BYTES = 2**20  # of an image; one of 32 x 32 pixels has about 2,000


def prepare_cifar10(output: str | Path, *, source: str | Path | None = None, download: bool = False) -> bool:
    """Write CIFAR-10 to `output`.

    Args:
        source: the official archive or its folder, or a zip file or a folder of images in class folders.
        download: get the official archive, into `source` or next to `output`.

    Returns:
        True if the images were written, False if they were already there.

    Raises:
        UserError: the source does not exist, or does not hold CIFAR-10.
    """
    if download:
        source = Path(source or Path(output).absolute().parent)
        _download(source)
    elif source is None:
        raise UserError(
            "Say where CIFAR-10 is with --source (the official archive, or a zip file or folder of images), or get it "
            "with --download."
        )
    source = Path(source)
    root = source.parent if source.name in OFFICIAL else source
    if any((root / name).exists() for name in OFFICIAL):
        return make_folder(
            output, kind=KIND, settings={"source": "official"}, fill=lambda to: _fill(to, _official(root))
        )
    if not source.exists():
        raise UserError(f"There is no {source}. Name a copy of CIFAR-10 with --source, or get it with --download.")
    settings = {"source": "images", "sha256": checksum(source)}
    return make_folder(output, kind=KIND, settings=settings, fill=lambda to: _fill(to, _images(source)))


def _download(root: Path) -> None:
    from torchvision.datasets import CIFAR10  # slow to import

    try:
        CIFAR10(root, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"CIFAR-10 cannot be downloaded ({error}). Get {ARCHIVE} from https://www.cs.toronto.edu/~kriz/cifar.html "
            "on another machine and name its folder with --source."
        ) from error


File = tuple[str, str, bytes]  # split, name below it ("airplane/0001.jpg"), content


def _official(root: Path) -> Iterator[File]:
    """The images of the official archive in `root`, or unpacked there, as PNG files."""
    from PIL import Image
    from torchvision.datasets import CIFAR10

    if not (root / UNPACKED).is_dir():
        _download(root)  # finds, checks and unpacks the archive
    for split in NUM_IMAGES:
        try:
            dataset = CIFAR10(root, train=split == "train")
        except Exception as error:  # unpickling can raise anything
            raise UserError(f"{root / UNPACKED} is damaged ({error}). Remove it and unpack {ARCHIVE} again.") from error
        for index, (pixels, label) in enumerate(zip(dataset.data, dataset.targets, strict=True)):
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            yield split, f"{CLASSES[label]}/{index:05d}.png", file.getvalue()


def _images(source: Path) -> Iterator[File]:
    """The images of a zip file or folder with `train/<class>/` and `val/<class>/` (or `test/`) somewhere in it."""
    from ats.datasets.imagenet import open_image  # imports torch

    for name, read in _members(source):
        *_, split, label, file_name = ("", "", *PurePosixPath(name).parts)
        if file_name.startswith(".") or "__MACOSX" in name or split not in ("train", "val", "test"):
            continue
        if label not in CLASSES:
            raise UserError(f"{source} is not CIFAR-10: it has {name}. It must hold {TREE}.")
        try:
            content = read()
            open_image(io.BytesIO(content)).close()
        except Exception as error:  # a damaged file makes Pillow and zipfile raise anything
            raise UserError(f"{name} in {source} cannot be read as an image ({error}).") from error
        yield "val" if split == "test" else split, f"{label}/{file_name}", content


def _members(source: Path) -> Iterator[tuple[str, Callable[[], bytes]]]:
    """Name and content of every file in a folder or zip file, sorted by name."""
    if source.is_dir():
        for path in sorted(path for path in source.rglob("*") if path.is_file()):
            yield path.relative_to(source).as_posix(), path.read_bytes
        return
    try:
        archive = zipfile.ZipFile(source)
    except (OSError, zipfile.BadZipFile) as error:
        raise UserError(f"{source} is not a zip file, nor {ARCHIVE}. It must hold {TREE}.") from error
    with archive:
        for info in sorted(archive.infolist(), key=lambda info: info.filename):
            if info.file_size > MAX_BYTES:
                raise UserError(f"{source} is not CIFAR-10: {info.filename} has {info.file_size:,} bytes.")
            if not info.is_dir():
                yield info.filename, partial(archive.read, info)


def _fill(folder: Path, files: Iterable[File]) -> dict:
    """Write the files below `folder`; returns the number of images per split."""
    for split in NUM_IMAGES:
        for label in CLASSES:
            (folder / split / label).mkdir(parents=True)
    count: Counter[tuple[str, str]] = Counter()
    with tqdm(total=sum(NUM_IMAGES.values()), unit="image", disable=None) as bar:
        for split, name, content in files:
            path = folder / split / name
            if path.exists():
                raise UserError(f"Two images would become {split}/{name}: the source holds several copies of CIFAR-10.")
            path.write_bytes(content)
            count[split, name.partition("/")[0]] += 1
            bar.update()
    if empty := [f"{split}/{label}" for split in NUM_IMAGES for label in CLASSES if not count[split, label]]:
        raise UserError(
            f"There are no images for {', '.join(empty[:3])}{', ...' if empty[3:] else ''}. Expected: {TREE}."
        )
    num = {split: sum(count[split, label] for label in CLASSES) for split in NUM_IMAGES}
    for split, expected in NUM_IMAGES.items():
        if num[split] != expected:
            print(f"warning: {split} has {num[split]:,} images, CIFAR-10 {expected:,}", file=sys.stderr)
    return {"num_images": num}


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = command_parser(__doc__)
    parser.option(
        "--output", "output folder (default: %(default)s)", type=to_path, default="data/cifar10", metavar="DIR"
    )
    parser.option("--source", "a local copy: folder, zip file or the official archive", type=to_path, metavar="PATH")
    parser.add_argument("--download", action="store_true", help="get the official archive, into --source if given")
    return run_tool(parser, prepare_cifar10, argv)
