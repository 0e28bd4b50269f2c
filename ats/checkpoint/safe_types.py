"""Types that a checkpoint may hold besides tensors: types found in other projects' files that cannot run code.

A pickle that names anything else is refused. NumPy's own functions are excluded, because `ndarray(...)`,
`ndarray.__setstate__` and `dtype.__setstate__` can interpret numbers as addresses.
"""

from __future__ import annotations

import argparse
import datetime
import pathlib
import pickle
from collections import OrderedDict

import numpy as np


class _DType:
    """Stands for numpy.dtype; numbers and text only."""

    def __init__(self, code: str, *_: object) -> None:
        self.dtype = np.dtype(code)
        if self.dtype.kind not in "biufcSU":
            raise pickle.UnpicklingError(f"Unsupported global: GLOBAL numpy.dtype.{self.dtype.name}")

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    """Stands for numpy.ndarray; its values are set once, from bytes."""

    def __new__(cls, *_: object) -> _Array:
        return super().__new__(cls, 0)

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, is_fortran, values = state
        if self.nbytes or not isinstance(dtype, _DType) or not isinstance(values, bytes):
            raise pickle.UnpicklingError("Not the state of an array.")
        super().__setstate__((1, shape, dtype.dtype, is_fortran, values))


def _empty_array(*_: object) -> _Array:
    return _Array()


def _scalar(dtype: _DType, value: bytes) -> np.generic:
    return np.frombuffer(value, dtype.dtype, count=1)[0]


def _plain_dict(*_: object) -> dict:
    """Replaces a defaultdict, which PyTorch does not fill."""
    return {}


_NUMPY = ("numpy.core", "numpy._core")  # before and since NumPy 2
_PATHS = {"PosixPath": pathlib.PosixPath, "WindowsPath": pathlib.PureWindowsPath}
_PATHS |= {cls.__name__: cls for cls in (pathlib.PurePosixPath, pathlib.PureWindowsPath)}

# For `torch.serialization.safe_globals`: types, or (callable, the name in the pickle).
SAFE_TYPES: list = [
    argparse.Namespace,
    *(datetime.date, datetime.datetime, datetime.time, datetime.timedelta, datetime.timezone),
    *(bool, bytes, dict, float, frozenset, int, list, slice, tuple),
    *sorted({t for t in np.sctypeDict.values() if issubclass(t, (np.number, np.bool_))}, key=str),
    (_plain_dict, "collections.defaultdict"),
    *((OrderedDict, f"{module}.CfgNode") for module in ("yacs.config", "fvcore.common.config")),
    *((cls, f"{module}.{name}") for module in ("pathlib", "pathlib._local") for name, cls in _PATHS.items()),
    (_DType, "numpy.dtype"),
    (_Array, "numpy.ndarray"),
    *((_empty_array, f"{module}.multiarray._reconstruct") for module in _NUMPY),
    *((_scalar, f"{module}.multiarray.scalar") for module in _NUMPY),
]
