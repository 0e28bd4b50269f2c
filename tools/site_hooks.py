"""Hooks of mkdocs.yml: README.md becomes the first page, and links to files outside docs/ are replaced.

With ATS_REPOSITORY=https://github.com/<owner>/<name> they lead there; without it, they become the file's name.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the README, with its links as seen from docs/."""
    text = (ROOT / "README.md").read_text()
    text = re.sub(r"\]\((?!https?:|#|docs/)", "](../", text).replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_markdown(markdown: str, **_: object) -> str:
    """Replace links to files outside docs/."""
    return re.sub(r"\[([^\]]*)\]\(\.\./([^)]+)\)", _outside, markdown)


def _outside(match: re.Match) -> str:
    label, path = match.groups()
    repository = os.environ.get("ATS_REPOSITORY", "").rstrip("/")
    return f"[{label}]({repository}/blob/main/{path})" if repository else f"{label} (`{path}`)"
