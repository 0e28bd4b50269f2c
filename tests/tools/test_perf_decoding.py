"""tools/perf/decoding.py compares the same work, and its command line says what is wrong."""

from __future__ import annotations

import decoding
import numpy as np
from clips import encode

from ats.config import get_cfg
from ats.datasets.decode import Video


def test_the_bare_loop_decodes_the_same_frames(tmp_path):
    """Pixel by pixel the loader's, at the start of the video, at its end, and if an index repeats."""
    path = str(encode(tmp_path / "v.mp4", 60))
    for index in ([0, 1, 2], [5, 9, 13], [40, 47, 59], [58, 59, 59]):
        with Video(path) as video:
            expected = video.read(index)
        assert np.array_equal(decoding.bare_decode(path, [(i - 0.5) / 30 for i in index]), expected)


def test_decoding_is_compared(tmp_path, capsys):
    """Videos in a folder, in a csv file, and videos that it writes itself."""
    decoding.write_videos(tmp_path, num_videos=2, num_frames=20)
    (tmp_path / "list.csv").write_text("0.mp4 0\n1.mp4 1\n")
    for source in (tmp_path, tmp_path / "list.csv"):
        row = decoding.benchmark_decoding(str(source), get_cfg(), rounds=2)
        assert (row["videos"], row["clips"]) == (2, 4)
        assert 0 < row["p10"] <= row["loader_over_bare"] <= row["p90"]
    assert decoding.main([str(tmp_path), "--rounds", "1", "DATA.NUM_FRAMES", "2"]) == 0
    assert "loader_over_bare" in capsys.readouterr().out


def test_mistakes(tmp_path, capsys):
    assert decoding.main([str(tmp_path)]) == 1
    assert "holds no videos (.avi, .mkv" in capsys.readouterr().err
    assert decoding.main([str(tmp_path), "--rounds", "0"]) == 1
    assert "--rounds: give a whole number from 1, not 0" in capsys.readouterr().err
