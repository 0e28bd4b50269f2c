"""Lists data folders, in one place, so that all commands see the same classes and files.

Skips names that begin with a dot (`.ipynb_checkpoints`, `.DS_Store`, `._cat.png`), folders of operating systems
(SYSTEM), and anything that is neither a file nor a folder, such as a FIFO. Follows symbolic links, but lists each real
file once: a link to something already listed adds nothing.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import stat
import unicodedata
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cache
from itertools import chain

from ats.errors import UserError, counted, printable

logger = logging.getLogger(__name__)

# Added by zip files made on a Mac, network drives (@eaDir: thumbnails, as images), Windows and file systems.
SYSTEM = {"__MACOSX", "@eaDir", "@Recycle", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
SHOWN_KINDS = 5  # extensions that a warning names
LEFT_OUT = HIDDEN, REPEATED, SPECIAL = "hidden", "linked twice or in a loop", "neither file nor folder"


def class_folders(folder: str | os.PathLike) -> list[str]:
    """Names of the folders in `folder`, sorted as text: the i-th has label i.

    Raises a UserError if `folder` cannot be read, or contains a broken link: the labels may depend on it.
    """
    inside, names = os.path.join(os.path.realpath(folder), ""), []
    for entry in _entries(folder):
        if _is_hidden(entry.name):
            continue
        if entry.is_symlink():
            try:
                os.stat(entry.path)
            except OSError as error:
                if error.errno == errno.ELOOP:
                    continue
                raise UserError(
                    f"The link {printable(entry.path)} leads nowhere ({error.strerror}). Restore what it leads to or, "
                    "if it is not a class, remove it: labels follow the sorted names of the class folders."
                ) from error
            if inside.startswith(os.path.join(os.path.realpath(entry.path), "")):
                continue  # a loop
        if entry.is_dir():
            names.append(entry.name)
    return sorted(names)


@cache  # one warning, not one per split
def warn_about_numbers(root: str, classes: Sequence[str]) -> None:
    """Warn if the names are numbers whose numeric order differs from their text order. `root`: the folder of splits.

    A network trained elsewhere with labels in numeric order gets different labels here.
    """
    if all(re.fullmatch(r"[-+]?\d+(\.\d+)?", name) for name in classes) and sorted(classes, key=float) != list(classes):
        shown = ", ".join(f"{name} has label {label}" for label, name in enumerate(classes[:6]))
        logger.warning(
            "The class folders in %s are named by numbers, but labels follow the names as text: folder %s%s. If your "
            "checkpoint was trained with labels in numeric order, rename the folders so that both orders agree: 00, "
            "01, 02, ...",
            *(root, shown, ", ..." if len(classes) > 6 else ""),
        )


def files_below(root: str | os.PathLike, extensions: Sequence[str], *, noun: str) -> list[str]:
    """Paths, relative to `root`, of all files below it with one of the extensions, class by class: sorted by the folder
    in `root`, then by the file's own folder, then by name.

    One warning counts what was left out and calls the files `noun`s. A broken link is listed: an error on reading it is
    better than a silently smaller data set.

    Raises a UserError if a folder cannot be read.
    """
    skipped: Counter[str] = Counter()

    def wanted(path: str) -> bool:
        extension = os.path.splitext(path)[1].lower()
        skipped[extension or "without extension"] += extension not in extensions
        return extension in extensions

    inside = os.path.join(os.path.realpath(root), "")
    files, links, seen = [], deque([""]), set()  # seen: real paths
    while links:  # `root` itself first, so that a file gets the label of the folder it is in
        link = links.popleft()
        path = os.path.join(root, link)
        real = os.path.realpath(path)
        try:
            mode = os.stat(path).st_mode
        except OSError as error:
            if error.errno == errno.ELOOP:
                skipped[REPEATED] += 1
            elif wanted(link):
                files.append(link)
            continue
        if real in seen or (link and inside.startswith(os.path.join(real, ""))):
            skipped[REPEATED] += 1
        elif stat.S_ISREG(mode):
            if wanted(link):
                files.append(link)
                seen.add(real)
        elif stat.S_ISDIR(mode):
            below, folders, more = _walk(path, skipped)
            below = list(filter(wanted, below))
            new = [name for name in below if os.path.join(real, name) not in seen]
            skipped[REPEATED] += len(below) - len(new)
            files += [os.path.join(link, name) for name in new]
            links += [os.path.join(link, name) for name in sorted(more, key=lambda name: (name.count(os.sep), name))]
            if links:  # ImageNet has 1.3 million files, and usually no links
                seen.update([real, *(os.path.join(real, name) for name in [*new, *folders])])
        else:
            skipped[SPECIAL] += 1
    left_out = ", ".join(f"{number} {what}" for what in LEFT_OUT if (number := skipped.pop(what, 0)))
    kinds = [(printable(extension), number) for extension, number in skipped.most_common() if number]
    others = ", ".join(f"{number} {extension}" for extension, number in kinds[:SHOWN_KINDS])
    if rest := [number for _, number in kinds[SHOWN_KINDS:]]:
        others += f", and {counted(sum(rest), 'other')} of {counted(len(rest), 'kind')}"
    report = [f"skipped {others}: only {', '.join(extensions)} are read"] if others else []
    report += [f"left out {left_out}"] if left_out else []
    if report:
        found = f"{printable(os.fspath(root))}: {counted(len(files), noun)}"
        _warn(f"{found}; {'; '.join(report)}.")
    return sorted(files, key=lambda path: (path.split(os.sep, 1)[0], *os.path.split(path)))


@cache  # training also lists the data of its evaluations
def _warn(message: str) -> None:
    logger.warning("%s", message)


def same_in_nfc(name: str, others: Iterable[str]) -> bool:
    """Whether one of `others` looks like `name` without being equal: an accented e is one character or two."""
    form = unicodedata.normalize("NFC", name)
    return any(other != name and unicodedata.normalize("NFC", other) == form for other in others)


def advise_nfc(names: Iterable[str], others: Collection[str], *, folder: str, root: str) -> str:
    """What to type if `folder` lacks a class folder in `names` but has one whose name looks the same."""
    if not any(same_in_nfc(name, others) for name in names):
        return ""
    return (
        f" {folder} has the same name in other Unicode characters (macOS stores accents separately). To make the names "
        f"equal, type convmv -r -f utf8 -t utf8 --nfc --notest {root}"
    )


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in SYSTEM


def _walk(top: str | os.PathLike[str], skipped: Counter[str]) -> tuple[list[str], list[str], list[str]]:
    """The files, folders and links below `top`, relative to it. Does not follow links; counts what it skips."""
    files, folders, links = list[str](), list[str](), list[str]()
    for folder in chain([""], folders):  # `folders` grows while iterating
        for entry in _entries(os.path.join(top, folder)):
            path = os.path.join(folder, entry.name)
            if _is_hidden(entry.name):
                skipped[HIDDEN] += 1
            elif entry.is_symlink():
                links.append(path)
            elif entry.is_dir(follow_symlinks=False):
                folders.append(path)
            elif entry.is_file(follow_symlinks=False):
                files.append(path)
            else:
                skipped[SPECIAL] += 1
    return files, folders, links


def _entries(folder: str | os.PathLike[str]) -> Iterator[os.DirEntry]:
    try:
        with os.scandir(folder) as entries:
            yield from entries
    except OSError as error:
        raise UserError(f"Cannot read the folder {printable(os.fspath(folder))}: {error.strerror}.") from error
