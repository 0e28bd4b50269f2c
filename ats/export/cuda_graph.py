"""A network as one CUDA graph: for small batches, where launching kernels one by one takes longer than running them.

    model = build_model(cfg).cuda().eval()      # cfg.ATS.LAYOUT static: no shape depends on the image
    fast = capture(model, torch.randn(1, 3, 224, 224, device="cuda"))
    logits = fast(x)                            # x of the same shape

A graph replays the same kernels on the same memory, so it takes one batch size; capture one per size that is needed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ats.errors import UserError
from ats.models.block import ats_blocks

NUM_WARMUP = 3  # passes before capture, in which kernels are chosen and built


def capture(model: nn.Module, example: Tensor, *, dtype: torch.dtype | None = None) -> Callable[[Tensor], Tensor]:
    """`model` in evaluation mode as one CUDA graph, for inputs of the shape of `example`.

    Args:
        model: on the GPU, in evaluation mode; dense, or with ATS.LAYOUT static. Changing its weights in place later has
            an effect; replacing a parameter does not.
        example: [B, 3, H, W] (or a clip) on the same GPU.
        dtype: of autocast; None: the weights' own precision.

    Returns:
        A function from x, of the shape, type and device of `example`, to new logits. It raises a ValueError for any
        other x.

    Raises:
        UserError: there is no GPU, the model is training, or a graph cannot hold its forward pass.
    """
    if reason := obstacle(model, example):
        raise UserError(f"This network cannot be captured as a CUDA graph: {reason}")
    x = example.detach().clone()

    def forward() -> Tensor:
        # Autocast's cache would pass tensors on from one pass to the next, outside the graph that makes them.
        with torch.no_grad(), torch.autocast("cuda", dtype, enabled=dtype is not None, cache_enabled=False):
            return model(x)

    stream = torch.cuda.Stream(x.device)
    stream.wait_stream(torch.cuda.current_stream(x.device))
    with torch.cuda.stream(stream):
        for _ in range(NUM_WARMUP):
            forward()
    torch.cuda.current_stream(x.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        # This thread only: a loader's thread may pin memory meanwhile.
        with torch.cuda.device(x.device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
            logits = forward()
    except RuntimeError as error:
        raise UserError(
            "This network cannot be captured as a CUDA graph: its forward pass does something a graph cannot hold, "
            f"like timm's DINOv3, which makes tensors on the CPU ({error})."
        ) from error

    def replay(new: Tensor) -> Tensor:
        if (new.shape, new.dtype, new.device) != (x.shape, x.dtype, x.device):
            want, got = (f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in (x, new))
            raise ValueError(f"captured for {want}, got {got}")
        x.copy_(new)
        graph.replay()
        return logits.clone()

    return replay


def obstacle(model: nn.Module, example: Tensor) -> str:
    """Why `model` cannot be captured, and what to do; empty if it can."""
    if not torch.cuda.is_available():
        return "PyTorch sees no GPU."
    if not example.is_cuda or any(not parameter.is_cuda for parameter in model.parameters()):
        return "the model and the example must be on the GPU: call .cuda() on both."
    if model.training:
        return "it is in training mode; call model.eval()."
    reductions = [block.reduction for block in ats_blocks(model)]
    if any(reduction.selects for reduction in reductions) and model.layout != "static":
        return "its shapes depend on the image. Build it with ATS.LAYOUT static (ViT and timm's), or ATS.ENABLE False."
    eager = [reduction.name for reduction in reductions if not reduction.graphable]
    return f"ATS.SAMPLER {eager[0]} draws on the CPU. Use inverse_transform or topk." if eager else ""
