"""Atomic writes leave the old file or the whole new one."""

from __future__ import annotations

import pytest

from ats.files import atomic_write


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
