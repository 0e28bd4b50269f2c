"""The code blocks of README.md and docs/*.md."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
NOT_RUN = re.compile(r"(?:#!.*\n)?# not run by the tests: (.*)")  # where a block begins
PLACEHOLDER = r"<[a-z][a-z_.]*>"


class Block(NamedTuple):
    """A fenced block of a document; `place` is where it begins, as file:line."""

    place: str
    language: str
    code: str

    @property
    def is_run(self) -> bool:
        """Whether this test runs it."""
        if self.language == "bash" and re.search(PLACEHOLDER, self.code):
            return False
        return not NOT_RUN.match(self.code) and not self.has_only_make

    @property
    def has_only_make(self) -> bool:
        """Whether all its commands are make targets."""
        return all(line.startswith(("make ", "#")) for line in self.code.splitlines() if line.strip())

    def commands(self) -> list[str]:
        """Lines of a shell, joined where they go on, without comments."""
        lines = self.code.replace("\\\n", " ").splitlines()
        return [line.split("  #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


def blocks_of(path: str) -> list[Block]:
    """The fenced blocks of a document."""
    text = (ROOT / path).read_text()
    return [
        Block(f"{path}:{text[: match.start()].count(chr(10)) + 1}", match[1], match[2])
        for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    ]
