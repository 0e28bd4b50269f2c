"""What a setting may be: ranges for config keys and for the options of a reduction. Imports no PyTorch."""

from __future__ import annotations

import math
from typing import NamedTuple


class Range(NamedTuple):
    """Numbers from `low` to `high`; `above`: without `low`, `below`: without `high`. NaN and infinity are in none."""

    low: float
    high: float = math.inf
    above: bool = False
    below: bool = False

    def holds(self, value: object) -> bool:
        """Whether `value` is a number of the range."""
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
            return False
        return self.low <= value <= self.high and not (
            (self.above and value == self.low) or (self.below and value == self.high)
        )

    def __str__(self) -> str:
        low = f"{'above' if self.above else 'from'} {self.low}" if math.isfinite(self.low) else ""
        return f"{low} to {'below ' if self.below else ''}{self.high}" if math.isfinite(self.high) else low


FINITE = Range(-math.inf)
FROM_0 = Range(0)
POSITIVE = Range(0, above=True)
COUNT = Range(1)  # from 1
PROBABILITY = Range(0, 1)
RATE = Range(0, 1, below=True)
SHARE = Range(0, 1, above=True)
SEED = Range(0, 2**32 - 1)
