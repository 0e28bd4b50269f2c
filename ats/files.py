"""Atomic writes: afterwards the file is either the old one or the whole new one, even on limited file systems.

Network drives, FUSE mounts and FAT may be unable to link, lock, rename over a file or sync a folder. Each has a
fallback, with one warning if a guarantee is lost.
"""

from __future__ import annotations

import codecs
import errno
import io
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ats.errors import UserError, suggest

logger = logging.getLogger(__name__)

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FAILED = {errno.EIO, errno.ENOENT, errno.EROFS, errno.ESTALE} | NO_ROOM  # supported, but it failed on this disk

_warned: set[str] = set()


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Make an OSError in this block name `path`, even if a library wrapped it in its own exception."""
    outer = sys.exception()  # already being handled when the block starts
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and cause is not outer and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if not isinstance(cause, OSError) or cause is outer or not cause.errno:
            raise
        if cause is error and cause.filename and not str(cause.filename2 or cause.filename).endswith(".tmp"):
            raise  # already names a file
        raise OSError(cause.errno, os.strerror(cause.errno), str(path)) from error


@contextmanager
def atomic_write(path: str | Path, *, sync: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`; rename it to `path` if the block succeeds, delete it if the block fails.

    Args:
        sync: flush the file and its folder to disk, so that the file survives a crash of the machine. Use False for
            many small files that can be written again.

    Raises:
        OSError: the file cannot be written. It names `path`.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:50]}.{os.getpid()}.tmp")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            if sync:
                _sync(temporary, os.O_RDWR)  # some file systems report a full disk only here
            replace(temporary, path, sync=sync)
        finally:
            temporary.unlink(missing_ok=True)  # even after success: rename does nothing between two links to one file
        if sync:
            _sync(path.parent, os.O_RDONLY)  # makes the rename durable


def write(path: str | Path, content: str | bytes, *, sync: bool = True) -> None:
    """Write a whole file atomically; text as UTF-8."""
    content = content.encode("utf-8", "surrogateescape") if isinstance(content, str) else content
    with atomic_write(path, sync=sync) as temporary:
        temporary.write_bytes(content)


def encoding_of(path: str | Path) -> str:
    """The encoding of a text file written by a user: UTF-8, or UTF-16 (PowerShell, Excel's "Unicode text").

    Both codecs drop a byte order mark.
    """
    with open(path, "rb") as file:
        return "utf-16" if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"


def write_picture(path: str | Path, save: Callable[..., object], **options: object) -> None:
    """Write the output of `save(file, format=..., **options)`. Pillow alone would not say why a write failed."""
    buffer = io.BytesIO()
    save(buffer, format=Path(path).suffix.removeprefix(".") or "png", **options)
    write(path, buffer.getvalue(), sync=False)


def similar_folder(path: str | Path) -> str:
    """`" Did you mean custom?"`, with the folders beside `path` of nearly its name; "" if there are none."""
    path = Path(path)
    try:
        return suggest(path.name, sorted(entry.name for entry in path.parent.iterdir() if entry.is_dir()))
    except OSError:
        return ""


def link(path: Path, other: Path) -> None:
    """Hard-link `path` as `other`, or copy it if links are not possible."""
    with atomic_write(other) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)


def warn_once(text: str, path: Path, error: OSError) -> None:
    """Warn that `path` does not support something, once per text: `%s cannot be ... (%s).`"""
    if text not in _warned:
        _warned.add(text)
        logger.warning(text, path, error.strerror)


def replace(temporary: Path, path: Path, *, sync: bool = False) -> None:
    """Rename a file over another, or copy it if that is not possible."""
    try:
        os.replace(temporary, path)
    except OSError as error:
        if error.errno in FAILED or path.is_dir():
            raise
        shutil.copyfile(temporary, path)
        if sync:
            _sync(path, os.O_RDWR)
        warn_once("Files in %s cannot be renamed (%s): a crash can leave half a file.", path.parent, error)


def _sync(path: Path, flags: int) -> None:
    try:
        descriptor = os.open(path, flags)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno in FAILED:
            raise
        folder = path if path.is_dir() else path.parent
        warn_once("%s cannot be flushed to disk (%s): a power cut can lose the last files.", folder, error)
