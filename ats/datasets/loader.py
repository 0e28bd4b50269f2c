"""Batch samplers, and a DataLoader whose workers report bad files, and die and stop cleanly.

The order of an epoch is a pure function of (seed, epoch), and each process takes its slice of every global batch. So
neither the number of processes nor resuming in mid-epoch changes anything. Batch sizes are global: over all processes.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from multiprocessing.queues import Queue
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from ats.datasets.base import Draw, Sample
from ats.errors import STOP_SIGNALS, UserError, environment_number

WORKER_DEATH_WAIT = 5.0  # seconds; a worker that closed its pipe has died by then


@dataclass(eq=False)
class TrainBatchSampler(Sampler[list[Draw]]):
    """One process's share of shuffled batches of `Draw`. Drops an incomplete last batch.

    With `num_repeats` R, an epoch draws each of the first 1 / R of the shuffled images R times in a row: the repeated
    augmentation of Hoffer et al., as in DeiT's RASampler. The epoch keeps its length and sees fewer images more often.

    Shares of a batch may differ by one sample. With `pairs`, samples i and B - 1 - i of the batch go to the same
    process. Mixup mixes exactly these pairs, so the result does not depend on the number of processes.

    Raises:
        UserError: a batch is larger than the data set, or smaller than the number of processes (twice that number with
            `pairs`).
    """

    num_samples: int
    _: KW_ONLY
    batch_size: int
    seed: int
    num_repeats: int = 1
    rank: int = 0
    world_size: int = 1
    pairs: bool = False

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.world_size
        least = self.world_size * (2 if self.pairs else 1)
        if self.batch_size < least:
            raise UserError(
                f"The batch size is over all processes: TRAIN.BATCH_SIZE {self.batch_size} is too small for "
                f"{self.world_size}. Set TRAIN.BATCH_SIZE to at least {least}."
            )
        if self.num_samples < self.batch_size:
            raise UserError(
                f"The training set has {self.num_samples} samples, fewer than one batch of {self.batch_size}. "
                f"Set TRAIN.BATCH_SIZE to at most {self.num_samples}."
            )
        self.num_batches = self.num_samples // self.batch_size
        self.set_epoch(0)

    def set_epoch(self, epoch: int, *, start_batch: int = 0) -> None:
        """Choose the epoch of the next iteration, and skip its first `start_batch` batches (after a resume)."""
        if not 0 <= start_batch <= self.num_batches:
            raise ValueError(f"start_batch must be in 0..{self.num_batches} (batches per epoch); got {start_batch}.")
        self.epoch, self.start_batch = epoch, start_batch

    def global_order(self) -> list[Draw]:
        """All draws of the epoch, over all processes: batch b is `[b * batch_size : (b + 1) * batch_size]`."""
        rng, epoch_size = np.random.default_rng([self.seed, self.epoch]), self.num_batches * self.batch_size
        permutation = rng.permutation(self.num_samples)
        seeds = rng.integers(2**32, size=epoch_size)
        return list(map(Draw, permutation[np.arange(epoch_size) // self.num_repeats].tolist(), seeds.tolist()))

    def __iter__(self) -> Iterator[list[Draw]]:
        order, share = self.global_order(), _share_of_pairs if self.pairs else _share
        for start in range(self.start_batch * self.batch_size, len(order), self.batch_size):
            yield share(order[start : start + self.batch_size], self.rank, self.world_size)

    def __len__(self) -> int:
        """Remaining batches of this epoch."""
        return self.num_batches - self.start_batch


@dataclass(eq=False)
class EvalBatchSampler(Sampler[list[int]]):
    """Batches of indices in order: each sample exactly once over all processes, with no padding of the last batch.

    Each process gets a slice of every global batch. At the end it may get one sample, or one batch, fewer than another.
    """

    num_samples: int
    _: KW_ONLY
    batch_size: int
    rank: int = 0
    world_size: int = 1

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, self.num_samples, self.batch_size):
            batch = range(start, min(start + self.batch_size, self.num_samples))
            if share := list(_share(batch, self.rank, self.world_size)):
                yield share

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _share(batch, rank: int, world_size: int):
    """The slice of a global batch (list or range) for `rank`; sizes differ by at most one."""
    return batch[len(batch) * rank // world_size : len(batch) * (rank + 1) // world_size]


def _share_of_pairs(batch: list, rank: int, world_size: int) -> list:
    """The pairs (i, B - 1 - i) of `rank`, ordered so that positions i and B' - 1 - i of the share are again pairs."""
    num_pairs = len(batch) // 2
    first, last = num_pairs * rank // world_size, num_pairs * (rank + 1) // world_size
    middle = batch[num_pairs : len(batch) - num_pairs] if rank == 0 else []
    return batch[first:last] + middle + batch[len(batch) - last : len(batch) - first]


class Loader(DataLoader):
    """A DataLoader that raises a worker's UserError unchanged, and a worker's death always as a RuntimeError.

    A plain DataLoader would put the worker's traceback into the message. So the data set returns the error instead of
    the batch (`__getitems__`), and the loader raises it when that batch is due.
    """

    dataset: Any  # a `Dataset` with a length, which PyTorch's class does not promise
    batch_sampler: Any  # from `build_loader`: a `TrainBatchSampler` or an `EvalBatchSampler`

    def __init__(self, dataset: Dataset, **settings: Any):
        super().__init__(dataset, collate_fn=collate, worker_init_fn=init_worker, **settings)

    def __iter__(self) -> Iterator[Sample]:  # type: ignore[override]
        try:
            for batch in super().__iter__():
                if isinstance(batch, UserError):
                    # A copy: raising `batch` itself would create a reference cycle with this frame, and an iterator
                    # freed as part of a cycle waits five seconds for each worker.
                    raise type(batch)(*batch.args)
                yield batch
        except (OSError, EOFError) as error:
            if not self.num_workers:
                raise
            # A worker that dies while handing over a batch closes its pipe before its SIGCHLD arrives. On that signal
            # PyTorch raises an error that says what killed the worker. Wait for it here: raised while the iterator is
            # being deleted, Python would only print it.
            time.sleep(WORKER_DEATH_WAIT)
            raise RuntimeError(
                f"DataLoader worker exited unexpectedly while a batch was read from it ({error!r})."
            ) from error


def collate(samples: list[Sample] | UserError) -> Any:
    """Stack samples: x [B, 3, (T,) H, W], label and index int64 [B], bad B strings. A UserError passes through."""
    if isinstance(samples, UserError):
        return samples
    try:
        return default_collate(samples)
    except RuntimeError as error:
        if "shared memory" not in str(error):  # which only a data worker allocates
            raise
        return _no_way_to_hand_over(error)


def _no_way_to_hand_over(error: Exception) -> UserError:
    return UserError(
        f"A data worker cannot hand over its batch: {error}. If /dev/shm is full, give the container more (docker run "
        "--shm-size=8g); if too many files are open, type ulimit -n 65535 first; if a path is too long, type export "
        "TMPDIR=/tmp first. Or lower DATA_LOADER.NUM_WORKERS: 0 needs none of these. Run the same command to resume "
        "from the last checkpoint."
    )


def _hand_over_error(queue: Queue, error: Exception, batch: tuple[int, object]) -> None:
    """Send the error instead of the batch that the queue's thread could not write.

    By default the thread prints a traceback and goes on, and training waits for that batch forever.
    """
    queue.put((batch[0], _no_way_to_hand_over(error)))


def init_worker(worker: int) -> None:
    """A `worker_init_fn`: ignore stop signals, which schedulers and terminals send to whole process groups.

    A SIGTERM from the training process itself still counts: PyTorch ends workers that way if they do not exit.
    """
    Queue._on_queue_feeder_error = _hand_over_error  # type: ignore[attr-defined]  # in this process only
    for signum in STOP_SIGNALS:
        if signum != signal.SIGTERM:
            signal.signal(signum, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS cannot say who sent a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_parents_sigterm, daemon=True).start()


def _exit_on_parents_sigterm() -> None:
    parent = multiprocessing.parent_process().pid  # not os.getppid(): that may be a fork server
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


def num_cores() -> int:
    """CPU cores for each process that torchrun started on this machine. Respects CPU affinity, but no CPU quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(cores // environment_number("LOCAL_WORLD_SIZE", 1), 1)
