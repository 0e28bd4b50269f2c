"""The commands. `tools/<name>.py` in a clone and `ats-<name>` after `pip install` are the `main` of the same module."""

from __future__ import annotations

import re
import sys
from pathlib import Path

# What `pip install` puts on the path -> the script of a clone that does the same.
COMMANDS = {
    "ats-run": "tools/run_net.py",
    "ats-benchmark": "tools/benchmark.py",
    "ats-visualize": "tools/visualize.py",
    "ats-calibrate": "tools/calibrate.py",
    "ats-export": "tools/export.py",
}


def as_typed(text: str) -> str:
    """A help text that speaks of `python tools/<name>.py`, in the words of who typed the console command `ats-...`."""
    if Path(sys.argv[0]).stem not in COMMANDS:
        return text
    for command, script in COMMANDS.items():
        text = re.sub(rf"(?:python )?{re.escape(script)}", command, text)
    return text
