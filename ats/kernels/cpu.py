"""Runs linear layers and attention on a CPU with the fastest kernels in PyTorch, found by timing them once.

PyTorch sends float32 products to MKL, which has no AVX-512 code for AMD: there, linear layers can run at less than half
of a core's speed. oneDNN, which PyTorch also contains, has that code. On other CPUs MKL is as fast or faster. The
vendor alone does not tell which wins, so we time the actual layers: 0.1 s, once per machine, width and number of
threads.

    with fastest(blocks, x, backend="auto", num_tokens=...):    # "torch": PyTorch's own; "onednn": all by oneDNN
        ...                                     # F.linear and F.scaled_dot_product_attention, in this thread only

All kernels compute in float32 and differ by round-off. Other dtypes, autocast, compilers, FLOP counters and torch.func
transforms get PyTorch's own operations. A `TorchFunctionMode` replaces these functions, so hooks, adapters and
parametrizations around them still work, and nothing changes outside the `with`. In timm's MLP, F.gelu runs within the
product before it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import astuple, dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Mlp
from torch import Tensor, nn
from torch.nn.modules import module
from torch.overrides import TorchFunctionMode

from ats.compat import current_dispatch_mode, forward_ad_level, is_functorch_wrapped_tensor, onednn_linear
from ats.kernels.remembered import remembered

logger = logging.getLogger(__name__)
ONEDNN_LINEAR: Any = onednn_linear()

# How much faster another kernel must be. Less may be noise, and then two runs would differ in their last bits. A
# training step has more products with a new number of rows every time.
MARGIN, TRAINING_MARGIN = 1.08, 1.25
FLOPS_TO_TIME = 4e8  # in a block's layers, per round
ROUNDS = 4  # four times as many if the result is near the margin
MIN_ROWS = 8  # with fewer, a product is done before oneDNN has looked up its kernel


@dataclass(frozen=True)
class Choice:
    """Which kernels run."""

    linear: str = "torch"  # or "onednn"
    attention: str = "fused"  # or another name in ATTENTION, which runs without gradients only


PLAIN = Choice()
BACKENDS = {"auto": None, "torch": PLAIN, "onednn": Choice("onednn", "onednn")}  # ATS.CPU_BACKEND
Key = tuple[int, int, bool]  # threads, width of the first layer, with gradients
_choices: dict[Key, Choice] = {}  # made so far in this process
_lock = threading.Lock()


def fastest(
    blocks: Sequence[nn.Module], x: Tensor, *, backend: str, num_tokens: Callable[[], int]
) -> AbstractContextManager:
    """A context in which this thread's F.linear and F.scaled_dot_product_attention run on the kernels of `backend`.

    Args:
        blocks: the network's blocks; the linear layers of the first one are timed.
        x: the network's input, or another tensor with the device and dtype it computes in.
        backend: a name in BACKENDS.
        num_tokens: returns the tokens per sequence in the first block, for timing attention.
    """
    choice = BACKENDS[backend]
    if choice == PLAIN or not blocks or not _may_replace(x, blocks):
        return nullcontext()
    if ONEDNN_LINEAR is None:
        if choice is not None:
            _warn()
        return nullcontext()
    if choice is None:
        choice = _fastest(blocks[0], num_tokens)
    return nullcontext() if choice == PLAIN else Kernels(choice, before_gelu=_before_gelu(blocks))


def choices() -> list[list]:
    """The choices made so far in this process, in plain types for a checkpoint."""
    return [[*key, choice.linear, choice.attention] for key, choice in _choices.items()]


def restore(found: list[list]) -> None:
    """Take over another process's `choices`, so that a resumed run computes the same bits."""
    _choices.update({(threads, width, training): Choice(*names) for threads, width, training, *names in found})


def _may_replace(x: Tensor, blocks: Sequence[nn.Module]) -> bool:
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or current_dispatch_mode() is not None:
        return False
    if forward_ad_level() >= 0 or any(map(_runs_elsewhere, blocks)):
        return False
    return bool(torch.backends.mkldnn.enabled)


@cache  # once
def _warn() -> None:
    logger.warning("ATS.CPU_BACKEND onednn: this PyTorch has no linear layers by oneDNN; using its other kernels.")


def _before_gelu(blocks: Iterable[nn.Module]) -> frozenset[int]:
    """The `id` of the weight of every layer whose output goes to GELU and nowhere else: the first of timm's MLP."""
    mlps = (getattr(block, "mlp", None) for block in blocks)
    return frozenset(id(mlp.fc1.weight) for mlp in mlps if type(mlp) is Mlp and _is_plain(mlp))


def _is_plain(mlp: Mlp) -> bool:
    """Whether GELU is exact and nothing can see the tensor between the first layer and GELU."""
    between = (mlp.fc1._forward_hooks, mlp.act._forward_pre_hooks, module._global_forward_hooks)
    pre = module._global_forward_pre_hooks
    own_code = any("forward" in part.__dict__ for part in (mlp, mlp.fc1, mlp.act))
    is_exact = type(mlp.act) is nn.GELU and mlp.act.approximate == "none"
    return type(mlp.fc1) is nn.Linear and is_exact and not (own_code or pre or any(between))


def _runs_elsewhere(block: nn.Module) -> bool:
    """Whether a block is compiled, or runs a second time in the backward pass, outside the `with`."""
    if block._compiled_call_impl is not None or "_orig_mod" in block._modules:
        return True
    names = ("grad_checkpointing", "gradient_checkpointing", "_checkpoint_wrapped_module")
    return torch.is_grad_enabled() and any(getattr(block, name, False) for name in names)


# ---- the clock


def _fastest(block: nn.Module, num_tokens: Callable[[], int]) -> Choice:
    first = next(_linears(block), None)
    if first is None:
        return PLAIN
    key = torch.get_num_threads(), first.in_features, torch.is_grad_enabled()
    if key not in _choices:
        with _lock:
            if key not in _choices:
                _choices[key] = _measured_once(block, key, num_tokens)
    return _choices[key]


def _measured_once(block: nn.Module, key: Key, num_tokens: Callable[[], int]) -> Choice:
    """The choice measured by this process, or by an earlier one."""
    threads, width, training = key
    rules = {"margins": [MARGIN, TRAINING_MARGIN], "kernels": list(ATTENTION)}  # other rules measure again
    question = {"threads": threads, "width": width, "training": training} | rules
    linear, attention = remembered(question, lambda: list(astuple(_measure(block, num_tokens()))))
    return Choice(linear, attention)


def _linears(block: nn.Module) -> Iterator[nn.Linear]:
    """The layers that both kernels can compute. Weights may have another dtype than the network's input."""
    for layer in block.modules():
        if type(layer) is nn.Linear and layer.weight.is_contiguous() and _takes(layer.weight):
            yield layer


def _measure(block: nn.Module, num_tokens: int) -> Choice:
    """Time the linear layers of a block and, without gradients, its attention over `num_tokens`."""
    layers, before_gelu = list(_linears(block)), _before_gelu([block])
    rows = int(min(max(FLOPS_TO_TIME / (2 * sum(layer.weight.numel() for layer in layers)), 32), 256))
    inputs = [layer.weight.new_full((rows, layer.in_features), 0.5) for layer in layers]
    with_gradients = torch.is_grad_enabled()

    def run(linear: Callable, with_gelu: Callable) -> Callable[[], None]:
        def through_all() -> None:
            for layer, own in zip(layers, inputs, strict=True):
                product = with_gelu if id(layer.weight) in before_gelu and not with_gradients else linear
                out = product(own, layer.weight.detach().requires_grad_(with_gradients), None)
                if with_gradients:
                    out.sum().backward()

        return through_all

    by_onednn = _TrainedLinear.apply if with_gradients else linear_
    runs = {"torch": run(F.linear, _linear_gelu_in_two), "onednn": run(by_onednn, linear_gelu)}
    linear = _first_by_far(runs, TRAINING_MARGIN if with_gradients else MARGIN)
    attention = getattr(block, "attn", None) or getattr(block, "attention", None)
    num_heads = getattr(attention, "num_heads", None) or getattr(attention, "num_attention_heads", None)
    if with_gradients or not num_heads:
        return Choice(linear)
    q = inputs[0].new_full((1, num_tokens, num_heads, layers[0].in_features // num_heads), 0.5).transpose(1, 2)
    attentions = {name: partial(attend, q, q, q, 0.125) for name, attend in ATTENTION.items()}
    return Choice(linear, _first_by_far(attentions))


def _first_by_far(runs: Mapping[str, Callable[[], object]], margin: float = MARGIN) -> str:
    """The fastest run if it is more than `margin` times as fast as the first, else the first."""
    best = dict.fromkeys(runs, float("inf"))
    usual = next(iter(best))
    for rounds in (ROUNDS, 3 * ROUNDS):
        for _ in range(rounds):
            for name, run in runs.items():
                start = time.perf_counter()
                run()
                best[name] = min(best[name], time.perf_counter() - start)
        fastest = min(best, key=best.__getitem__)
        gain = best[usual] / best[fastest]
        if not margin - 0.1 < gain < margin + 0.1:
            break
    return fastest if gain > margin else usual


# ---- the kernels


def linear_(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` by oneDNN, without gradients. `weight` must be contiguous or the transpose of a contiguous tensor: for
    other strides oneDNN has only reference code, which takes seconds.
    """
    return ONEDNN_LINEAR(x.contiguous(), weight, bias, "none", [], "")


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.gelu(F.linear(x, weight, bias))` by oneDNN in one call, without gradients."""
    return ONEDNN_LINEAR(x.contiguous(), weight, bias, "gelu", [], "none")


def _linear_gelu_in_two(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(F.linear(x, weight, bias))


def _missing_rows(rows: int) -> int:
    """How many rows to add. oneDNN builds code for each new number of rows, which takes milliseconds and megabytes, and
    the number of kept tokens is new every time. So round it up to six binary digits: by 1 % on average.
    """
    return -rows % (1 << max(rows.bit_length() - 6, 0))


def _with_round_rows(x: Tensor) -> Tensor:
    """x [T, C], contiguous, with rows of zeros appended."""
    more = _missing_rows(len(x))
    return F.pad(x, (0, 0, 0, more)) if more else x.contiguous()


def _on_round_rows(product: Callable, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`product` of x [..., C], padded by whatever follows in memory, or zeros. The padding's results are cut off."""
    x = x.contiguous()
    rows, width = x.numel() // x.shape[-1], x.shape[-1]
    more = _missing_rows(rows)
    if not more:
        return product(x, weight, bias)
    if x.untyped_storage().nbytes() >= (x.storage_offset() + (rows + more) * width) * x.element_size():
        padded = x.as_strided((rows + more, width), (width, 1))
    else:
        padded = _with_round_rows(x.view(rows, width))
    return product(padded, weight, bias)[:rows].view(*x.shape[:-1], weight.shape[0])


class _TrainedLinear(torch.autograd.Function):
    """`F.linear` with its forward and backward products by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _on_round_rows(linear_, x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        # create_graph: someone needs the gradient's gradient, which oneDNN's operator does not have.
        product = F.linear if torch.is_grad_enabled() else linear_
        rows, x_rows = (_with_round_rows(t.reshape(-1, t.shape[-1])) for t in (grad, x))
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            product(rows, weight.t())[: x.numel() // x.shape[-1]].view_as(x) if of_x else None,
            product(rows.t(), x_rows.t()) if of_weight else None,
            rows.sum(dim=0) if ctx.has_bias and of_bias else None,
        )


def _products(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention as two batched products, one sequence at a time so that its logits stay in the cache."""
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
    for own, query, key, value in zip(out, q, k, v, strict=True):
        own.copy_(torch.bmm(torch.bmm(query * scale, key.transpose(1, 2)).softmax(dim=-1), value))
    return out


def _products_by_onednn(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """The same by oneDNN, which has no batched float32 product: one product per sequence and head."""
    out = q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)
    q, k, v = (q * scale).contiguous(), k.contiguous(), v.transpose(2, 3).contiguous()
    for sequence in zip(out, q, k, v, strict=True):
        for own, query, key, value in zip(*sequence, strict=True):
            own.copy_(linear_(linear_(query, key).softmax(dim=-1), value))
    return out


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, scale=scale)


ATTENTION = {"fused": _fused, "products": _products, "onednn": _products_by_onednn}


MISUSE = "The output of an MLP's first layer, computed with its GELU, did not go to that GELU; use cpu_backend torch."


class Kernels(TorchFunctionMode):
    """Runs linear layers and attention on the kernels of a `Choice` wherever these compute the same.

    Args:
        before_gelu: the `id` of each weight whose product goes to GELU and nowhere else; both then run as one call.
    """

    def __init__(self, choice: Choice, *, before_gelu: frozenset[int] = frozenset()) -> None:
        super().__init__()
        self.before_gelu = before_gelu
        self.activated: Tensor | None = None  # output of the last layer before a GELU, GELU included
        self.handlers: dict[Callable, Callable] = {}
        if choice.linear == "onednn":
            self.handlers |= {F.linear: self._linear, F.gelu: self._gelu}
        if choice.attention != "fused":
            self.attend = ATTENTION[choice.attention]
            self.handlers[F.scaled_dot_product_attention] = self._attention

    def __torch_function__(self, function: Callable, types: object, args: tuple = (), kwargs: dict | None = None):
        return self.handlers.get(function, function)(*args, **(kwargs or {}))

    def __exit__(self, kind: object, *rest: object) -> None:
        super().__exit__(kind, *rest)
        assert kind is not None or self.activated is None, MISUSE

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """`F.linear`, by oneDNN where it can."""
        assert self.activated is None, MISUSE
        tensors = (x, weight) if bias is None else (x, weight, bias)
        rows = x.numel() // max(x.shape[-1], 1)
        if rows < MIN_ROWS or weight.ndim != 2 or not weight.is_contiguous() or not _takes(*tensors):
            return F.linear(x, weight, bias)
        if _has_gradient(*tensors):
            return _TrainedLinear.apply(x, weight, bias)
        if id(weight) not in self.before_gelu:
            return _on_round_rows(linear_, x, weight, bias)
        self.activated = _on_round_rows(linear_gelu, x, weight, bias)
        return self.activated

    def _gelu(self, x: Tensor, approximate: str = "none") -> Tensor:
        if x is not self.activated:
            return F.gelu(x, approximate=approximate)
        self.activated = None
        return x

    def _attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        is_plain = attn_mask is None and not (dropout_p or is_causal or enable_gqa) and q.ndim == k.ndim == v.ndim == 4
        if is_plain and _takes(q, k, v) and min(q.shape[2], k.shape[2]) >= MIN_ROWS and not _has_gradient(q, k, v):
            return self.attend(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)
        options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, **options)


def _takes(*tensors: Tensor) -> bool:
    """Whether all are plain float32 tensors on a CPU. Subclasses (quantised, distributed) and torch.func transforms
    have their own rules for products.
    """
    plain = (type(t) in (Tensor, nn.Parameter) and not is_functorch_wrapped_tensor(t) for t in tensors)
    return all(plain) and all(t.dtype == torch.float32 and t.device.type == "cpu" for t in tensors)


def _has_gradient(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
