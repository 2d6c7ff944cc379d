"""Names for the arrays, and the dtypes that PyTorch's generator fills."""

from typing import TypeAlias

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from flaxstab._checks import check
from flaxstab._typing import Shape

Floats: TypeAlias = np.ndarray  # of float32 or float64
Scalar: TypeAlias = float | np.float32 | np.float64

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
