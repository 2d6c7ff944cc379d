"""The truncated normal distribution by PyTorch's two algorithms, on top of its other draws."""

import math
from statistics import NormalDist
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import DTypeLike

from flaxstab._typing import Shape
from flaxstab.torch_rng._arrays import Floats, held, wide

_ENOUGH = 0.3  # more than this inside the bounds: reject normals; else reject uniforms


class Source(Protocol):
    """What draws the numbers: the generator."""

    def uniform(
        self, shape: Shape, low: float = ..., high: float = ..., dtype: DTypeLike = ...
    ) -> np.ndarray:
        """Draws uniform numbers."""

    def normal(
        self, shape: Shape, mean: float = ..., std: float = ..., dtype: DTypeLike = ...
    ) -> np.ndarray:
        """Draws normal numbers."""


class Law(NamedTuple):
    """A normal distribution and the bounds to which it is cut."""

    mean: float
    std: float
    a: float
    b: float

    def below(self, x: float) -> float:
        """Returns the probability of a value below ``x``, before the cut."""
        return (1 + math.erf((x - self.mean) / self.std / math.sqrt(2))) / 2


def by_rejection(source: Source, shape: Shape, law: Law, kind: np.dtype) -> np.ndarray:
    """Draws whole arrays until every element has met one inside the bounds (PyTorch >= 2.12)."""
    draw = _normals if law.below(law.b) - law.below(law.a) > _ENOUGH else _uniforms
    return draw(source, shape, law, kind)


def _normals(source: Source, shape: Shape, law: Law, kind: np.dtype) -> np.ndarray:
    low, high = held(law.a, kind), held(law.b, kind)
    values = source.normal(shape, law.mean, law.std, kind)
    while (outside := (values < low) | (values > high)).any():
        values = np.where(outside, source.normal(shape, law.mean, law.std, kind), values)
    return values


def _uniforms(source: Source, shape: Shape, law: Law, kind: np.dtype) -> np.ndarray:
    values = np.zeros(shape, kind)
    pending = np.ones(shape, np.bool_)
    while pending.any():
        candidates = source.uniform(shape, law.a, law.b, kind)
        values = np.where(pending, candidates, values)
        pending &= _log(source.uniform(shape, dtype=kind)) > _log_density(candidates, law)
    return values


def _log(values: np.ndarray) -> Floats:
    """Returns the logarithm, rounded to the values' dtype."""
    with np.errstate(divide="ignore"):
        return _rounded(np.log(values.astype(np.float64)), values.dtype)


def _log_density(values: np.ndarray, law: Law) -> Floats:
    """Returns the logarithm of the density over its maximum, rounded as PyTorch's five steps."""
    kind = values.dtype
    scalar = wide(kind).type
    mode = max(law.a, min(law.mean, law.b))
    peak = -0.5 * ((mode - law.mean) / law.std) ** 2
    distance = _rounded(values.astype(scalar) - scalar(held(law.mean, kind)), kind)
    distance = _rounded(distance / scalar(law.std), kind)
    exponent = _rounded(_rounded(distance * distance, kind) * scalar(-0.5), kind)
    return _rounded(exponent - scalar(held(peak, kind)), kind)


def by_inverse(source: Source, shape: Shape, law: Law, kind: np.dtype) -> np.ndarray:
    """Draws each element once, by the inverse of the distribution function (PyTorch < 2.12)."""
    scalar = wide(kind).type
    low, high = (2 * law.below(bound) - 1 for bound in (law.a, law.b))
    quantiles = source.uniform(shape, low, high, kind).astype(np.float64)
    normals = _rounded(_erfinv(quantiles), kind)
    scaled = _rounded(normals * scalar(law.std * math.sqrt(2)), kind)
    shifted = _rounded(scaled + scalar(held(law.mean, kind)), kind)
    return np.clip(shifted, scalar(held(law.a, kind)), scalar(held(law.b, kind))).astype(kind)


def _erfinv(x: np.ndarray) -> np.ndarray:
    """Returns the inverse error function of float64 numbers in [-1, 1]."""
    quantile = NormalDist().inv_cdf  # M. Wichura, Applied Statistics 37(3), 1988 (AS 241)
    inside = np.abs(x) < 1
    values = np.copysign(np.inf, x)
    values[inside] = [quantile((1 + q) / 2) for q in x[inside].tolist()]
    return values / math.sqrt(2)


def _rounded(values: Floats, kind: np.dtype) -> Floats:
    """Returns values that ``kind`` can hold, in the dtype in which it is computed."""
    return values.astype(wide(kind)).astype(kind).astype(wide(kind))
