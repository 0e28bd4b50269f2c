"""The demo on photographs: a small ViT on CIFAR-10 - dense, ATS that drops, ATS that merges, fine-tuned.

    python tools/prepare_cifar10.py --download     # once
    make demo-photos          # or: python tools/demo_photos.py [--output DIR] [--data DIR]

Evaluates the weights in configs/CIFAR10/weights on every third validation image, prints one table and writes
output/demo_photos/{table.md, results.json, kept_tokens.png}. configs/CIFAR10/weights/README.md says how these weights
were trained.
"""

from __future__ import annotations

import sys
from pathlib import Path

from demo import Row, evaluate_rows, run_demo, weights_of

from ats.cli.prepare_cifar10 import CLASSES
from ats.errors import UserError

CONFIG_OF = {"vit_dense": "ViT.yaml", "vit_ats": "ViT_ATS.yaml"}  # weights -> the file that says how to train them
STAGES = [{"SAMPLER": "merge_sample", "BLOCKS": list(range(12)), "RATIO": 0.87}]
ROWS = [
    Row("dense", "CIFAR10/ViT", "vit_dense"),
    Row("ATS, drop", "CIFAR10/ViT_ATS", "vit_dense", ("ATS.DROPPED", "drop")),
    Row("ATS, merge", "CIFAR10/ViT_ATS", "vit_dense"),
    Row(
        "merge, then ATS",
        "CIFAR10/ViT_ATS",
        "vit_dense",
        ("ATS.STAGES", STAGES, "ATS.NUM_TOKENS", 1.0, "ATS.DROPPED", "drop"),
    ),
    Row("ATS, merge, fine-tuned", "CIFAR10/ViT_ATS", "vit_ats"),
]


def main(argv: list[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    return run_demo(run, about=__doc__, data="cifar10", output="demo_photos", argv=argv)


def run(*, data: Path, output: Path) -> None:
    """Evaluate every row, write the table and the picture."""
    if not (data / "val").is_dir():
        raise UserError(
            f"{data} does not hold CIFAR-10: it needs val/<class>/*. Make it with: python tools/prepare_cifar10.py "
            f"--download (or --source YOUR_COPY) --output {data}"
        )
    for path in dict.fromkeys(map(weights_of, ROWS)):
        if not path.is_file():
            raise UserError(f"There is no {path}. The head of configs/CIFAR10/{CONFIG_OF[path.stem]} has the command.")
    evaluate_rows(ROWS, data=data, output=output, every=3, names=CLASSES)


if __name__ == "__main__":
    sys.exit(main())
