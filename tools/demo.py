"""The demo: a small DeiT on real handwritten digits - dense, with ATS not fine-tuned, and with ATS fine-tuned.

    make demo          # or: python tools/demo.py [--output DIR] [--data DIR]

Makes the Digits data set if it is not there, evaluates the weights in configs/Digits/weights, prints one table and
writes output/demo/{table.md, results.json, kept_tokens.png}. docs/DEMOS.md says how the weights were trained.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = ROOT / "configs"
sys.path.insert(0, str(ROOT))

from ats.cli.make_digits import make_digits  # noqa: E402
from ats.cli.parser import command, command_parser, to_path  # noqa: E402
from ats.config import CfgNode, load_config  # noqa: E402
from ats.files import write  # noqa: E402

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ats.engine.evaluate import Result


class Row(NamedTuple):
    """A line of the table."""

    name: str
    config: str  # in configs, without .yaml: "Digits/DeiT"
    weights: str  # in the folder weights beside it, without .safetensors
    overrides: tuple = ()  # KEY, VALUE, ...


def make_rows(network: str) -> list[Row]:
    """Dense, then ATS untouched and ATS fine-tuned, each at three operating points. `network`: DeiT or XViT."""
    kinds = {"untouched": f"{network.lower()}_dense", "fine-tuned": f"{network.lower()}_ats"}
    rows = [Row("dense", f"Digits/{network}", kinds["untouched"])]
    for kind, weights in kinds.items():
        for first in (6, 5, 4):
            blocks = ("ATS.BLOCKS", list(range(first, 12)))
            rows.append(Row(f"ATS {kind}, blocks {first}-11", f"Digits/{network}_ATS", weights, blocks))
    return rows


ROWS = make_rows("DeiT")


def weights_of(row: Row) -> Path:
    """The file of a row's weights."""
    return (CONFIGS / row.config).parent / "weights" / f"{row.weights}.safetensors"


def row_config(row: Row, *, data: Path, output: Path) -> CfgNode:
    """The configuration of a row."""
    config = CONFIGS / f"{row.config}.yaml"
    places = [
        "TEST.CHECKPOINT_FILE_PATH",
        str(weights_of(row)),
        "DATA.PATH_TO_DATA_DIR",
        str(data),
        "OUTPUT_DIR",
        str(output),
    ]
    return load_config(config, [*row.overrides, *places])


def load_model(cfg: CfgNode) -> tuple[nn.Module, torch.device]:
    """The network and weights of a row's configuration, and the device that it is on."""
    from ats.checkpoint import load_weights
    from ats.engine.device import select_device
    from ats.models import build_model

    model = build_model(cfg)
    load_weights(model, cfg.TEST.CHECKPOINT_FILE_PATH)
    device = select_device(cfg.DEVICE)
    return model.to(device), device


def time_together(
    results: dict[str, Result], models: dict[str, nn.Module], x: torch.Tensor, *, rounds: int = 9
) -> None:
    """Replace each result's rate by one measured on `x`, as the median of rounds in which every network runs once.

    `evaluate` measures the rates minutes apart, and the speed of a shared machine changes in between.
    """
    import torch

    from ats.interleave import interleave

    advice = "other programs disturb it, and tools/benchmark.py says by how much"
    print(f"timing: all {len(models)} in turn, {rounds} times; {advice}", file=sys.stderr)
    with torch.inference_mode():
        runs = {name: partial(model.eval(), x) for name, model in models.items()}
        seconds, _ = interleave(runs, rounds=rounds)
    for name, result in results.items():
        result.images_per_second = len(x) / statistics.median(seconds[name])


def run_demo(run: Callable[..., None], *, about: str, data: str, output: str, argv: list[str] | None) -> int:
    """The command line of a demo; `data` and `output` name its default folders. Returns the exit status."""
    parser = command_parser(about)
    parser.option("--data", "the data set", type=to_path, default=ROOT / "data" / data)
    text = "where the table and pictures go"
    parser.option("--output", text, type=to_path, default=ROOT / "output" / output)

    def demo(argv: list[str]) -> None:
        args = parser.parse_args(argv)
        run(data=args.data, output=args.output)

    return command(demo)(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    return run_demo(run, about=__doc__, data="digits", output="demo", argv=argv)


def run(*, data: Path, output: Path) -> None:
    """Make the data, evaluate every row, write the table and the picture."""
    made = make_digits(data)
    print(f"Digits data set: {data}{'' if made else ' (already there)'}", file=sys.stderr)
    evaluate_rows(ROWS, data=data, output=output)


def evaluate_rows(rows: Sequence[Row], *, data: Path, output: Path, every: int = 1, names: Sequence[str] = ()) -> None:
    """Evaluate every row on images, write the table, and the picture of the last one.

    Args:
        every: use every n-th validation image. names: of the classes; by default their numbers.
    """
    import simplejson
    import torch

    from ats.datasets import build_loader
    from ats.datasets.loader import collate
    from ats.engine.evaluate import evaluate, format_table

    loader = build_loader(row_config(rows[0], data=data, output=output), "val")
    samples = [loader.dataset[index] for index in range(0, len(loader.dataset), every)]
    batches = [collate(samples[start : start + 64]) for start in range(0, len(samples), 64)]  # read once for all rows
    results, models = {}, {}
    for number, row in enumerate(rows, start=1):
        print(f"[{number}/{len(rows)}] {row.name}", file=sys.stderr)
        cfg = row_config(row, data=data, output=output)
        model, device = load_model(cfg)
        models[row.name] = model
        results[row.name] = evaluate(model, batches, device=device)
    some = samples[:: max(len(samples) // 64, 1)]
    time_together(results, models, torch.stack([sample.x for sample in some]).to(device))
    table = format_table(results)
    contents = {name: asdict(result) for name, result in results.items()}
    write(output / "results.json", simplejson.dumps(contents, indent=2) + "\n")
    write(output / "table.md", format_table(results, style="pipe") + "\n")
    picture = draw_examples(cfg, model, output / "kept_tokens.png", names=names)
    print(f"\n{table}\n\nPicture of the tokens kept by each block: {picture}\nTable and numbers: {output}")


def draw_examples(
    cfg: CfgNode, model: nn.Module, path: Path, *, num_images: int = 6, names: Sequence[str] = ()
) -> Path:
    """Draw validation images, from the cheapest to the costliest, with the patches that the network kept."""
    import torch

    from ats.datasets import build_loader
    from ats.flops import gflops
    from ats.visualize import as_pictures, draw_kept_tokens, look

    dataset = build_loader(cfg, "val").dataset
    samples = [dataset[index] for index in range(0, len(dataset), 37)]
    x = torch.stack([sample.x for sample in samples])
    model.cpu().eval()
    with torch.no_grad():
        by_cost = gflops(model, model.forward_tokens(x)[1], x.shape).as_run.argsort()
    chosen = by_cost[torch.linspace(0, len(by_cost) - 1, num_images).round().long()]
    logits, _, views = look(model, x[chosen])
    labels = [samples[i].label for i in chosen.tolist()]
    names = names or list(map(str, range(cfg.MODEL.NUM_CLASSES)))
    captions = [
        f"read as {names[guess]}" + ("" if guess == label else f"\nis {names[label]}")
        for guess, label in zip(logits.argmax(1).tolist(), labels, strict=True)
    ]
    pictures = as_pictures(x[chosen], cfg.DATA.MEAN, cfg.DATA.STD)
    return draw_kept_tokens(path, pictures, views, captions=captions)


if __name__ == "__main__":
    sys.exit(main())
