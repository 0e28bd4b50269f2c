"""Files are the old ones or the whole new ones."""

from __future__ import annotations

import pytest

from ats.files import atomic_write


@pytest.mark.parametrize("sync", [True, False])
def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path, sync):
    path = tmp_path / "sub" / "result.json"
    for text in ("old", "new"):
        with atomic_write(path, sync=sync) as temporary:
            temporary.write_text(text)
            assert not path.exists() or path.read_text() == "old"
    assert path.read_text() == "new"
    with pytest.raises(IsADirectoryError), atomic_write(path, sync=sync) as temporary:
        (temporary.write_text("ha"), tmp_path.write_text("not a file"))
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]
