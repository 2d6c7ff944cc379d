"""The fused multiply-add of ``torch_rng`` against exact rational arithmetic."""

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest

from flaxstab.torch_rng._fused import fused

N = 3000
SINGLE, DOUBLE = np.float32, np.float64


def exact(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    """``x * y + z`` rounded once to the nearest, ties to even, for results in the normal range."""
    kind = x.dtype.type
    return np.array(
        [
            rounded(Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c)), kind)
            for a, b, c in zip(x, y, z, strict=True)
        ],
        kind,
    )


def rounded(value: Fraction, kind: type[np.floating]) -> np.floating:
    """The number of a dtype that is nearest to a fraction; of two, the one whose last bit is 0."""
    near = kind(float(value))  # off by one unit at most
    around = (np.nextafter(near, kind(-np.inf)), near, np.nextafter(near, kind(np.inf)))
    bits = np.array(around).view(f"i{near.itemsize}") & 1
    return min(
        zip(around, bits, strict=True),
        key=lambda pair: (abs(Fraction(float(pair[0])) - value), pair[1]),
    )[0]


def spread(kind: type[np.floating], seed: int, decades: float) -> list[np.ndarray]:
    """Three arrays of either sign and magnitudes that are decades apart."""
    draw = np.random.default_rng(seed)
    return [(draw.normal(size=N) * 10 ** draw.uniform(-decades, decades, N)).astype(kind)] + [
        (draw.normal(size=N) * 10 ** draw.uniform(-decades, decades, N)).astype(kind)
        for _ in range(2)
    ]


def cancelling(kind: type[np.floating], seed: int) -> list[np.ndarray]:
    """Three arrays where ``z`` takes away nearly all of ``x * y``."""
    x, y, _ = spread(kind, seed, 2)
    return [x, y, -(x * y)]


def near_ties(kind: type[np.floating]) -> list[np.ndarray]:
    """Products halfway between two numbers, and a rest far below that decides."""
    digits = 24 if kind is SINGLE else 53
    half = -(-digits // 2)
    # (1 + 2^-half)(1 + 2^(half - digits)) ends in 2^-digits: half a unit.
    x = kind(1) + kind(2.0**-half)
    y = kind(1) + kind(2.0 ** (half - digits))
    rests = [0.0, *(sign * 2.0**-k for k in (30, 54, 60, 80, 100, 120) for sign in (1, -1))]
    z = np.array(rests, kind)
    return [np.full_like(z, x), np.full_like(z, y), z]


CASES = {
    "spread": lambda kind: spread(kind, 0, 4),
    "narrow": lambda kind: spread(kind, 1, 0.1),
    "cancelling": lambda kind: cancelling(kind, 2),
    "near ties": near_ties,
    "no addend": lambda kind: [*spread(kind, 3, 2)[:2], np.zeros(N, kind)],
}


def assert_rounded_once(
    function: Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray],
    operands: list[np.ndarray],
) -> None:
    result = function(*operands)
    assert result.dtype == operands[0].dtype
    np.testing.assert_array_equal(result, exact(*operands))


@pytest.mark.parametrize("kind", [SINGLE, DOUBLE])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_fused_rounds_once(case: Callable[[type], list[np.ndarray]], kind: type) -> None:
    assert_rounded_once(fused, case(kind))


def test_fused_takes_numbers_for_arrays() -> None:
    for kind in (SINGLE, DOUBLE):
        x, y, z = spread(kind, 4, 1)
        expected = exact(x, np.full_like(x, y[0]), np.full_like(x, z[0]))
        np.testing.assert_array_equal(fused(x, y[0], z[0]), expected)


def twice(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    return x * y + z


def through_float64(x: np.ndarray, y: np.ndarray, z: np.ndarray) -> np.ndarray:
    return (x.astype(DOUBLE) * y + z).astype(SINGLE)


@pytest.mark.parametrize("kind", [SINGLE, DOUBLE])
@pytest.mark.parametrize("case", ["spread", "cancelling", "near ties"])
def test_two_roundings_are_noticed(case: str, kind: type) -> None:
    with pytest.raises(AssertionError):
        assert_rounded_once(twice, CASES[case](kind))


def test_a_float32_rounded_by_way_of_float64_is_noticed() -> None:
    assert_rounded_once(through_float64, spread(SINGLE, 0, 4))  # one in 2^29 goes wrong
    with pytest.raises(AssertionError):
        assert_rounded_once(through_float64, near_ties(SINGLE))
