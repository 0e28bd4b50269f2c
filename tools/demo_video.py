"""The video demo: a small XViT on moving handwritten digits - dense, with ATS not fine-tuned, and with ATS fine-tuned.

    make demo-video    # or: python tools/demo_video.py [--output DIR] [--data DIR]

Makes the moving Digits data set if it is not there, evaluates the weights in configs/Digits/weights on its videos, as
they are and with the frames of every clip shuffled, prints one table and writes output/demo_video/{table.md,
results.json, kept_tokens.png, kept_tokens.gif}. A class is a digit and the direction it moves in. Shuffled frames still
show the digit and the axis, so a network that uses time drops to half its accuracy or less, and one that ignores time
does not change. docs/DEMOS.md says how the weights were trained.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from demo import load_model, make_rows, row_config, run_demo, time_together  # beside this file

from ats.cli.make_moving_digits import CLASSES, make_moving_digits
from ats.config import CfgNode
from ats.files import write

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ats.datasets import Sample
    from ats.engine.evaluate import Result

ROWS = make_rows("XViT")


class Shuffled:
    """Batches of clips whose frames are shuffled, each clip in its own random order, the same in every run."""

    def __init__(self, batches: Sequence[Sample]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Sample]:
        for batch in self.batches:
            yield batch._replace(x=shuffle_frames(batch.x, batch.index))


def shuffle_frames(x: Tensor, index: Tensor) -> Tensor:
    """Clips [B, 3, T, H, W] with their frames in an order that depends on the clip's `index` [B] only."""
    import torch

    def order(seed: int) -> Tensor:
        return torch.randperm(x.shape[2], generator=torch.Generator().manual_seed(seed))

    return torch.stack([clip[:, order(seed)] for clip, seed in zip(x, index.tolist(), strict=True)])


def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    return run_demo(run, about=__doc__, data="moving_digits", output="demo_video", argv=argv)


def run(*, data: Path, output: Path) -> None:
    """Make the data, evaluate every row, write the table and the pictures."""
    import simplejson
    import torch

    from ats.datasets import build_loader

    made = make_moving_digits(data)
    print(f"moving Digits data set: {data}{'' if made else ' (already there)'}", file=sys.stderr)
    loader = build_loader(row_config(ROWS[0], data=data, output=output), "test")
    batches = list(loader)  # decoded once for all rows
    results, models = {}, {}
    for number, row in enumerate(ROWS, start=1):
        print(f"[{number}/{len(ROWS)}] {row.name}", file=sys.stderr)
        cfg = row_config(row, data=data, output=output)
        model, device = load_model(cfg)
        models[row.name] = model
        results[row.name] = evaluate_both(model, batches, device=device, cfg=cfg, dataset=loader.dataset)
    clips = torch.cat([batch.x for batch in batches])
    plain = {name: result for name, (result, _) in results.items()}
    time_together(plain, models, clips[:: -(-len(clips) // 16)].to(device))
    contents = {name: asdict(result) | {"shuffled": asdict(shuffled)} for name, (result, shuffled) in results.items()}
    write(output / "results.json", simplejson.dumps(contents, indent=2, ignore_nan=True) + "\n")
    write(output / "table.md", format_table(results, style="pipe") + "\n")
    pictures = draw_examples(row_config(ROWS[-2], data=data, output=output), batches, output)
    print(f"\n{format_table(results)}\n\nPictures of the tokens kept over time: {', '.join(map(str, pictures))}")
    print(f"Table and numbers: {output}")


def evaluate_both(
    model: nn.Module, batches: Sequence[Sample], *, device: torch.device, cfg: CfgNode, dataset: object
) -> tuple[Result, Result]:
    """The results on the videos as they are, and with their frames shuffled."""
    from ats.engine.evaluate import evaluate
    from ats.engine.tally import build_ensemble

    return tuple(
        evaluate(model, clips, device=device, ensemble=build_ensemble(cfg, dataset))
        for clips in (batches, Shuffled(batches))
    )


def format_table(results: dict[str, tuple[Result, Result]], *, style: str = "simple") -> str:
    """An aligned table with one line per named pair of results; `style` is one of tabulate's."""
    from tabulate import tabulate

    headers = ["model", "top-1 %", "shuffled", "GFLOPs", "paper", "dense", "clips/s", "tokens kept (block: mean)"]
    lines = []
    for name, (result, shuffled) in results.items():
        cost = [f"{result.video['gflops_per_video'][kind]:.4g}" for kind in ("mean", "paper_mean", "dense")]
        tokens = ", ".join(f"{block}: {mean:.1f}" for block, mean in result.tokens_per_block.items()) or "all"
        speed = f"{result.images_per_second:.1f}"
        lines.append([name, f"{result.top1:.2f}", f"{shuffled.top1:.2f}", *cost, speed, tokens])
    columns = ("left", *["right"] * 6, "left")
    return tabulate(lines, headers=headers, tablefmt=style, disable_numparse=True, colalign=columns)


def draw_examples(cfg: CfgNode, batches: Sequence[Sample], output: Path, *, num_clips: int = 6) -> list[Path]:
    """Draw clips, from the cheapest to the costliest, with the patches kept: all as an animation, three as a strip."""
    import torch

    from ats.datasets.build import mean_std
    from ats.flops import gflops
    from ats.visualize import animate, as_pictures, draw, draw_kept_tokens, look

    x, labels = (torch.cat(parts)[::3] for parts in zip(*((batch.x, batch.label) for batch in batches), strict=True))
    model = load_model(cfg)[0].cpu().eval()
    with torch.inference_mode():
        by_cost = gflops(model, model.forward_tokens(x)[1], x.shape).as_run.argsort()
    chosen = by_cost[torch.linspace(0, len(by_cost) - 1, num_clips).round().long()]
    logits, _, views = look(model, x[chosen])
    clips = as_pictures(x[chosen], *mean_std(cfg))
    names = [name.replace("_", ", ") for name in CLASSES]
    captions = [
        f"read as {names[guess]}" + ("" if guess == label else f"\nis {names[label]}")
        for guess, label in zip(logits.argmax(1).tolist(), labels[chosen].tolist(), strict=True)
    ]
    strip = [view.sample(slice(None, None, 2)) for view in (views[0], views[-1])]
    rows = [clips, *(draw(clips, view) for view in (views[0], views[len(views) // 2], views[-1]))]
    return [
        draw_kept_tokens(output / "kept_tokens.png", clips[::2], strip, captions=captions[::2]),
        animate(output / "kept_tokens.gif", torch.stack(rows)),
    ]


if __name__ == "__main__":
    sys.exit(main())
