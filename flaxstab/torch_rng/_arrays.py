"""Names for the arrays, and the dtypes that PyTorch's generator fills."""

from collections.abc import Callable
from typing import TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from flaxstab._checks import check
from flaxstab._typing import Shape

Floats: TypeAlias = np.ndarray  # of float32 or float64
Scalar: TypeAlias = float | np.float32 | np.float64

_CHUNK = 2**15  # numbers computed at once: they stay in the processor's cache
_LARGEST64 = 2.0**990  # beyond it a float64 cannot be split into halves
_DTYPES = tuple(map(np.dtype, (np.float32, np.float64, np.float16, ml_dtypes.bfloat16)))


def floating(dtype: DTypeLike) -> np.dtype:
    """Returns a dtype of random numbers.

    Raises:
      ValueError: if PyTorch's generator does not fill it.
    """
    kind = np.dtype(dtype)
    check(kind in _DTYPES, "dtype must be float32, float64, bfloat16 or float16", dtype=str(kind))
    return kind


def wide(kind: np.dtype) -> np.dtype:
    """Returns the dtype in which PyTorch computes: float32 for itself and the 16-bit ones."""
    return np.dtype(np.float64) if kind.itemsize == 8 else np.dtype(np.float32)


def held(x: float, kind: np.dtype) -> np.generic:
    """Returns a number in a dtype; rounded to float32 on the way to 16 bits, as by PyTorch."""
    return kind.type(wide(kind).type(x))


def dimensions(shape: Shape | int) -> Shape:
    """Returns a shape as a tuple.

    Raises:
      ValueError: unless it is made of integers of at least 0.
    """
    sizes = (shape,) if isinstance(shape, int | np.integer) else tuple(shape)
    fits = all(isinstance(n, int | np.integer) and n >= 0 for n in sizes)
    check(fits, "shape must be an integer or integers, each at least 0", shape=shape)
    return tuple(int(n) for n in sizes)


def filled(count: int, kind: np.dtype, draw: Callable[[int], np.ndarray]) -> np.ndarray:
    """Returns ``count`` draws, made in pieces that stay in the cache."""
    values = np.empty(count, kind)
    for start in range(0, count, _CHUNK):
        stop = min(start + _CHUNK, count)
        values[start:stop] = draw(stop - start)
    return values


def limit_of(kind: np.dtype) -> float:
    """Returns the largest magnitude that parameters of draws in a dtype may have."""
    return min(float(ml_dtypes.finfo(kind).max), _LARGEST64)


def check_bounds(low: float, high: float, kind: np.dtype) -> None:
    """Raises a ``ValueError`` unless PyTorch draws uniform numbers between these bounds."""
    limit = limit_of(kind)
    inside = abs(low) <= limit and abs(high) <= limit
    check(inside, f"low and high must lie in [-{limit:.4g}, {limit:.4g}]", low=low, high=high)
    check(low <= high, "low must not be above high", low=low, high=high)
    check(high - low <= limit, f"high - low must not be above {limit:.4g}", low=low, high=high)
