"""Allowed values of config keys and of the options of a reduction. Imports no PyTorch."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Any, NamedTuple

MAX_INT = 2**63 - 1


class Range(NamedTuple):
    """Numbers from `low` to `high`; `above` excludes `low`, `below` excludes `high`.

    NaN, infinity and integers that do not fit in 64 bits are in no range.
    """

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def holds(self, value: object) -> bool:
        """Whether `value` is a number in the range."""
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            return False
        if not (is_64_bit(value) if isinstance(value, int) else math.isfinite(value)):
            return False
        return self.low <= value <= self.high and not (
            (self.above and value == self.low) or (self.below and value == self.high)
        )

    def __str__(self) -> str:
        low = f"{'above' if self.above else 'from'} {self.low}" if math.isfinite(self.low) else ""
        return f"{low} to {'below ' if self.below else ''}{self.high}" if self.high < MAX_INT else low


def is_64_bit(value: int) -> bool:
    """Whether an integer fits in 64 bits, with its sign."""
    return -MAX_INT <= value <= MAX_INT


FINITE = Range(-math.inf)
FROM_0 = Range(0)
POSITIVE = Range(0, above=True)
AMOUNT = Range(0, MAX_INT, above=True)  # a share, or a number of things
COUNT = Range(1)  # from 1
PROBABILITY = Range(0, 1)
RATE = Range(0, 1, below=True)
SHARE = Range(0, 1, above=True)
SEED = Range(0, 2**32 - 1)


class Option(NamedTuple):
    """One option of a reduction. Its default is the dataclass field's."""

    help: str = ""  # its meaning, in a sentence
    within: Range | None = None  # allowed numbers; None: any
    choices: tuple[object, ...] = ()  # allowed values, if few
    types: tuple[type, ...] = ()  # allowed types; empty: the default's
    per_block: bool = False  # also accepts a list with one entry per block of the network
    networks: tuple[str, ...] = ()  # values of MODEL.NAME that read it; empty: all with ATS
    give: str = ""  # what to type, for the message that refuses a value: "a share in (0, 1]"


def option(default: Any, help: str = "", **about: Any) -> Any:
    """A dataclass field that is an option of a reduction: `r: int = option(8, "Tokens merged away.", within=FROM_0)`.

    Args:
        about: the other attributes of `Option`.
    """
    return field(default=default, metadata={"option": Option(help, **about)})
