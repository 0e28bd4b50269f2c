"""Choices made by timing, stored in the user's cache folder so that two runs of a command compute the same bits."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import torch


def remembered(question: Mapping[str, object], choose: Callable[[], list[str]]) -> list[str]:
    """The stored answer to `question` for this kind of CPU and this version of PyTorch; if there is none, `choose()`,
    which is then stored. To choose again, delete the folder.
    """
    about = _machine() | dict(question)
    name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    path = folder() / f"cpu_kernels_{name}.json"
    if (known := _read(path)) is not None:
        return known
    chosen = choose()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "x") as file:
            file.write(json.dumps(about | {"chosen": chosen}, indent=1))
    except FileExistsError:  # another process was faster
        return _read(path) or chosen
    except OSError:  # nowhere to write: each process chooses for itself
        pass
    return chosen


def folder() -> Path:
    """`ats` in XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ats"


def _read(path: Path) -> list[str] | None:
    try:
        chosen = json.loads(path.read_text())["chosen"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return chosen if isinstance(chosen, list) else None


@cache
def _machine() -> dict[str, str]:
    """The kind of CPU, as the system describes it, and the version of PyTorch."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text() if cpuinfo.is_file() else ""
    said = re.findall(r"^(?:model name|cpu family|model|stepping|flags)\s*: (.+)", lines.partition("\n\n")[0], re.M)
    names = said or [platform.processor(), platform.machine()]
    return {"cpu": ", ".join(names), "torch": torch.__version__}
