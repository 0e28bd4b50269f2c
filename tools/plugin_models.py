"""Write the lists of models in docs/PLUGIN.md: which of timm's models `ats.patch` accepts, and why it refuses others.

    python tools/plugin_models.py

Builds every model of timm whose class ATS knows, small. Run it after an upgrade of timm; a test checks the lists for
the version they were made with.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import timm
import torch
from timm.models import model_entrypoint
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from a clone that is not installed

from ats.plugin.timm.model import REASONS, VERSIONS, refusal

TARGET = Path(__file__).resolve().parents[1] / "docs" / "PLUGIN.md"
START = "<!-- python tools/plugin_models.py writes what follows -->\n"
END = "<!-- written until here -->\n"


def candidates() -> list[str]:
    """Names of all timm models whose module knows a class that is accepted; no other can build one."""

    def knows_one(module: str) -> bool:
        return any(value in VERSIONS for value in vars(sys.modules[module]).values() if isinstance(value, type))

    return [name for name in timm.list_models() if knows_one(model_entrypoint(name).__module__)]


def small_settings(name: str) -> dict[str, object]:
    """Arguments that make the model small: 4 blocks, width 48, 4 x 4 patches."""
    size = re.search(r"patch(\d+)", name)
    stride = int(size[1]) if size else 16 if name.startswith("vitamin") else 32
    settings = {"img_size": 4 * stride, "depth": 4}
    if not name.startswith(("vitamin", "vit_base_mci")):  # their stem has the width of their blocks
        settings |= {"embed_dim": 48, "num_heads": 3}
    if "sapiens2" in name:  # fewer key than query heads in some blocks
        settings["num_kv_heads"] = (None, 1, 3, 1)
    return settings


def models() -> Iterator[tuple[str, nn.Module, str]]:
    """Name, small model and reason for refusal ("" if accepted) of all candidates, without drawing weights."""
    for name in candidates():
        with patch.multiple(torch.Tensor, **dict.fromkeys(
            ("uniform_", "normal_", "erfinv_", "clamp_", "mul_", "add_", "zero_", "fill_"),
            lambda tensor, *args, **kwargs: tensor,
        )):  # fmt: skip
            model = timm.create_model(name, **small_settings(name))
        yield name, model, refusal(model)


def render(found: list[tuple[str, str, str]]) -> str:
    """The lists, from (name, class, reason) of every candidate."""
    accepted, refused = defaultdict(list), defaultdict(list)
    for name, kind, reason in found:
        (refused[reason.split(";")[0]] if reason else accepted[kind]).append(f"`{name}`")
    lines = [f"The lists are for timm {timm.__version__}.\n"]
    lines += [f"**{kind}** ({len(names)}): {', '.join(names)}.\n" for kind, names in sorted(accepted.items())]
    lines += [f"Refused, {reason} ({len(names)}): {', '.join(names)}.\n" for reason, names in sorted(refused.items())]
    rows = [f"| {name} | {reason} |\n" for name, reason in REASONS.items()]
    return "\n".join(lines) + "\nRelated classes that are refused:\n\n| class | why |\n|---|---|\n" + "".join(rows)


def split(text: str) -> tuple[str, str, str]:
    """docs/PLUGIN.md before, within and after the lists."""
    before, _, rest = text.partition(START)
    lists, _, after = rest.partition(END)
    return before + START, lists, END + after


if __name__ == "__main__":
    before, _, after = split(TARGET.read_text())
    TARGET.write_text(
        before + render([(name, type(model).__name__, reason) for name, model, reason in models()]) + after
    )
    print(TARGET)
