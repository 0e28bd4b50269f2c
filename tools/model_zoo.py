"""Write docs/MODEL_ZOO.md, the tables of all configs:

    python tools/model_zoo.py

The comment at the head of a config says what it reproduces (its first sentence) and which numbers to expect (from
"Expected" to "Not measured here" or "Measured here: ...", which ends it). The table shows the first clause of the first
sentence; the numbers are a list below it. Parameters and dense GFLOPs are computed from the network that it builds.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ats.config import CfgNode

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # runs from a clone that is not installed

TARGET = ROOT / "docs" / "MODEL_ZOO.md"
# Keys for training, testing or pruning, which do not change the dense network.
NOT_THE_NETWORK = ("ATS.", "TRAIN.", "SOLVER.", "TEST.", "MIXUP.", "AUG.", "EMA.", "OUTPUT_DIR", "LOG_PERIOD")
HEAD = """# Model zoo

Which configs are there, how large are their networks, and which accuracy should they reach? To run one:

    python tools/run_net.py --cfg configs/<folder>/<name>.yaml DATA.PATH_TO_DATA_DIR <dir> TEST.CHECKPOINT_FILE_PATH <w>

Every config begins with its own command, and with the one for training if it has one.

* **Parameters and GFLOPs** are those of the dense network, counted here: one multiply-add is one operation, as in the
  paper. For videos GFLOPs are per view x views.
* **What ATS saves** depends on images and weights. `tools/run_net.py` reports it, as run and in the paper's accounting
  (`result.json`).
* **Accuracies** are published ones with their source, unless they say "measured here". Nothing on ImageNet or Kinetics
  has been measured here: neither the data nor the weights are available to us.

`python tools/model_zoo.py` writes this page from the configs, and a test compares the two.
"""


class Header(NamedTuple):
    """The comment at the head of a config: what it is, which numbers to expect, and what was measured here."""

    title: str
    expected: str
    measured: str


def read_header(path: Path) -> Header:
    """The header of a config."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    title, _, rest = "\n".join(lines).partition("\n\n")
    rest = " ".join(rest.split())
    match = re.search(r"Expected(?P<what>[^:]*): (?P<numbers>.*?) *(Not measured here|Measured here|$)", rest)
    expected = f"{match['what'].strip()}: {match['numbers']}".removeprefix(": ") if match else ""
    measured = re.search(r"Measured here: (.*?)\.?$", rest)
    return Header(" ".join(title.split()).rstrip("."), expected.rstrip("."), measured[1] if measured else "no")


def network(cfg: CfgNode) -> str:
    """The settings that define the dense network and its input; configs that train or prune one network share them."""
    from ats.config.schema import flatten
    from ats.datasets import input_shape

    keys = {key: value for key, value in flatten(cfg) if not key.startswith(NOT_THE_NETWORK)}
    return json.dumps([keys, input_shape(cfg)], sort_keys=True, default=str)


def size(cfg: CfgNode) -> tuple[int, float]:
    """Parameters and dense GFLOPs of a config's network."""
    import torch

    from ats.datasets import input_shape
    from ats.flops import dense_gflops
    from ats.models import build_model

    with torch.device("meta"):
        model = build_model(cfg)
    return sum(p.numel() for p in model.parameters()), dense_gflops(model, (1, *input_shape(cfg)))


def row(path: Path, sizes: dict[str, tuple[int, float]]) -> dict[str, str]:
    """A line of the table: what the config is, and the size of its network, which `sizes` caches."""
    from ats.config import load_config
    from ats.datasets import input_shape
    from ats.errors import rounded

    cfg, header = load_config(path), read_header(path)
    key = network(cfg)
    if key not in sizes:
        sizes[key] = size(cfg)
    num_parameters, gflops = sizes[key]
    shape = input_shape(cfg)
    views = f" x {cfg.TEST.NUM_ENSEMBLE_VIEWS * cfg.TEST.NUM_SPATIAL_CROPS}" if len(shape) == 4 else ""
    return {
        "config": f"[{path.stem}](../{path.relative_to(ROOT)})",
        "what": re.split(r": |; |\. ", header.title)[0],
        "parameters": f"{num_parameters / 1e6:.2f} M",
        "GFLOPs": f"{rounded(gflops)}{views}",
    }


def numbers(paths: list[Path]) -> str:
    """The list of the numbers to expect and of those measured here; configs with the same numbers share a line."""
    names: dict[str, list[str]] = {}
    for path in paths:
        header = read_header(path)
        measured = "" if header.measured == "no" else f"measured here: {header.measured}"
        text = ". ".join(part for part in (header.expected, measured) if part)
        names.setdefault(text, []).append(path.stem)
    return "".join(f"* {', '.join(f'`{name}`' for name in own)}: {text}.\n" for text, own in names.items())


def render() -> str:
    """The text of docs/MODEL_ZOO.md: each folder of configs but Custom, whose classes are yours."""
    text, sizes = HEAD, {}
    for folder in sorted(path for path in (ROOT / "configs").iterdir() if path.is_dir() and path.name != "Custom"):
        paths = sorted(folder.glob("[!_]*.yaml"))
        rows = [row(path, sizes) for path in paths]
        cells = [list(rows[0]), ["---"] * len(rows[0]), *(list(line.values()) for line in rows)]
        text += f"\n## {folder.name}\n\n" + "".join(f"| {' | '.join(line)} |\n" for line in cells)
        text += f"\n### {folder.name}: numbers to expect\n\n{numbers(paths)}"
    return text


if __name__ == "__main__":
    TARGET.write_text(render())
    print(TARGET)
