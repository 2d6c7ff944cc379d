"""What is odd about the numbers of a tensor, without a false alarm on fresh or zeroed layers."""

import numpy as np

from flaxstab.interop._entries import Kind

_SAMPLE = 64  # that many different numbers spare a look at all of them


def suspicion(array: np.ndarray, kind: Kind = Kind.OTHER) -> str:
    """Returns what is odd about a tensor; '' if nothing is.

    NaN and infinities are odd anywhere. A negative or all-zero variance is, and weights that are
    all the same; biases, gammas and means may be.

    Args:
      array: the tensor.
      kind: what its numbers are.
    """
    if array.size == 0 or not _is_float(array):
        return ""
    with np.errstate(over="ignore", invalid="ignore"):
        total = np.isfinite(np.sum(array))  # one pass; only a sum that overflows costs a second
    found = "" if total else _not_finite(array)
    if found or kind is Kind.OTHER:
        return found
    if kind is Kind.VARIANCE:
        low = array.min()
        return f"negative: {low:.6g}" if low < 0 else "all zero" if not array.any() else ""
    return _same(array) if array.size > 1 else ""


def _is_float(array: np.ndarray) -> bool:
    return array.dtype.kind == "f" or array.dtype.name.startswith(("bfloat", "float"))


def _not_finite(array: np.ndarray) -> str:
    nan = int(np.count_nonzero(np.isnan(array)))
    infinite = int(np.count_nonzero(np.isinf(array)))
    counts = (f"{nan} NaN" if nan else "", f"{infinite} infinite" if infinite else "")
    return " and ".join(filter(None, counts))


def _same(array: np.ndarray) -> str:
    first = array.flat[0]
    if (array.flat[:_SAMPLE] != first).any() or (array != first).any():
        return ""
    return "all zero" if first == 0 else f"constant {first:.6g}"
