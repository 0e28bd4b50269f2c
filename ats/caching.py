"""A property that is computed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class cached:
    """A property computed once: functools.cached_property, less the lock that it takes before Python 3.12, at which
    torch.compile would cut the graph.
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __get__(self, instance: object, owner: type) -> Any:
        value = self.function(instance)
        setattr(instance, self.function.__name__, value)
        return value
