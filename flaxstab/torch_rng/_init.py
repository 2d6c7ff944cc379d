"""``torch.nn.init`` on top of the generator's uniforms and normals; shapes are PyTorch's."""

import math
from typing import Protocol

import numpy as np
from numpy.typing import DTypeLike

from flaxstab._checks import check, check_probability
from flaxstab._typing import Shape
from flaxstab.initializers import FanMode, Nonlinearity, calculate_gain, fan_in_and_fan_out
from flaxstab.torch_rng._arrays import dimensions, floating
from flaxstab.torch_rng._truncated import Source


class Shuffler(Source, Protocol):
    """What draws the numbers and permutations: the generator."""

    def randperm(self, n: int) -> np.ndarray:
        """Draws a permutation."""


def symmetric(source: Source, shape: Shape, std: float, dtype: DTypeLike) -> np.ndarray:
    """Draws from the uniform law around 0 of a standard deviation."""
    bound = math.sqrt(3.0) * std  # in PyTorch's order of rounding
    return source.uniform(shape, -bound, bound, dtype)


def xavier_std(shape: Shape, gain: float) -> float:
    """Returns the standard deviation of a weight's Xavier law."""
    fans = sum(_fans(shape))
    return gain * math.sqrt(2.0 / fans) if fans else 0.0


def kaiming_std(shape: Shape, a: float, mode: FanMode, nonlinearity: Nonlinearity) -> float:
    """Returns the standard deviation of a weight's Kaiming law."""
    known = mode.lower() in ("fan_in", "fan_out")
    check(known, "mode must be 'fan_in' or 'fan_out'", mode=mode)
    fan = _fans(shape)[mode.lower() == "fan_out"]
    gain = calculate_gain(nonlinearity, a)
    return gain / math.sqrt(fan) if fan else 0.0


def _fans(shape: Shape) -> tuple[int, int]:
    return fan_in_and_fan_out(dimensions(shape), in_axis=1, out_axis=0)


def orthogonal(source: Source, shape: Shape, gain: float, dtype: DTypeLike) -> np.ndarray:
    """Draws a matrix whose rows or columns, whichever are fewer, are orthonormal times ``gain``."""
    sizes, kind = dimensions(shape), floating(dtype)
    check(len(sizes) >= 2, "an orthogonal weight needs at least 2 axes", shape=shape)
    check(kind.itemsize > 2, "PyTorch draws orthogonal weights in float32 or float64", dtype=kind)
    if 0 in sizes:
        return np.zeros(sizes, kind)
    drawn = source.normal((sizes[0], math.prod(sizes[1:])), dtype=kind)
    wide = drawn.shape[0] < drawn.shape[1]
    q, r = np.linalg.qr(drawn.T if wide else drawn)
    q *= np.sign(np.diagonal(r))
    return (q.T if wide else q).reshape(sizes) * kind.type(gain)


def sparse(
    source: Shuffler, shape: Shape, sparsity: float, std: float, dtype: DTypeLike
) -> np.ndarray:
    """Draws a normal matrix with the same number of zeros in every column."""
    sizes = dimensions(shape)
    check(len(sizes) == 2, "a sparse weight is a matrix", shape=shape)
    check_probability(sparsity=sparsity)
    rows, columns = sizes
    zeros = math.ceil(sparsity * rows)
    values = source.normal(sizes, 0.0, std, dtype)
    for column in range(columns):
        values[source.randperm(rows)[:zeros], column] = 0
    return values
