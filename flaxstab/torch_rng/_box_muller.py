"""Box-Muller in PyTorch's two forms: blocks of 16 uniforms, and one pair of normals at a time.

In float32 the elementary functions are the single-precision ones of the Cephes library by
Stephen L. Moshier (https://www.netlib.org/cephes: logf, sinf, cosf), with the multiply-adds fused
where PyTorch's compiler fuses them. In float64 they are the C library's.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from flaxstab.torch_rng._arrays import Floats
from flaxstab.torch_rng._fused import fused

BLOCK = 16
"""Uniforms that become normals together: 8 for radii, 8 for angles."""

_LOG = (
    7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
    -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1,
)  # fmt: skip
_SIN = (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)
_COS = (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)
_LN2 = (np.float32(0.693359375), np.float32(-2.12194440e-4))  # ln 2 in two parts, 9 bits and rest
_QUARTER_PI = tuple(
    map(np.float32, (0.78515625, 2.4187564849853515625e-4, 3.77489497744594108e-8))
)  # pi / 4 in three parts, the first two of few bits
_SQRT_HALF = 0x3F3504F3  # the bits of the float32 next to sqrt(1/2)
_HALF, _ONE = np.float32(0.5), np.float32(1)


def block_normals(uniforms: Floats) -> Floats:
    """Returns standard normals in the dtype of the uniforms.

    Args:
      uniforms: numbers in [0, 1), shape ``(16 * blocks,)``, float32 or float64.

    Returns:
      As many normals: in each block 8 cosines, then 8 sines.

    Reference:
      G. Box, M. Muller, "A Note on the Generation of Random Normal Deviates", Annals of
      Mathematical Statistics 29(2), 1958.
    """
    single = uniforms.dtype == np.float32
    log, sincos = (_log32, _sincos32) if single else (_log64, _sincos64)
    kind = uniforms.dtype.type
    pairs = uniforms.reshape(-1, 2, BLOCK // 2)
    radius = np.sqrt(kind(-2) * log(kind(1) - pairs[:, 0]))
    sine, cosine = sincos(kind(2 * math.pi) * pairs[:, 1])
    return np.stack([radius * cosine, radius * sine], axis=1).reshape(-1)


def normal_pair(uniforms: Sequence[float]) -> tuple[float, float]:
    """Returns the next normal and the one that PyTorch keeps for the draw after it.

    Args:
      uniforms: two float64 numbers in [0, 1): the angle's, then the radius's.
    """
    angle, radius = 2 * math.pi * uniforms[0], math.sqrt(-2 * math.log1p(-uniforms[1]))
    return radius * math.cos(angle), radius * math.sin(angle)


def _horner(x: Floats, coefficients: Sequence[float]) -> Floats:
    """Returns a polynomial, highest power first, with a fused multiply-add per step."""
    y, factor = np.full_like(x, coefficients[0]), x.astype(np.float64)  # cast once for all steps
    for coefficient in coefficients[1:]:
        y = fused(y, factor, np.float32(coefficient))
    return y


def _log32(x: Floats) -> Floats:
    """Cephes logf for x in (0, 1]: ``x = (1 + m) 2^e`` with 1 + m in [sqrt(1/2), sqrt(2))."""
    bits = x.view(np.int32)
    exponent = (bits - _SQRT_HALF) >> 23
    m = (bits - (exponent << 23)).view(np.float32) - _ONE
    e = exponent.astype(np.float32)
    square = m * m
    # log(1 + m) = m - m²/2 + m³ P(m), plus e ln 2 with ln 2's small part added first. What is not
    # fused here is exact: a half, and ln 2's large part of 9 bits times a small integer.
    y = fused(_horner(m, _LOG) * m, square, e * _LN2[1]) - square * _HALF
    return (m + y) + e * _LN2[0]


def _sincos32(x: Floats) -> tuple[Floats, Floats]:
    """Cephes sinf and cosf for x in [0, 2 pi]: polynomials on [-pi/4, pi/4]."""
    octant = ((x * np.float32(4 / math.pi)).astype(np.int32) + 1) & ~1  # 0, 2, 4, 6 or 8
    y = octant.astype(np.float32)
    # x - octant * pi/4. The first two products are exact: 8 and 11 bits times at most 8.
    rest = fused(y, -_QUARTER_PI[2], (x - y * _QUARTER_PI[0]) - y * _QUARTER_PI[1])
    square = rest * rest
    cosine = fused(_horner(square, _COS) * square, square, -(square * _HALF)) + _ONE
    sine = fused(_horner(square, _SIN) * square, rest, rest)
    return _turned(sine, cosine, octant)


def _turned(sine: Floats, cosine: Floats, octant: np.ndarray) -> tuple[Floats, Floats]:
    """Returns sine and cosine of an angle that is further by an even number of eighths of pi.

    With masks on the bits: they exchange the two in every other quadrant and set the signs.
    """
    s, c = sine.view(np.int32), cosine.view(np.int32)
    exchanged = (s ^ c) & -(octant >> 1 & 1)
    s, c = s ^ exchanged ^ (octant & 4) << 29, c ^ exchanged ^ (octant + 2 & 4) << 29
    return s.view(np.float32), c.view(np.float32)


def _elementwise(function: Callable[[float], float], x: Floats) -> np.ndarray:
    """Applies the C library's function; numpy's own differs from it in the last bit."""
    return np.fromiter(map(function, x.ravel().tolist()), np.float64, x.size).reshape(x.shape)


def _log64(x: Floats) -> Floats:
    return _elementwise(math.log, x)


def _sincos64(x: Floats) -> tuple[Floats, Floats]:
    return _elementwise(math.sin, x), _elementwise(math.cos, x)
