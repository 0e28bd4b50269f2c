"""Several processes, started by torchrun: each trains on its share of every batch and evaluates its share of the data.

    with process_group("auto"):       # does nothing in a single process
        train(cfg)

The world is torch.distributed's; every function here also works in a single process, where there is nothing to
exchange. Tensors of the CPU travel by gloo, those of a GPU by NCCL.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ats.errors import UserError
from ats.tokens import KeptTokens

TORCHRUN = "torchrun --nproc_per_node=N tools/run_net.py ..."


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this process is the one that writes files and speaks."""
    return rank() == 0


@contextlib.contextmanager
def process_group(device: str = "auto", *, timeout_minutes: float = 10) -> Iterator[None]:
    """Join the processes that torchrun started; a lost one is an error that says so.

    Args:
        device: `DEVICE` of the config.
        timeout_minutes: longest wait for a process that hangs. One that dies is noticed at once.

    Raises:
        UserError: the processes were not started by torchrun, there are fewer GPUs than processes, or another process
            has stopped.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    if missing := {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys():
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but {', '.join(sorted(missing))} are not set. Type: {TORCHRUN}"
        )
    backend = "gloo"
    if device != "cpu" and torch.cuda.is_available():
        local_rank, num_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= num_gpus:
            raise UserError(f"This machine has {num_gpus} GPUs: type torchrun --nproc_per_node={num_gpus}.")
        torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl"
    with _explain_lost_process():
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
        yield
        dist.destroy_process_group()  # not after an error: it would wait for processes that no longer come


@contextlib.contextmanager
def _explain_lost_process() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # gloo has no exception type of its own; its errors name their source file or say "gloo".
        if not isinstance(error, dist.DistError) and "gloo" not in str(error).lower():
            raise
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"Process {rank()} of {world_size()} stops because another one has stopped or cannot be reached; the first "
            f"message of the others says why. The same command goes on from the last checkpoint. ({reason})"
        ) from error


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of every process's `values` (same shape and dtype), in place; a meeting point of all processes."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def max_over_processes(values: Tensor) -> Tensor:
    """The largest of every process's `values`, entry by entry, in place."""
    if world_size() > 1:
        dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return values


def wait_for_all() -> None:
    """Return once every process has come here."""
    sum_over_processes(torch.zeros(1))


def gather(item: object) -> list:
    """Every process's `item`, in their order, on every process."""
    if world_size() == 1:
        return [item]
    items = [None] * world_size()
    dist.all_gather_object(items, item)
    return items


def from_main(item: object) -> object:
    """The `item` of process 0, on every process."""
    items = [item]
    if world_size() > 1:
        dist.broadcast_object_list(items, src=0)
    return items[0]


class _Forward(nn.Module):
    """`forward_tokens` as `forward`, which is what DistributedDataParallel wraps."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, list[KeptTokens]]:
        return self.model.forward_tokens(x)


def data_parallel(model: nn.Module) -> nn.Module:
    """A module whose forward is `model.forward_tokens` and whose backward averages the gradients over the processes.

    In a single process it is the bare call. The weights of process 0 are copied to the others.
    """
    if world_size() == 1:
        return _Forward(model)
    # Without unused parameters to find, DDP would lay out its buckets anew after the first step. Then a resumed run
    # would add the gradients of three or more processes in another order than the uninterrupted one.
    return DistributedDataParallel(_Forward(model), find_unused_parameters=True)


def no_gradient_exchange(model: nn.Module) -> contextlib.AbstractContextManager:
    """Within it backward passes of `data_parallel`'s module only add to this process's gradients."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext()
