"""Peak memory and saved tensors; what training saves for the backward pass follows the number of tokens."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ats.benchmark.memory import peak_megabytes, saved_bytes
from ats.benchmark.synthetic_counts import synthetic_counts
from ats.config import get_cfg
from ats.models import build_model


def deit_tiny(ats: bool) -> nn.Module:
    """DeiT-Ti's transformer over images of 112 x 112 pixels in 196 patches, sampling in blocks 3 to 11."""
    cfg = get_cfg()
    cfg.merge_from_list([
        "VIT.EMBED_DIM", 192, "VIT.NUM_HEADS", 3, "VIT.IMG_SIZE", 112, "VIT.PATCH_SIZE", 8, "MODEL.NUM_CLASSES", 10,
        "ATS.ENABLE", ats,
    ])  # fmt: skip
    torch.manual_seed(0)
    return build_model(cfg).train()


def test_bytes_are_counted_once():
    """Two layers and a product save their inputs and the one weight they need, each storage once."""
    first, second = nn.Linear(4, 8, bias=False), nn.Linear(8, 2, bias=False)
    x = torch.randn(5, 4)

    def run():
        hidden = first(x)
        return second(hidden) * second(hidden)

    kept = 4 * (x.numel() + 5 * 8 + 2 * 5 * 2)
    assert saved_bytes(run, without=[first.weight, second.weight]) == kept
    assert saved_bytes(run) == kept + 4 * second.weight.numel()


def test_activations_follow_the_tokens():
    """With the paper's counts, activations / dense are at most tokens / dense (mean of the 12 blocks) + 0.1.

    A sampling block has the keys and values of its whole input; the rest belongs to what it keeps. Prints both ratios:
    `pytest tests/benchmark/test_memory.py -s`.
    """
    models = {"dense": deit_tiny(False), "ats": deit_tiny(True)}
    x = torch.randn(4, 3, 112, 112)
    with synthetic_counts(list(models.values())) as counts:
        counts.draw(x)
        kept = {name: saved_bytes(lambda m=m: m(x), without=m.parameters()) for name, m in models.items()}
        trace = models["ats"].forward_tokens(x)[1]
    tokens = [197.0] * 3 + [entry.num_tokens.double().mean().item() for entry in trace]
    token_ratio, byte_ratio = sum(tokens) / (12 * 197), kept["ats"] / kept["dense"]
    megabytes = f"{kept['ats'] / 1e6:.1f} of {kept['dense'] / 1e6:.1f} MB"
    print(f"\nactivations {byte_ratio:.3f} ({megabytes}), tokens {token_ratio:.3f}")
    assert 0.4 < token_ratio < 0.8
    assert byte_ratio <= token_ratio + 0.1


def test_peak_memory_counts_what_is_alive():
    """Weights, and two of the three activations of 1 MB: the first is freed before the third is made."""
    model = torch.nn.Sequential(*(torch.nn.Linear(1000, 1000, bias=False) for _ in range(3))).requires_grad_(False)
    x = torch.zeros(250, 1000)
    peak = peak_megabytes(lambda: model(x), model, torch.device("cpu"))
    assert peak == pytest.approx(3 * 4 + 2)
