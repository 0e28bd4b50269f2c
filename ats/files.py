"""Files that are either the old ones or the whole new ones, whatever happens while they are written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(path: str | Path, *, sync: bool = True) -> Iterator[Path]:
    """A temporary path beside `path`, which takes its place when the block succeeds, and is removed when it fails.

    Args:
        sync: wait until the file and its name are on the disk, so that it outlives a crash of the machine; False for
            many small files that can be written again.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if sync:
            _sync(temporary, os.O_RDWR)  # some file systems notice only here that they are full
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync:
        _sync(path.parent, os.O_RDONLY)  # the rename itself


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
