"""Time the kernels that ATS.CPU_BACKEND auto chooses from: each linear layer of a network's block, and attention.

    python tools/perf/cpu_kernels.py --cfg configs/ImageNet/DeiT_S.yaml [--rounds N] [KEY VALUE ...]

GFLOP/s (two operations per multiply-add) for one image and for eight, medians over rounds in which every kernel runs
once. "+ GELU" is a layer with its activation: two calls in PyTorch, one in oneDNN.
"""

from __future__ import annotations

import statistics
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from fvcore.common.config import CfgNode
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from a clone that is not installed

from command import make_parser, run_tool  # beside this file

from ats.datasets import input_shape
from ats.errors import counted
from ats.interleave import interleave
from ats.kernels import cpu
from ats.models import build_model
from ats.models.cost import size


def speeds(runs: dict[str, Callable[[], object]], operations: float, rounds: int) -> dict[str, float]:
    """GFLOP/s of each kernel."""
    seconds, _ = interleave(runs, rounds=rounds)
    return {name: operations / statistics.median(own) / 1e9 for name, own in seconds.items()}


def layer_rows(name: str, layer: nn.Linear, num_tokens: int, rounds: int) -> Iterator[dict]:
    """One linear layer; the first of an MLP also with its activation."""
    x, weight, bias = torch.randn(num_tokens, layer.in_features), layer.weight, layer.bias
    operations = 2 * num_tokens * weight.numel()
    runs = {"torch": lambda: F.linear(x, weight, bias), "onednn": lambda: cpu.linear_(x, weight, bias)}
    yield {"what": name} | speeds(runs, operations, rounds)
    if name.endswith("fc1"):
        runs = {"torch": lambda: F.gelu(F.linear(x, weight, bias)), "onednn": lambda: cpu.linear_gelu(x, weight, bias)}
        yield {"what": f"{name} + GELU"} | speeds(runs, operations, rounds)


def attention_row(images: int, num_tokens: int, num_heads: int, width: int, rounds: int) -> dict:
    """Attention of every token to every token of its image."""
    q = torch.randn(images, num_tokens, num_heads, width // num_heads).transpose(1, 2)
    scale = q.shape[-1] ** -0.5
    runs = {name: partial(attend, q, q, q, scale) for name, attend in cpu.ATTENTION.items()}
    found = speeds(runs, 4 * q.numel() * num_tokens, rounds)
    return {"what": "attention", "torch": found.pop("fused")} | found


@torch.inference_mode()
def measure(args: Namespace, cfg: CfgNode) -> list[dict]:
    """A row for every layer and for attention; then what auto chooses."""
    model, shape = build_model(cfg).eval(), input_shape(cfg)
    block = model.block_list()[0]
    num_tokens = model.prefix_of(0) + size(model.block_grids((1, *shape))[0].queries)
    rows = []
    for images in (1, 8):
        found = []
        for name, layer in block.named_modules():
            if type(layer) is nn.Linear:
                found += layer_rows(name, layer, images * num_tokens, args.rounds)
        if num_heads := getattr(getattr(block, "attn", None), "num_heads", 0):
            found.append(attention_row(images, num_tokens, num_heads, block.attn.proj.in_features, args.rounds))
        rows += [{"what": row.pop("what"), "images": images} | row for row in found]
    model(torch.randn(1, *shape))
    for threads, width, _, linear, attention in cpu.choices():
        text = f"auto: linear {linear}, attention {attention} ({counted(threads, 'thread')}, width {width})"
        rows.append({"what": text})
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_tool(make_parser(__doc__), measure, argv)


if __name__ == "__main__":
    sys.exit(main())
