"""Where a run computes, in which precision, and from which random numbers."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch

from ats.errors import UserError, counted


def select_device(name: str) -> torch.device:
    """The device of `DEVICE`: "cpu", "cuda", or "auto" for the GPU if there is one, of several processes each its own.
    Float32 is exact on it, not TF32.

    Raises:
        UserError: "cuda" where PyTorch sees no GPU.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(f"DEVICE cuda: PyTorch {torch.__version__} sees no GPU. Type DEVICE cpu or DEVICE auto.")
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())  # chosen by `distributed.process_group`


def device_name(device: torch.device) -> str:
    """A name for reports: the GPU's, or the CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {counted(torch.get_num_threads(), 'thread')}"


@contextlib.contextmanager
def explain_lost_worker() -> Iterator[None]:
    """Within it the death of a data worker is a `UserError`.

    PyTorch raises it in the main process wherever that is, not only where it waits for data.
    """
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        reason = str(error).strip().rstrip(".")
        raise UserError(
            f"{reason}. If it was killed (dmesg says so), the machine had too little memory: lower "
            "DATA_LOADER.NUM_WORKERS. The same command goes on from the last checkpoint."
        ) from error


def autocast(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager:
    """Mixed precision in `dtype`; None computes in the weights' own precision."""
    return torch.autocast(device.type, dtype) if dtype is not None else contextlib.nullcontext()


def seed_everything(*key: int) -> None:
    """Seed Python, NumPy and PyTorch (all devices) by a hash of `key`, e.g. (RNG_SEED, epoch, step).

    Reseeding at every step makes each step's random numbers a function of its place in the training alone: a resumed
    run draws what the uninterrupted one would have drawn.
    """
    low, high = (int(word) for word in np.random.SeedSequence([word % 2**32 for word in key]).generate_state(2))
    random.seed(low)
    np.random.seed(low)  # noqa: NPY002 - timm's Mixup draws from NumPy's global generator
    torch.manual_seed(low + (high << 32))
