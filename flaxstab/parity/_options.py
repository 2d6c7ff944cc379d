"""Checks of the options that comparisons share."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from flaxstab._checks import check
from flaxstab._typing import DTypeLike
from flaxstab.parity._inputs import Layout, is_float, largest, round_to
from flaxstab.parity._torch_side import Rename

_LOW = ("float32", "bfloat16", "float16")


def check_options(layout: Layout, weights: str | None, rename: Rename | None) -> None:
    """Raises a ``ValueError`` unless each is one that :func:`compare` takes."""
    check(layout in ("image", None), "layout must be 'image' or None", layout=layout)
    rule = "weights must be 'torch', 'flax' or None"
    check(weights in ("torch", "flax", None), rule, weights=weights)
    check(
        rename is None or callable(rename),
        "rename must be a function of names",
        rename=rename,
        fix="Of a dict d pass lambda name: d.get(name, name).",
    )


def check_dtypes(dtypes: Sequence[DTypeLike]) -> None:
    """Raises a ``ValueError`` unless these are lower precisions."""
    rule = f"dtypes must be a sequence of {', '.join(_LOW)}"
    check(isinstance(dtypes, Sequence) and not isinstance(dtypes, str), rule, dtypes=dtypes)
    check(all(_name(kind) in _LOW for kind in dtypes), rule, dtypes=dtypes)


def _name(kind: DTypeLike) -> str:
    try:
        return jnp.dtype(kind).name
    except TypeError:
        return ""


def lower(
    arrays: tuple[np.ndarray, ...], dtypes: Sequence[DTypeLike]
) -> tuple[list[np.dtype], DTypeLike]:
    """Returns the lower precisions, and the dtype that all numbers are rounded to before float64.

    Where float32 is judged, float64 starts from the same rounded numbers and serves both.

    Raises:
      ValueError: if an array does not fit the range of a precision.
    """
    kinds = [jnp.dtype(kind) for kind in dtypes]
    for kind in kinds:
        _check_range(arrays, kind)
    return kinds, np.float32 if np.dtype(np.float32) in kinds else np.float64


def _check_range(arrays: tuple[np.ndarray, ...], dtype: np.dtype) -> None:
    """Refuses inputs that a dtype turns into infinity, or into nothing but 0."""
    for place, array in enumerate(arrays):
        if is_float(array) and array.size:
            with np.errstate(over="ignore", under="ignore"):
                low = round_to(array, dtype)
            fits = np.array_equal(np.isfinite(low), np.isfinite(array)) and low.any() == array.any()
            rule = f"inputs must lie within the range of {dtype.name}"
            fix = "Scale them, or leave that dtype out of dtypes=."
            largest_of = f"{largest(array):.1e}"
            check(fits, rule, fix=fix, **{f"input {place} of size": largest_of})
