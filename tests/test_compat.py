"""Private names of PyTorch, timm and transformers are imported in one place."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from ats import compat

ROOT = Path(__file__).parents[1]
LIBRARIES = ("torch", "torchvision", "timm", "transformers")


def private_names(source: str) -> list[str]:
    """Dotted names of `LIBRARIES` with a part that begins with one underscore."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names.append(ast.unparse(node))
    return [name for name in names if name.split(".")[0] in LIBRARIES and re.search(r"\._(?!_)", name)]


def test_private_names_are_imported_in_compat_alone():
    paths = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("ats/**/*.py")}
    found = {path: private_names((ROOT / path).read_text()) for path in paths - {"ats/compat.py"}}
    assert not {path: names for path, names in found.items() if names}


def test_private_names_are_recognised():
    assert private_names("from torch._C import x\nimport torch._dynamo\ntorch._dynamo.reset()\ntorch.__version__") == [
        "torch._C.x",
        "torch._dynamo",
        "torch._dynamo.reset",
        "torch._dynamo",
    ]
    assert all(hasattr(compat, name) for name in compat.__all__)
