"""What a training run leaves behind, for comparison with another run."""

from __future__ import annotations

import json
from pathlib import Path

import torch

TIMINGS = ("images_per_second", "data_wait_share")


def read_log(output_dir: str | Path) -> list[dict]:
    """The lines of log.jsonl without their times."""
    lines = [json.loads(line) for line in (Path(output_dir) / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def assert_same(a: object, b: object) -> None:
    """Tensors and plain values, also nested in dicts and lists, are equal bit for bit."""
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_same(left, right)
    else:
        assert a == b
