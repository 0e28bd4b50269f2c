"""What all data sets share: samples, their keys, seeded random transforms, and the handling of unreadable files."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ats.errors import UserError, printable

ADVICE = "Restore the file, or remove it from the data set."  # how errors about a file end
MAX_REPLACEMENTS = 16  # unreadable files in a row before giving up

Split = Literal["train", "val", "test"]
OnBad = Literal["raise", "replace", "skip"]


class Sample(NamedTuple):
    """One image or clip or, after collation, a batch."""

    x: Tensor  # [3, H, W] or [3, T, H, W]
    label: Any  # int; of a batch [B] int64
    index: Any  # int or [B]: the sample in x; if a bad file was replaced, its replacement
    bad: Any  # path of the requested file if it could not be read, else ""; for a batch, a list


class Draw(NamedTuple):
    """A data set key: the sample to read, and the 32-bit seed of its random transform."""

    index: int  # type: ignore[assignment]  # not the method of tuples
    seed: int


@dataclass(eq=False, repr=False, kw_only=True)
class FileDataset(Dataset[Sample], ABC):
    """Samples read from files."""

    # What to do with an unreadable file: "raise" a UserError; "replace" it by another sample, the same in every run; or
    # "skip" it, with NaN in x. The last two report its path in `Sample.bad`.
    on_bad: OnBad = "raise"
    seed: int = 0  # chooses the replacements

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def path(self, index: int) -> str:
        """File path of sample `index`."""

    @abstractmethod
    def label(self, index: int) -> int:
        """Label of sample `index`."""

    @abstractmethod
    def load(self, index: int) -> Tensor:
        """Read and transform sample `index`. Any exception means that the file is bad."""

    def listed_in(self, index: int) -> str:
        """Where the file of sample `index` is listed, for errors; "" if nowhere."""
        return ""

    def blank(self) -> Tensor:
        """The x of a skipped sample."""
        raise NotImplementedError(f"{type(self).__name__} cannot skip samples.")

    def __getitem__(self, key: int | Draw) -> Sample:
        """Read and transform a sample.

        With an index, random transforms draw from the global generators as they are; with a `Draw`, those are seeded
        with `key.seed` and restored afterwards.

        Raises:
            UserError: the file cannot be read and `on_bad` is "raise", or too many files in a row cannot be read.
        """
        with generators_unchanged() if isinstance(key, Draw) else nullcontext():
            return self._read(key)

    def __getitems__(self, keys: Sequence[int | Draw]) -> list[Sample] | UserError:
        """A batch for a DataLoader, by indices or Draws. Returns a UserError instead of raising it, see `Loader`."""
        try:
            with generators_unchanged() if isinstance(keys[0], Draw) else nullcontext():
                # Once per batch: per image it would add 2 % to the reading time.
                return [self._read(key) for key in keys]
        except UserError as error:
            return error

    def _read(self, key: int | Draw) -> Sample:
        if isinstance(key, Draw):
            seed_generators(key.seed)
        index, bad, reason = key.index if isinstance(key, Draw) else int(key), "", None
        for attempt in range(MAX_REPLACEMENTS):
            try:
                with read_errors(self.path(index), listed_in=self.listed_in(index)):
                    return Sample(self.load(index), self.label(index), index, bad)
            except UserError as error:
                reason = reason or error
                if self.on_bad == "raise":
                    raise
                if self.on_bad == "skip":
                    return Sample(self.blank(), self.label(index), index, self.path(index))
                bad = bad or self.path(index)
                index = int(np.random.default_rng([self.seed, index, attempt]).integers(len(self)))
        others = f"neither can the {MAX_REPLACEMENTS - 1} files tried in its place"
        raise UserError(f"{printable(bad)} cannot be read, and {others}. {reason}") from reason


@contextmanager
def read_errors(path: str, *, kind: str = "file", listed_in: str = "") -> Iterator[None]:
    """Turn any exception raised while reading a file into a UserError with its path; UserErrors keep their text.

    A damaged file can make a decoder raise anything, even a MemoryError.
    """
    try:
        yield
    except Exception as error:
        message = str(error)
        if not isinstance(error, UserError):
            message = getattr(error, "strerror", None) or message.rstrip(".")
            if not message or not isinstance(error, OSError | ValueError):
                message = ": ".join(filter(None, (type(error).__name__, message)))
            what = f"the {kind} {printable(path)}: {printable(message)}"
            message = f"Cannot read {what}. {ADVICE}"
        raise UserError(f"{listed_in}: {message}" if listed_in else message) from error


def seed_generators(seed: int) -> None:
    """Seed `random`, `numpy` and `torch` (CPU)."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - timm draws from the global generator
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would also reseed the GPU's generators


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed `random`, `numpy` and `torch` (CPU) inside the block, and restore their states after it."""
    with generators_unchanged():
        seed_generators(seed)
        yield


@contextmanager
def generators_unchanged() -> Iterator[None]:
    """Restore the states of `random`, `numpy` and `torch` (CPU) after the block."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])
