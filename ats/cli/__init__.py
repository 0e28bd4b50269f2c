"""The commands. `python tools/<name>.py` in a clone and `ats-<name>` after `pip install` run the same `main`."""

from __future__ import annotations

import re
import sys
from importlib.util import find_spec
from pathlib import Path

NEEDED = ("torch", "torchvision", "timm", "fvcore", "yaml", "numpy")
if missing := [name for name in NEEDED if find_spec(name) is None]:
    sys.exit(
        f"error: {sys.executable} has no {', '.join(missing)}. Type source .venv/bin/activate if make has made one, "
        "else pip install -r requirements.txt."
    )

# Console command of `pip install` -> the same command in a clone.
COMMANDS = {
    "ats-run": "tools/run_net.py",
    "ats-benchmark": "tools/benchmark.py",
    "ats-visualize": "tools/visualize.py",
    "ats-calibrate": "tools/calibrate.py",
    "ats-export": "tools/export.py",
    "ats-make-digits": "tools/make_digits.py",
    "ats-make-moving-digits": "tools/make_moving_digits.py",
    "ats-prepare-cifar10": "tools/prepare_cifar10.py",
    "ats-prepare-imagenet": "tools/prepare_imagenet.py",
    "ats-prepare-kinetics": "tools/prepare_kinetics.py",
}


def as_typed(text: str) -> str:
    """`text` with `python tools/<name>.py` replaced by `ats-<name>`, if the user typed a console command."""
    if Path(sys.argv[0]).stem not in COMMANDS:
        return text
    for command, script in COMMANDS.items():
        text = re.sub(rf"(?:python )?{re.escape(script)}", command, text)
    return text
