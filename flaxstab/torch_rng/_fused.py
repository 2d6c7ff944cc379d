"""The fused multiply-add ``x * y + z``, rounded once, for arrays: numpy has none."""

import numpy as np

from flaxstab.torch_rng._arrays import Floats, Scalar

_BELOW_FLOAT32 = 0x1FFFFFFF  # the bits of a float64's mantissa that a float32 does not have
_HALFWAY = 0x10000000
_SPLITTER = 2.0**27 + 1


def fused(x: Floats, y: Floats | Scalar, z: Floats | Scalar) -> Floats:
    """Returns ``x * y + z`` with one rounding, in the dtype of ``x``: float32 or float64.

    Args:
      x: an array.
      y: an array or a number, of values of that dtype.
      z: an array or a number, of values of that dtype.

    Reference:
      S. Boldo, G. Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using
      rounding to odd", IEEE Transactions on Computers 57(4), 2008 (figure 1), for float64.
    """
    return _fused32(x, y, z) if x.dtype == np.float32 else _fused64(x, y, z)


def _fused32(x: Floats, y: Floats | Scalar, z: Floats | Scalar) -> Floats:
    # Casts written out: ufuncs on mixed dtypes cast in pieces, which takes longer.
    total = x.astype(np.float64)
    total *= np.asarray(y, np.float64)  # exact: 24 bits by 24 bits
    total += np.asarray(z, np.float64)
    # The sum was rounded to 53 bits. Rounding it again to 24 goes wrong only if the first rounding
    # has hit the middle between two float32: about once in 2^29 sums.
    tied = (total.view(np.int64) & _BELOW_FLOAT32) == _HALFWAY
    if tied.any():
        a, b, c = (np.broadcast_to(np.asarray(v, np.float64), x.shape)[tied] for v in (x, y, z))
        total[tied] = _towards_the_rest(*_two_sum(a * b, c))
    return total.astype(np.float32)


def _towards_the_rest(total: Floats, rest: Floats) -> Floats:
    """Returns ``total`` moved by one unit in the last place to the side of a rest that is not 0."""
    return np.where(rest == 0, total, np.nextafter(total, np.copysign(np.inf, rest)))


def _fused64(x: Floats, y: Floats | Scalar, z: Floats | Scalar) -> Floats:
    high, low = _two_product(x, np.asarray(y, np.float64))
    addend, rest = _two_sum(np.asarray(z, np.float64), low)
    total, error = _two_sum(high, addend)
    return total + _sum_to_odd(rest, error)


def _sum_to_odd(x: Floats, y: Floats) -> Floats:
    """Returns ``x + y``; of the two neighbours of an inexact sum, the one whose last bit is 1."""
    total, rest = _two_sum(x, y)
    even = total.view(np.int64) & 1 == 0
    return np.where(even, _towards_the_rest(total, rest), total)


def _two_sum(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Returns the rounded sum and its error: together exactly ``x + y`` (Knuth)."""
    total = x + y
    part = total - x
    return total, (x - (total - part)) + (y - part)


def _two_product(x: Floats, y: Floats) -> tuple[Floats, Floats]:
    """Returns the rounded product and its error: together exactly ``x * y`` (Dekker)."""
    product = x * y
    (a, b), (c, d) = _halves(x), _halves(y)
    return product, ((a * c - product) + a * d + b * c) + b * d


def _halves(x: Floats) -> tuple[Floats, Floats]:
    """Returns two numbers of at most 26 bits whose sum is ``x`` (Veltkamp)."""
    scaled = x * _SPLITTER
    high = scaled - (scaled - x)
    return high, x - high
