"""Device, precision, random seeds and processes of a run.

    with process_group("auto"):       # does nothing in a single process
        train(cfg)

torchrun starts the processes; each handles its share of the samples. Every function also works in a single process,
without communication. CPU tensors use gloo, GPU tensors NCCL.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ats.errors import UserError, counted, environment_number
from ats.tokens import KeptTokens


def select_device(name: str) -> torch.device:
    """The device for `DEVICE` "cpu", "cuda" or "auto" (this process's GPU if there is one, else the CPU).

    Turns TF32 off, so float32 is exact. Raises a UserError for "cuda" if PyTorch sees no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(f"DEVICE cuda: PyTorch {torch.__version__} sees no GPU. Type DEVICE cpu or DEVICE auto.")
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())  # set by `process_group`


def device_name(device: torch.device) -> str:
    """The GPU's name, or "cpu" with the number of threads, for reports."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {counted(torch.get_num_threads(), 'thread')}"


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """Mixed precision in `dtype`; None keeps the precision of the weights."""
    return torch.autocast(device.type, dtype) if dtype is not None else contextlib.nullcontext()


def seed_everything(*key: int) -> None:
    """Seed Python, NumPy and PyTorch (all devices) with a hash of `key`, e.g. (RNG_SEED, epoch, step).

    Training reseeds at every step, so a step's random numbers depend only on its key, and a resumed run draws the same
    ones as an uninterrupted run.
    """
    low, high = (int(word) for word in np.random.SeedSequence([word % 2**32 for word in key]).generate_state(2))
    random.seed(low)
    np.random.seed(low)  # noqa: NPY002 - timm's Mixup draws from NumPy's global generator
    torch.manual_seed(low + (high << 32))


def rank() -> int:
    """Index of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is process 0, which writes the files and prints."""
    return rank() == 0


@contextlib.contextmanager
def process_group(device: str = "auto", *, timeout_minutes: float = 10) -> Iterator[None]:
    """Join the processes that torchrun started; `device` is the config's `DEVICE`.

    Waits `timeout_minutes` for a process that hangs. One that dies is noticed at once.

    Raises:
        UserError: torchrun did not start the processes, there are more processes than GPUs, or one has stopped.
    """
    if environment_number("WORLD_SIZE", 1) == 1:
        yield
        return
    if missing := {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys():
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but {', '.join(sorted(missing))} are not set. "
            "Type: torchrun --nproc_per_node=N tools/run_net.py ..."
        )
    backend = "gloo"
    if device != "cpu" and torch.cuda.is_available():
        local_rank, num_gpus = environment_number("LOCAL_RANK", 0), torch.cuda.device_count()
        if local_rank >= num_gpus:
            raise UserError(f"This machine has {num_gpus} GPUs: type torchrun --nproc_per_node={num_gpus}.")
        torch.cuda.set_device(local_rank)
        backend = "cpu:gloo,cuda:nccl"
    with explain_lost_process():
        dist.init_process_group(backend, timeout=timedelta(minutes=timeout_minutes))
        yield
        dist.destroy_process_group()  # skipped after an error: it would wait for dead processes


@contextlib.contextmanager
def explain_lost_process() -> Iterator[None]:
    """Turn the death of a data worker, or of another process of the run, into a `UserError`."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0]
        if reason.startswith("DataLoader worker"):  # from a signal handler, so from anywhere in the main process
            raise UserError(
                f"{reason.rstrip('.')}. If it was killed (see dmesg), the machine ran out of memory: lower "
                "DATA_LOADER.NUM_WORKERS. Run the same command to resume from the last checkpoint."
            ) from error
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"MASTER_PORT {os.environ.get('MASTER_PORT', '')} is in use on this machine, perhaps by another run: "
                "type torchrun --standalone ..., or give torchrun another --master_port."
            ) from error
        # gloo has no exception type; its errors mention its source file or "gloo".
        if isinstance(error, dist.DistError) or "gloo" in str(error).lower():
            raise UserError(
                f"Process {rank()} of {world_size()} stops because another one has stopped or cannot be reached; the "
                f"first message of the others says why. Run the same command to resume from the last checkpoint. "
                f"({reason})"
            ) from error
        raise


def all_reduce(values: Tensor, method: str = "sum") -> Tensor:
    """The "sum" or "max" of `values` over all processes (same shape and dtype on each), in place."""
    if world_size() > 1:
        dist.all_reduce(values, op=getattr(dist.ReduceOp, method.upper()))
    return values


def wait_for_all() -> None:
    """A barrier: returns once every process has called it."""
    all_reduce(torch.zeros(1))


def all_gather(item: object) -> list:
    """Every process's `item`, in the order of the ranks, on every process."""
    items = [item] * world_size()
    if len(items) > 1:
        dist.all_gather_object(items, item)
    return items


def broadcast(item: Any) -> Any:
    """The `item` of process 0, on every process."""
    items = [item]
    if world_size() > 1:
        dist.broadcast_object_list(items, src=0)
    return items[0]


def broadcast_buffers(model: nn.Module) -> None:
    """Copy the buffers of process 0 to all processes, e.g. batch norm's running statistics, which each process updates
    with its own samples.
    """
    for buffer in model.buffers() if world_size() > 1 else ():
        contiguous = buffer.contiguous()
        dist.broadcast(contiguous, src=0)
        if contiguous is not buffer:
            buffer.copy_(contiguous)


class _ForwardTokens(nn.Module):
    """Exposes `forward_tokens` as `forward`, which DistributedDataParallel wraps."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, list[KeptTokens]]:
        return self.model.forward_tokens(x)


def data_parallel(model: nn.Module) -> nn.Module:
    """A module that calls `model.forward_tokens` and, in backward, averages the gradients over the processes.

    All processes start with the weights of process 0.
    """
    if world_size() == 1:
        return _ForwardTokens(model)
    # Without find_unused_parameters, DDP rebuilds its buckets after the first step. With three or more processes, a
    # resumed run would then sum the gradients in a different order than the uninterrupted run.
    return DistributedDataParallel(_ForwardTokens(model), find_unused_parameters=True)
