"""Laws that do not depend on the shape: constants, uniform, normal and truncated normal."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri

from flaxstab._checks import check
from flaxstab._typing import Array, DTypeLike, Initializer, Shape
from flaxstab.initializers._arguments import check_numbers, drawn_in

_FARTHEST = 11  # standard deviations: farther out float32 has too few numbers near probability 0

_quantile = jax.jit(ndtri)  # called step by step it would compile each of its sixty operations


def constant(value: float) -> Initializer:
    """Returns an initializer that fills with one value (``torch.nn.init.constant_``).

    Raises:
      ValueError: if ``value`` is not a number.

    Example:
      >>> constant(2.5)(jax.random.key(0), (2,))
      Array([2.5, 2.5], dtype=float32)
    """
    check_numbers("constant(0.0)", value=value)

    def init(key: Array, shape: Shape, dtype: DTypeLike = jnp.float32) -> Array:
        return jax.nn.initializers.constant(value)(key, shape, dtype)

    return init


def zeros(key: Array, shape: Shape, dtype: DTypeLike = jnp.float32) -> Array:
    """Fills with 0 (``torch.nn.init.zeros_``); itself an initializer."""
    return jax.nn.initializers.zeros(key, shape, dtype)


def ones(key: Array, shape: Shape, dtype: DTypeLike = jnp.float32) -> Array:
    """Fills with 1 (``torch.nn.init.ones_``); itself an initializer."""
    return jax.nn.initializers.ones(key, shape, dtype)


def uniform(a: float = 0.0, b: float = 1.0) -> Initializer:
    """Returns an initializer that draws from U(a, b) (``torch.nn.init.uniform_``).

    The 16-bit dtypes hold ``b`` and the draws rounded; as in PyTorch, what rounds up to ``b``
    becomes ``a``.

    Raises:
      ValueError: if a bound is not a finite number, or ``a`` is above ``b``; when called, if the
        dtype is no floating-point one or its range does not hold the bounds and their difference.

    Differs from:
      ``jax.nn.initializers.uniform(scale)``, which draws from U(0, scale), scale 0.01.
    """
    check_numbers("uniform()", a=a, b=b)
    check(math.isfinite(a) and math.isfinite(b), "a and b must be finite", a=a, b=b)
    check(a <= b, "a must not be above b", a=a, b=b)

    def init(key: Array, shape: Shape, dtype: DTypeLike = jnp.float32) -> Array:
        kind = drawn_in(dtype)
        limit = float(jnp.finfo(dtype).max)
        fits = max(abs(a), abs(b), b - a) <= limit
        check(fits, f"a, b and b - a must lie in [-{limit:.4g}, {limit:.4g}]", a=a, b=b)
        return below(jax.random.uniform(key, shape, kind, a, b), a, b, dtype)

    return init


def below(values: Array, low: float, high: float, dtype: DTypeLike) -> Array:
    """Returns draws from U(low, high) in a dtype: what rounds up to ``high`` becomes ``low``.

    PyTorch's rule, which keeps the bound out of the 16-bit dtypes; 0.2 % of bfloat16's draws from
    U(0, 1) round to 1. Wider dtypes are returned as they are.
    """
    target, kind = jnp.dtype(dtype), values.dtype
    if target.itemsize >= kind.itemsize:
        return jnp.asarray(values, target)
    lowest, highest = (np.asarray(np.asarray(x, kind), target) for x in (low, high))
    # Compared before rounding: XLA is free to leave out a rounding to 16 bits and back.
    first = (np.nextafter(highest, lowest).astype(kind) + highest.astype(kind)) / 2
    if first.astype(target) < highest:
        first = np.nextafter(first, highest.astype(kind))
    return jnp.where(values >= first, jnp.asarray(lowest, kind), values).astype(target)


def normal(mean: float = 0.0, std: float = 1.0) -> Initializer:
    """Returns an initializer that draws from N(mean, std²) (``torch.nn.init.normal_``).

    Raises:
      ValueError: if ``std`` is negative; when called, if the dtype is no floating-point one.

    Differs from:
      ``jax.nn.initializers.normal``, whose default standard deviation is 0.01, and which draws
      bfloat16 in bfloat16: 128 values, none above 2.9 standard deviations.
    """
    check_numbers("normal()", mean=mean, std=std)
    check(std >= 0, "std must not be negative", std=std)
    law = jax.nn.initializers.normal(std)

    def init(key: Array, shape: Shape, dtype: DTypeLike = jnp.float32) -> Array:
        return jnp.asarray(mean + law(key, shape, drawn_in(dtype)), dtype)

    return init


def trunc_normal(
    mean: float = 0.0, std: float = 1.0, a: float = -2.0, b: float = 2.0
) -> Initializer:
    """Returns an initializer that draws from N(mean, std²) cut to [a, b].

    Same law as ``torch.nn.init.trunc_normal_``: the bounds are values, not numbers of standard
    deviations, so that ``trunc_normal(std=0.02)`` cuts nothing; and ``std`` is the standard
    deviation before the cut.

    Args:
      mean: of the normal law.
      std: its standard deviation, positive.
      a: the smallest value; may be ``-math.inf``.
      b: the largest value; may be ``math.inf``.

    Raises:
      ValueError: if ``std`` is not positive, ``a`` is above ``b``, or both bounds lie more than 11
        standard deviations on one side of the mean.

    Example:
      >>> x = trunc_normal(std=0.02, a=-0.04, b=0.04)(jax.random.key(0), (1000,))
      >>> bool((abs(x) <= 0.04).all())
      True

    Differs from:
      ``jax.nn.initializers.truncated_normal(stddev, lower, upper)``, whose bounds are in standard
      deviations: there the same law is ``trunc_normal(0, stddev, lower * stddev, upper *
      stddev)``. It takes the lower bound itself for one float32 in 8 million, however far out that
      is. ``he_normal`` and its kin divide by 0.8796 to undo the loss of spread.
      PyTorch warns if the mean is more than 2 standard deviations outside the bounds.
    """
    check_numbers("trunc_normal()", mean=mean, std=std, a=a, b=b)
    check(std > 0, "std must be positive", std=std)
    check(a <= b, "a must not be above b", a=a, b=b)
    low, high = (a - mean) / std, (b - mean) / std
    # Probabilities near 0 are finer than those near 1: draw in the left tail and turn it round.
    side = -1 if low + high > 0 else 1
    left, right = (low, high) if side == 1 else (-high, -low)
    check(
        right >= -_FARTHEST,
        f"a or b must come within {_FARTHEST} standard deviations of the mean",
        mean=mean,
        std=std,
        a=a,
        b=b,
    )
    below_left, below_right = _below(left), _below(right)

    def init(key: Array, shape: Shape, dtype: DTypeLike = jnp.float32) -> Array:
        kind = drawn_in(dtype)
        # Probability 0 would be -inf, so one draw in 8 million the bound itself.
        smallest = below_right * float(jnp.finfo(kind).eps) / 4
        drawn = jax.random.uniform(key, shape, kind, max(below_left, smallest), below_right)
        values = mean + side * std * _quantile(drawn)
        return jnp.asarray(jnp.clip(values, a, b), dtype)

    return init


def _below(z: float) -> float:
    """Returns the probability of a standard normal value of at most ``z``."""
    return math.erfc(-z / math.sqrt(2)) / 2
