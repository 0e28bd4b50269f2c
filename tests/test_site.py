"""`make docs`: the README and docs/ become a site in which every link leads somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("material", reason="mkdocs-material is not installed")

ROOT = Path(__file__).parents[1]


def test_the_site_builds_without_a_warning(tmp_path):
    """Strict: a page outside the navigation, a broken link or anchor would end it. Nothing is loaded from elsewhere."""
    words = [sys.executable, "-m", "mkdocs", "build", "-d", str(tmp_path / "site")]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    assert "not included in the" not in done.stderr
    pages = {path.stem for path in (tmp_path / "site").glob("*.html")} - {"404", "index"}
    assert pages == {path.stem for path in (ROOT / "docs").glob("*.md")}
    start = (tmp_path / "site" / "index.html").read_text()
    assert "ats.patch" in start
    assert 'src="images/kept_tokens.png"' in start
    assert not re.search(r'<(?:script|link rel="stylesheet")[^>]*https?:', start)
