"""What the data sets have in common: a sample, its seeded random transform, and what happens at a file that is bad."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ats.datasets.sampler import Draw
from ats.errors import UserError

MAX_REPLACEMENTS = 16  # unreadable files in a row before giving up

OnBad = Literal["raise", "replace", "skip"]


class Sample(NamedTuple):
    """One image or clip, or after collation a batch of them."""

    x: Tensor  # [3, H, W] or [3, T, H, W]
    label: int
    index: int  # of the sample in x: after a replacement that of the replacing one
    bad: str  # path of the file that was asked for and could not be read, or ""


class FileDataset(Dataset[Sample], ABC):
    """Samples that are read from files.

    Args:
        on_bad: what happens at a file that cannot be read: "raise" a UserError; "replace" it by another sample, the
            same one in every run; or "skip" it: x is NaN. The last two report its path in `Sample.bad`.
        seed: chooses the replacements.
    """

    def __init__(self, *, on_bad: OnBad = "raise", seed: int = 0):
        if on_bad not in get_args(OnBad):
            raise ValueError(f"on_bad must be one of {get_args(OnBad)}; got {on_bad!r}.")
        self.on_bad = on_bad
        self.seed = seed

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def path(self, index: int) -> str:
        """Path of the file of sample `index`."""

    @abstractmethod
    def label(self, index: int) -> int:
        """Label of sample `index`."""

    @abstractmethod
    def load(self, index: int) -> Tensor:
        """Read and transform sample `index`; a UserError says that the file is bad."""

    def blank(self) -> Tensor:
        """What stands for a skipped sample."""
        raise NotImplementedError(f"{type(self).__name__} cannot skip samples.")

    def __getitem__(self, key: int | Draw) -> Sample:
        """Read and transform a sample.

        Args:
            key: an index, for which random transforms draw from the global generators as they are; or a `Draw`, for
                which they are seeded by `key.seed` and afterwards put back as they were.

        Raises:
            UserError: the file cannot be read, and `on_bad` is "raise"; or too many files in a row cannot be read.
        """
        if not isinstance(key, Draw):
            return self._read(int(key))
        with seeded(key.seed):
            return self._read(key.index)

    def __getitems__(self, keys: Sequence[int | Draw]) -> list[Sample] | UserError:
        """A batch for a DataLoader, of indices or of Draws. A UserError is returned, not raised: see
        `ats.datasets.build.Loader`.
        """
        try:
            if not isinstance(keys[0], Draw):
                return [self[key] for key in keys]
            with generators_unchanged():  # once for all: it takes as long as a fiftieth of reading an image
                samples = []
                for index, seed in keys:
                    seed_generators(seed)
                    samples.append(self._read(index))
                return samples
        except UserError as error:
            return error

    def _read(self, index: int) -> Sample:
        bad = ""
        for attempt in range(MAX_REPLACEMENTS):
            try:
                return Sample(self.load(index), self.label(index), index, bad)
            except UserError:
                if self.on_bad == "raise":
                    raise
                if self.on_bad == "skip":
                    return Sample(self.blank(), self.label(index), index, self.path(index))
                bad = bad or self.path(index)
                index = int(np.random.default_rng([self.seed, index, attempt]).integers(len(self)))
        raise UserError(f"{bad} cannot be read, and nor can the {MAX_REPLACEMENTS - 1} files tried in its place.")


def seed_generators(seed: int) -> None:
    """Seed `random`, `numpy` and `torch` (CPU)."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - timm draws from the global generator
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would disturb the GPU's generators


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed `random`, `numpy` and `torch` (CPU) for the block, then put their states back."""
    with generators_unchanged():
        seed_generators(seed)
        yield


@contextmanager
def generators_unchanged() -> Iterator[None]:
    """Put the states of `random`, `numpy` and `torch` (CPU) back after the block."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)


def random_states() -> tuple:
    """The states of the generators of `random`, `numpy` and `torch` (CPU)."""
    return random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002


def set_random_states(states: tuple) -> None:
    """Put states that `random_states` returned back."""
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])
