"""The demo: a small DeiT on real handwritten digits, dense, with ATS untouched, and with ATS fine-tuned.

    make demo          # or: python tools/demo.py [--output DIR] [--data DIR]

Makes the Digits data set if it is not there, evaluates the weights in configs/Digits/weights, prints one table and
writes output/demo/{table.md, results.json, kept_tokens.png}. How the weights were trained is in README.md.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from make_digits import make_digits  # noqa: E402 - beside this file

from ats.config import CfgNode, load_config  # noqa: E402
from ats.errors import UserError  # noqa: E402

if TYPE_CHECKING:
    from torch import nn


class Row(NamedTuple):
    """A line of the table: its name, its weights in configs/Digits/weights, where ATS begins (None: dense)."""

    name: str
    weights: str
    first_block: int | None


ROWS = [
    Row("dense", "deit_dense", None),
    Row("ATS untouched, blocks 6-11", "deit_dense", 6),
    Row("ATS untouched, blocks 5-11", "deit_dense", 5),
    Row("ATS untouched, blocks 3-11", "deit_dense", 3),
    Row("ATS fine-tuned, blocks 6-11", "deit_ats", 6),
    Row("ATS fine-tuned, blocks 5-11", "deit_ats", 5),
    Row("ATS fine-tuned, blocks 3-11", "deit_ats", 3),
]


def row_config(row: Row, *, data: Path, output: Path) -> CfgNode:
    """The configuration of a row."""
    name = "DeiT" if row.first_block is None else "DeiT_ATS"
    overrides = [] if row.first_block is None else ["ATS.BLOCKS", list(range(row.first_block, 12))]
    weights = ROOT / "configs" / "Digits" / "weights" / f"{row.weights}.safetensors"
    overrides += ["TEST.CHECKPOINT_FILE_PATH", str(weights), "DATA.PATH_TO_DATA_DIR", str(data)]
    return load_config(ROOT / "configs" / "Digits" / f"{name}.yaml", [*overrides, "OUTPUT_DIR", str(output)])


def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "data" / "digits", help="the Digits data set")
    parser.add_argument("--output", type=Path, default=ROOT / "output" / "demo", help="where table and picture go")
    args = parser.parse_args(argv)
    try:
        run(data=args.data, output=args.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(*, data: Path, output: Path) -> None:
    """Make the data, evaluate every row, write table and picture."""
    import simplejson

    from ats.checkpoint import load_weights
    from ats.datasets import build_loader
    from ats.engine.device import select_device
    from ats.engine.evaluate import evaluate, format_table
    from ats.models import build_model

    made = make_digits(data)
    print(f"Digits data set: {data}{'' if made else ' (already there)'}", file=sys.stderr)
    results = {}
    for number, row in enumerate(ROWS, start=1):
        print(f"[{number}/{len(ROWS)}] {row.name}", file=sys.stderr)
        cfg = row_config(row, data=data, output=output)
        model = build_model(cfg)
        load_weights(model, cfg.TEST.CHECKPOINT_FILE_PATH)
        device = select_device(cfg.DEVICE)
        results[row.name] = evaluate(model.to(device), build_loader(cfg, "val"), device=device)
    output.mkdir(parents=True, exist_ok=True)
    table = format_table(results)
    (output / "results.json").write_text(
        simplejson.dumps({name: asdict(result) for name, result in results.items()}, indent=2) + "\n"
    )
    (output / "table.md").write_text(format_table(results, style="pipe") + "\n")
    picture = draw_examples(cfg, model, output / "kept_tokens.png")
    print(f"\n{table}\n\nPicture of the tokens that survive each block: {picture}\nTable and numbers: {output}")


def draw_examples(cfg: CfgNode, model: nn.Module, path: Path, *, num_images: int = 6) -> Path:
    """Images of the validation set from the cheapest to the costliest, with what the network kept of them."""
    import torch

    from ats.datasets import build_loader
    from ats.flops import gflops
    from ats.visualize import draw_kept_tokens

    dataset = build_loader(cfg, "val").dataset
    samples = [dataset[index] for index in range(0, len(dataset), 37)]
    x = torch.stack([sample.x for sample in samples])
    model.cpu().eval()
    with torch.no_grad():
        _, trace = model.forward_tokens(x)
        by_cost = gflops(model, trace, x.shape).as_run.argsort()
        chosen = by_cost[torch.linspace(0, len(by_cost) - 1, num_images).round().long()]
        logits, trace = model.forward_tokens(x[chosen])
    mean, std = (torch.tensor(values)[:, None, None] for values in (cfg.DATA.MEAN, cfg.DATA.STD))
    labels = [samples[i].label for i in chosen.tolist()]
    captions = [
        f"read as {guess}" + ("" if guess == label else f", is {label}")
        for guess, label in zip(logits.argmax(1).tolist(), labels, strict=True)
    ]
    return draw_kept_tokens(path, x[chosen] * std + mean, trace, model.grid_size, captions=captions)


if __name__ == "__main__":
    sys.exit(main())
