"""Small counters: right answers, averages since the last line of the log, time to go, unreadable files."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

from torch import Tensor

from ats.errors import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")


def hits(logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which rows of logits [B, classes] are right at 1, right at 5, and finite; what is not finite is not right."""
    finite = logits.isfinite().all(dim=1)
    top = logits.topk(min(5, logits.shape[1]), dim=1).indices
    right = (top == label.to(top.device)[:, None]) & finite[:, None]
    return right[:, 0], right.any(dim=1), finite


class Window:
    """Averages over the steps since the last `take`.

    Args:
        state: of a window that was begun before, from `state()`.
    """

    def __init__(self, state: dict | None = None) -> None:
        state = state or {"sums": {}, "num_steps": 0, "seconds": 0.0}
        self._sums: dict[str | int, float] = defaultdict(float, state["sums"])
        self._num_steps = state["num_steps"]
        self._start = time.perf_counter() - state["seconds"]

    def state(self) -> dict:
        """Plain values to go on from."""
        seconds = time.perf_counter() - self._start
        return {"sums": dict(self._sums), "num_steps": self._num_steps, "seconds": seconds}

    def add(self, values: dict[str | int, float]) -> None:
        """Add one step's values."""
        for name, value in values.items():
            self._sums[name] += value
        self._num_steps += 1

    def take(self) -> dict[str | int, float]:
        """Mean of every value per step, and `seconds` per step; begins the next window."""
        means = {name: total / self._num_steps for name, total in self._sums.items()}
        means["seconds"] = (time.perf_counter() - self._start) / self._num_steps
        self.__init__()
        return means


def timed(batches: Iterable[T]) -> Iterator[tuple[T, float]]:
    """Each batch, and the seconds it was waited for."""
    start = time.perf_counter()
    for batch in batches:
        yield batch, time.perf_counter() - start
        start = time.perf_counter()


class Eta:
    """Time to go, from the mean pace since it was made (evaluations and checkpoints included)."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self._done = 0
        self._start = time.perf_counter()

    def step(self) -> None:
        """One of the steps is done."""
        self._done += 1

    def __str__(self) -> str:
        pace = (time.perf_counter() - self._start) / max(self._done, 1)
        return str(timedelta(seconds=round(pace * (self._num_steps - self._done))))


class BadFiles:
    """Counts the unreadable files that training replaced, names each once, and stops a run that has too many.

    Args:
        max_fraction: allowed share of bad samples among those read so far.
        grace: the first so many samples count as read from the start, so that an early bad file does not end a run.
    """

    def __init__(self, *, max_fraction: float, grace: int = 1000) -> None:
        self._max_fraction, self._grace = max_fraction, grace
        self._paths: set[str] = set()
        self.num_read = self.num_bad = 0

    def state(self) -> list[int]:
        """Plain values to go on from."""
        return [self.num_read, self.num_bad]

    def restore(self, state: list[int] | None) -> None:
        """Go on from a `state()`; from None: from nothing."""
        self.num_read, self.num_bad = state or (0, 0)

    def add(self, bad: Sequence[str], *, num_read: int | None = None, num_bad: int | None = None) -> None:
        """Add one batch.

        Args:
            bad: per sample the path of the file that could not be read, or "".
            num_read, num_bad: samples, and bad ones, of the batch over all processes, by default of `bad`.

        Raises:
            UserError: more than `max_fraction` of the samples read so far were bad.
        """
        paths = [path for path in bad if path]
        for path in dict.fromkeys(paths):
            if path not in self._paths:
                logger.warning("%s cannot be read; another sample takes its place.", path)
        self._paths.update(paths)
        self.num_read += len(bad) if num_read is None else num_read
        self.num_bad += len(paths) if num_bad is None else num_bad
        if self.num_bad > self._max_fraction * max(self.num_read, self._grace):
            first = "".join(f"\n  {path}" for path in sorted(self._paths)[:5])
            more = f"\n  and {len(self._paths) - 5} more" if len(self._paths) > 5 else ""
            raise UserError(
                f"{self.num_bad} of the {self.num_read} training samples read so far cannot be read, more than "
                f"DATA.MAX_BAD_FRACTION {self._max_fraction} allows. Mend or remove these files, or raise the key:"
                f"{first}{more}"
            )
