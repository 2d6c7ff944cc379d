"""Large arrays, kept as a hash and as sums that still show where a value has moved."""

import hashlib

import numpy as np

from flaxstab.parity._inputs import Values, is_float

WHOLE = 1 << 16  # elements of an array that is kept as it is
_BUCKETS = 4096
_LIKELY = 8.0  # sums of k bounded terms with random signs exceed 8 sqrt(k) bounds once in 1e13


def folded(values: Values) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Returns small arrays in place of large ones, and the hashes of those.

    An array of over 65,536 elements becomes 4,096 sums of its elements with signs of their places:
    of two such arrays the sums differ by the sums of the differences, so that one element that
    moves far still shows, and rounding, which has no direction, does not add up. NaN and infinity
    spoil the sum that they fall into.

    Args:
      values: arrays by name.
    """
    large = {n: a for n, a in values.items() if is_large(a)}
    kept = {n: _sums(a) if n in large else np.asarray(a) for n, a in values.items()}
    return kept, {n: digest(a) for n, a in large.items()}


def folded_unit(unit: np.ndarray, size: int) -> np.ndarray:
    """Returns the units of a folded array's sums.

    Args:
      unit: of the elements: one for each, or one for all.
      size: how many elements there are.

    Reference:
      W. Hoeffding, "Probability Inequalities for Sums of Bounded Random Variables", 1963.
    """
    squares = np.square(np.broadcast_to(np.asarray(unit, np.float64).ravel(), (size,)))
    return _LIKELY * np.sqrt(np.bincount(_places(size), squares, _BUCKETS))


def is_large(array: np.ndarray) -> bool:
    """Whether an array is folded."""
    return array.size > WHOLE and (is_float(array) or array.dtype.kind in "iub")


def digest(array: np.ndarray) -> str:
    """Returns the SHA-256 of an array's dtype, shape and bytes."""
    array = np.ascontiguousarray(array)
    start = f"{array.dtype.name} {array.shape} ".encode()
    return hashlib.sha256(start + array.tobytes()).hexdigest()


def _places(size: int) -> np.ndarray:
    return np.arange(size) % _BUCKETS


def _sums(array: np.ndarray) -> np.ndarray:
    wide = np.asarray(array, np.float64).ravel()
    # Signs by multiplicative hashing of the place: the same for ever, as no generator's are.
    hashed = np.arange(wide.size, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    signs = np.where(hashed >> np.uint64(63), 1.0, -1.0)
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        return np.bincount(_places(wide.size), signs * wide, _BUCKETS)
