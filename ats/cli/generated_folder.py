"""A folder of generated files, for the tools that make data sets: made once, verified, replaced as a whole.

    made = make_folder("data/digits", kind=Kind("Digits", "digits.json"), settings={"seed": 0}, fill=write_files)

`<output>/<manifest>` says what the files are and how they were made. `<output>/SHA256SUMS` has a line for everything
else at the top level of the folder. If settings and checksums match, nothing is touched. Otherwise (other settings, a
damaged or extra file) a new folder is made next to the old one, which stays until the new one is complete.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from ats.cli.parser import Parser, command
from ats.errors import UserError
from ats.files import naming

SUMS = "SHA256SUMS"


class Kind(NamedTuple):
    """What a folder holds, for messages, and the name of its manifest file."""

    name: str
    manifest: str


def make_folder(output: str | Path, *, kind: Kind, settings: dict, fill: Callable[[Path], dict]) -> bool:
    """Make `output`, unless it already holds the files of these settings.

    Args:
        output: a folder that does not exist, is empty, or holds an older data set of this kind (which is replaced).
        settings: everything that the files depend on, as plain values.
        fill: writes the files into a given folder and returns the rest of the manifest.

    Returns:
        True if the files were made, False if they were up to date.

    Raises:
        UserError: `output` is a file, or a folder with other contents.
    """
    output = Path(output).absolute()
    _check_output(output, kind)
    _remove_leftovers(output)
    if _is_up_to_date(output, kind, settings):
        return False
    output.parent.mkdir(parents=True, exist_ok=True)
    new = output.with_name(f".{output.name}.partial-{os.getpid()}")
    shutil.rmtree(new, ignore_errors=True)  # left by a killed run with the same process id
    try:
        new.mkdir()
        with naming(output):
            write_manifest(new, kind, {"settings": settings} | fill(new))
        _replace(output, new)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return True


def write_manifest(folder: Path, kind: Kind, manifest: dict) -> None:
    """Write the manifest, and the checksums of everything else in the folder."""
    sums = checksums(folder, kind)
    (folder / kind.manifest).write_text(json.dumps(manifest, separators=(",", ":")) + "\n")
    (folder / SUMS).write_text("".join(f"{line}\n" for line in sums))


def checksums(folder: Path, kind: Kind) -> list[str]:
    """`<sum>  <name>` of every file and folder in `folder`, sorted by name; skips hidden ones, manifest and sums."""
    names = sorted(path.name for path in folder.iterdir())
    names = [name for name in names if name not in (kind.manifest, SUMS) and not name.startswith(".")]
    return [f"{checksum(folder / name)}  {name}" for name in names]


def checksum(path: Path) -> str:
    """SHA-256 of a file, or of the names (relative to `path`) and bytes of all files below a folder, sorted by name.

    Ignores hidden files, which Jupyter and macOS add and the loaders ignore too.
    """
    digest = hashlib.sha256()
    if path.is_file():
        digest.update(path.read_bytes())
        return digest.hexdigest()
    files = [os.path.join(parent, name) for parent, _, names in os.walk(path) for name in names]
    for name, file_path in sorted((os.path.relpath(file, path).replace(os.sep, "/"), file) for file in files):
        if name.startswith(".") or "/." in name:
            continue
        with open(file_path, "rb", buffering=0) as file:  # pathlib is three times slower for 25,000 files
            content = file.read()
        digest.update(os.fsencode(name) + f"\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def _is_up_to_date(output: Path, kind: Kind, settings: dict) -> bool:
    try:
        if json.loads((output / kind.manifest).read_text())["settings"] != settings:
            return False
        lines = (output / SUMS).read_text().splitlines()
    except (OSError, ValueError, KeyError):
        return False
    return lines == checksums(output, kind)


def _check_output(output: Path, kind: Kind) -> None:
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(
            f"{output} is a file; --output needs a folder that does not exist yet, or an older {kind.name} folder."
        )
    if any(output.iterdir()) and not (output / kind.manifest).is_file():
        raise UserError(
            f"{output} is not empty and is not a {kind.name} folder (it has no {kind.manifest}), so it was left "
            "alone. Choose another folder with --output."
        )


def _remove_leftovers(output: Path) -> None:
    """Remove what killed runs left beside `output`, but not the folder of a run that is still alive."""
    for folder in output.parent.glob(f".{output.name}.partial-*"):
        pid = folder.name.rsplit("-", 1)[-1]
        try:
            os.kill(int(pid), 0)
        except (ProcessLookupError, ValueError):
            shutil.rmtree(folder, ignore_errors=True)
        except PermissionError:  # another user's live process
            pass


def _replace(output: Path, new: Path) -> None:
    """Move `new` to `output`, which is complete or absent at every moment."""
    if output.exists():
        old = new.with_name(new.name.replace(".partial-", ".partial-old-"))
        shutil.move(output, old)  # copies if a folder cannot be renamed, as in a container's lower layer
        shutil.move(new, output)
        shutil.rmtree(old)
    else:
        shutil.move(new, output)


def map_in_processes(function: Callable[[int], list], num_items: int, *, num_workers: int | None) -> Iterator[list]:
    """`function(0), function(1), ...`, in any order.

    `num_workers`: processes, by default one per core; 0 or 1: run in this process.
    """
    if num_workers is None:
        num_workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if num_workers <= 1:
        yield from map(function, range(num_items))
        return
    with multiprocessing.Pool(num_workers, _keep, (function,)) as pool:
        yield from pool.imap_unordered(_call, range(num_items), chunksize=8)


_function: Callable[[int], list]


def _keep(function: Callable[[int], list]) -> None:
    global _function  # runs in the worker: sent once, not with every item
    _function = function
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the main one ends the others


def _call(item: int) -> list:
    return _function(item)


def run_tool(parser: Parser, make: Callable[..., bool], argv: list[str] | None) -> int:
    """Call `make(output, ...)` with the options of `parser` as keywords; print the outcome, return the exit status."""

    def run(argv: list[str]) -> None:
        options = vars(parser.parse_args(argv))
        output = options.pop("output")
        del options["debug"]
        print(f"{output}: {'made' if make(output, **options) else 'up to date'}")

    return command(run)(argv)
