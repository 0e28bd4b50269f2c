"""GFLOPs per sample, from the token counts a model recorded.

A multiply-add counts as one operation, as in the paper's tables (DeiT-S: 4.6). Two accountings, always both:

* as run: what this implementation computes (kept queries only in ATS blocks; with ATS.LAYOUT padded or static the
  padding too); equal to `torch.utils.flop_counter` at batch size 1;
* paper: what the official code computes and the paper's tables count (all queries and the full N x N logits in ATS
  blocks).

Each model has its formula in `multiply_adds`, built from the parts in `models/cost.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ats.tokens import KeptTokens


@dataclass
class Gflops:
    """GFLOPs of a batch of B samples.

    Attributes:
        as_run, paper: [B] float64, per sample, in the two accountings.
        dense: per sample with every token kept and no scoring.
    """

    as_run: Tensor
    paper: Tensor
    dense: float


def gflops(model: nn.Module, trace: list[KeptTokens], input_shape: tuple[int, ...]) -> Gflops:
    """GFLOPs of the batch whose forward pass left `trace`.

    Args:
        model: any model of `ats.models`.
        trace: second result of `model.forward_tokens(x)`.
        input_shape: `x.shape`.
    """
    return Gflops(
        as_run=model.multiply_adds(trace, input_shape, paper=False) / 1e9,
        paper=model.multiply_adds(trace, input_shape, paper=True) / 1e9,
        dense=dense_gflops(model, input_shape),
    )


def dense_gflops(model: nn.Module, input_shape: tuple[int, ...]) -> float:
    """GFLOPs of one sample with every token kept."""
    # Without a trace every block keeps all tokens, and the paper's accounting of such a block is dense.
    return model.multiply_adds([], (1, *input_shape[1:]), paper=True).item() / 1e9
