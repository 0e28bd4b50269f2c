"""Done once, on first use: importing PyTorch, and computing cached properties.

Config files and `--help` need a reduction's options, not its arithmetic, and importing PyTorch takes seconds. The files
in `ats/reduction/` therefore take `torch` from here; your own code can import it as usual.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

T = TypeVar("T")


class _LazyTorch(ModuleType):
    def __getattr__(self, name: str) -> object:
        value = getattr(import_module("torch"), name)
        setattr(self, name, value)  # so this is called once per name
        return value


if TYPE_CHECKING:
    import torch
else:
    torch = _LazyTorch("torch")


class cached(Generic[T]):
    """`functools.cached_property` without its lock: before Python 3.12, torch.compile breaks the graph at the lock."""

    def __init__(self, function: Callable[[Any], T]) -> None:
        self.function = function

    def __get__(self, instance: object, owner: type) -> T:
        value = self.function(instance)
        setattr(instance, self.function.__name__, value)
        return value
