"""Which samples make up which batch, for any number of processes.

The order of an epoch is a pure function of (seed, epoch); a process takes its slice of every global batch. So the
number of processes, and stopping and resuming in the middle of an epoch, change nothing. Batch sizes are global: over
all processes.

The samplers are given to a DataLoader as `batch_sampler`: they yield the keys of one batch at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from ats.errors import UserError


class Draw(NamedTuple):
    """A key for a data set: the sample to read, and the seed of its random transform (32 bits)."""

    index: int
    seed: int


class TrainSampler(Sampler[list[Draw]]):
    """Shuffled batches of `Draw`, one process's share.

    With `num_repeats` R, an epoch holds R draws, side by side, of every R-th image of the shuffled order (the repeated
    augmentation of Hoffer et al. as in DeiT's RASampler: the epoch keeps its length and sees fewer images more often).

    A last batch that is not full is left out.

    Args:
        num_samples: size of the data set.
        batch_size: over all processes. Shares may differ by one sample (with `pairs` by two).
        pairs: a process takes samples i and B - 1 - i of the batch together. These are what mixup mixes, so with this
            it mixes the same samples whatever the number of processes.

    Raises:
        UserError: a batch is larger than the data set, or smaller than the number of processes (with `pairs` twice it).
    """

    def __init__(
        self,
        num_samples: int,
        *,
        batch_size: int,
        seed: int,
        num_repeats: int = 1,
        rank: int = 0,
        world_size: int = 1,
        pairs: bool = False,
    ):
        _check_rank(rank, world_size)
        _check_positive(batch_size, "The training batch size", "TRAIN.BATCH_SIZE")
        _check_positive(num_repeats, "The number of repeated augmentations", "AUG.NUM_SAMPLE")
        least = world_size * (2 if pairs else 1)
        if batch_size < least:
            raise UserError(
                f"The batch size is over all processes: TRAIN.BATCH_SIZE {batch_size} is too small for {world_size}. "
                f"Set TRAIN.BATCH_SIZE to at least {least}."
            )
        if num_samples < batch_size:
            raise UserError(
                f"The training set has {num_samples} samples, fewer than one batch of {batch_size}. "
                f"Set TRAIN.BATCH_SIZE to at most {num_samples}."
            )
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.seed = seed
        self.num_repeats = num_repeats
        self.rank = rank
        self.world_size = world_size
        self.pairs = pairs
        self.num_batches = num_samples // batch_size
        self.epoch_size = self.num_batches * batch_size
        self.set_epoch(0)

    def set_epoch(self, epoch: int, *, start_batch: int = 0) -> None:
        """Choose the epoch of the next iteration, and how many of its batches to leave out because they are done."""
        if not 0 <= start_batch <= self.num_batches:
            raise ValueError(f"start_batch must be in 0..{self.num_batches} (batches per epoch); got {start_batch}.")
        self.epoch = epoch
        self.start_batch = start_batch

    def global_order(self) -> list[Draw]:
        """All draws of the epoch over all processes, in order: batch b is `[b * batch_size : (b + 1) * batch_size]`."""
        rng = np.random.default_rng([self.seed, self.epoch])
        permutation = rng.permutation(self.num_samples)
        seeds = rng.integers(2**32, size=self.epoch_size)
        indices = permutation[np.arange(self.epoch_size) // self.num_repeats]
        return list(map(Draw, indices.tolist(), seeds.tolist()))

    def __iter__(self) -> Iterator[list[Draw]]:
        order = self.global_order()
        for start in range(self.start_batch * self.batch_size, self.epoch_size, self.batch_size):
            batch = order[start : start + self.batch_size]
            yield (_share_of_pairs if self.pairs else _share)(batch, self.rank, self.world_size)

    def __len__(self) -> int:
        """Batches still to come in this epoch."""
        return self.num_batches - self.start_batch


class EvalSampler(Sampler[list[int]]):
    """Batches of indices in order: every sample exactly once over all processes, none repeated to fill a batch.

    A process gets a slice of every global batch; at the end it may get one sample, or one batch, fewer than another.

    Args:
        num_samples: size of the data set. batch_size: over all processes.
    """

    def __init__(self, num_samples: int, *, batch_size: int, rank: int = 0, world_size: int = 1):
        _check_rank(rank, world_size)
        _check_positive(batch_size, "The evaluation batch size", "TEST.BATCH_SIZE")
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.rank = rank
        self.world_size = world_size

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, self.num_samples, self.batch_size):
            batch = range(start, min(start + self.batch_size, self.num_samples))
            if share := list(_share(batch, self.rank, self.world_size)):
                yield share

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _share(batch, rank: int, world_size: int):
    """The slice of a global batch (list or range) that belongs to `rank`; sizes differ by one at most."""
    return batch[len(batch) * rank // world_size : len(batch) * (rank + 1) // world_size]


def _share_of_pairs(batch: list, rank: int, world_size: int) -> list:
    """The pairs (i, B - 1 - i) of a batch that belong to `rank`, again such that i and B' - 1 - i are a pair."""
    num_pairs = len(batch) // 2
    first, last = num_pairs * rank // world_size, num_pairs * (rank + 1) // world_size
    middle = batch[num_pairs : len(batch) - num_pairs] if rank == 0 else []
    return batch[first:last] + middle + batch[len(batch) - last : len(batch) - first]


def _check_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in 0..{world_size - 1} (world_size {world_size}); got {rank}.")


def _check_positive(value: int, what: str, key: str) -> None:
    if value < 1:
        raise UserError(f"{what} ({key}) must be at least 1; got {value}.")
