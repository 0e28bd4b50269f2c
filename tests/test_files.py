"""Writes leave the old file or the whole new one, on file systems that lack operations too; errors name the file."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from ats import files
from ats.checkpoint import save_checkpoint, save_safetensors
from ats.engine import output
from ats.errors import UserError
from ats.files import atomic_write, link, naming, write, write_picture

CANNOT = [errno.EPERM, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EMLINK, errno.EACCES]


@pytest.fixture(autouse=True)
def _no_warnings_yet(monkeypatch):
    monkeypatch.setattr(files, "_warned", set())


def failing(number: int, where: Callable[..., bool] = lambda *_: True, real: Callable | None = None) -> Callable:
    """A system call that fails with this error number, `where` says so."""

    def call(*args, **kwargs):
        if where(*args):
            raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    return call


@pytest.mark.parametrize("sync", [True, False])
def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path, sync):
    path = tmp_path / "sub" / "result.json"
    for text in ("old", "new"):
        with atomic_write(path, sync=sync) as temporary:
            temporary.write_text(text)
            assert not path.exists() or path.read_text() == "old"
    assert path.read_text() == "new"
    with pytest.raises(IsADirectoryError), atomic_write(path, sync=sync) as temporary:  # noqa: PT012
        temporary.write_text("half")
        tmp_path.write_text("not a file")
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("number", CANNOT)
def test_where_links_are_not_possible_the_file_is_copied(number, tmp_path, monkeypatch):
    for text in ("first", "second"):
        (tmp_path / "a").write_text(text)
        link(tmp_path / "a", tmp_path / "b")
        link(tmp_path / "a", tmp_path / "b")  # already the same file, which a rename would leave under both names
        assert (tmp_path / "b").read_text() == text
        monkeypatch.setattr(os, "link", failing(number))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("number", CANNOT)
def test_where_folders_cannot_be_synced_one_warning_says_so(number, tmp_path, monkeypatch, caplog):
    is_folder = lambda descriptor: stat.S_ISDIR(os.fstat(descriptor).st_mode)  # noqa: E731
    monkeypatch.setattr(os, "fsync", failing(number, is_folder, os.fsync))
    for name in ("a", "b", "sub/c"):
        write(tmp_path / name, name)
        assert (tmp_path / name).read_text() == name
    assert caplog.text.count("cannot be flushed to disk") == 1


@pytest.mark.parametrize("number", CANNOT)
def test_where_files_cannot_be_renamed_they_are_copied(number, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(os, "replace", failing(number))
    for text in ("old", "new"):
        write(tmp_path / "a", text)
        assert (tmp_path / "a").read_text() == text
    assert list(tmp_path.iterdir()) == [tmp_path / "a"]
    assert caplog.text.count("cannot be renamed") == 1


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_where_locks_are_not_possible_one_warning_says_so(number, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(output, "_locks", {})
    monkeypatch.setattr(output.fcntl, "lockf", failing(number))
    for _ in range(2):
        output._lock(tmp_path)
    assert caplog.text.count(f"{tmp_path} cannot be locked") == 1


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])  # POSIX allows both
def test_a_lock_of_another_run_is_respected(number, tmp_path, monkeypatch):
    (tmp_path / ".lock").write_text("process 7 on elsewhere\n")
    monkeypatch.setattr(output.fcntl, "lockf", failing(number))
    with pytest.raises(UserError, match=r"in use by another run \(process 7 on elsewhere\)"):
        output._lock(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_a_full_or_broken_disk_is_an_error_not_a_warning(number, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", failing(number))
    with pytest.raises(OSError, match=f"{os.strerror(number)}: '{tmp_path}/a'"):
        write(tmp_path / "a", "x")
    assert not list(tmp_path.iterdir())


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Writing more than `size` bytes to a file fails, as on a disk that is full."""
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def draw(path: Path) -> None:
    from matplotlib.figure import Figure

    write_picture(path, Figure((1, 1)).savefig, dpi=30)


WEIGHTS = {str(index): torch.ones(20, index) for index in range(5)}
WRITERS = {
    "a.pyth": lambda path: save_checkpoint(path, {"model_state": WEIGHTS, "epoch": 1}),
    "a.safetensors": lambda path: save_safetensors(path, WEIGHTS),
    "a.json": lambda path: write(path, "x" * 9000),
    "a.png": draw,
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_is_full_at_any_byte_leaves_the_old_file_and_an_error_that_names_it(name, tmp_path):
    """PyTorch's writer, safetensors and Pillow have errors of their own for that, without the file's name."""
    path = tmp_path / name
    WRITERS[name](path)
    old = path.read_bytes()
    for size in range(0, len(old), max(len(old) // (12 if name == "a.png" else 60), 1)):
        with largest_file(size), pytest.raises(OSError, match=str(path)):
            WRITERS[name](path)
        assert path.read_bytes() == old
        assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_ends_the_log_file_with_one_warning(tmp_path, capsys):
    output.setup_logging()
    output.log_to_file(tmp_path / "log.txt")
    with largest_file(100):
        for number in range(10):
            output.ROOT.info("message %d", number)
    shown = capsys.readouterr().err
    assert shown.count("log.txt ends here: File too large.") == 1
    assert "Traceback" not in shown
    assert "message 9" in shown


@pytest.mark.parametrize("mask", [0o022, 0o002, 0o077])
def test_files_have_the_mode_that_the_umask_leaves(mask, tmp_path):
    before = os.umask(mask)
    try:
        for name, save in WRITERS.items():
            save(tmp_path / name)
            assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o666 & ~mask
    finally:
        os.umask(before)


def test_naming_leaves_errors_alone_that_are_of_something_else(tmp_path):
    def fail(error: Exception) -> None:
        with naming(tmp_path):
            raise error

    for error in (ValueError("a"), UserError("b"), FileNotFoundError(2, "c", "other"), OSError("d")):
        with pytest.raises(type(error)) as caught:
            fail(error)
        assert caught.value is error
    try:
        raise OSError(errno.EIO, "before")
    except OSError:
        with pytest.raises(ValueError):
            fail(ValueError("a"))
