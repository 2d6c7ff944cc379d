"""Mean and variance that an offset cannot spoil, for every normalisation layer."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flaxstab._checks import check
from flaxstab._dtypes import widest
from flaxstab._typing import Array, AxisName, Shape


class Moments(NamedTuple):
    """Mean and biased variance along some axes, which stay as axes of size 1.

    The mean has two parts, because one float32 number near 1e4 is wrong by 5e-4: subtract
    ``shift`` first, then ``residual``. Never add them before subtracting.

    Attributes:
      shift: a value close to the mean, as rounded. No gradient flows through it.
      residual: the mean of ``x - shift``.
      var: the biased variance.
      size: how many values each entry was computed from.
    """

    shift: Array
    residual: Array
    var: Array
    size: int | Array

    @property
    def mean(self) -> Array:
        """The mean, rounded to the dtype of the parts."""
        return self.shift + self.residual

    def center(self, x: Array) -> Array:
        """Returns ``x`` minus the mean, in the dtype of the statistics."""
        return (jnp.asarray(x, self.var.dtype) - self.shift) - self.residual


def _two_pass(x: Array, average: Callable[[Array], Array], count: int | Array) -> Moments:
    # Differentiating through the shift would add terms that cancel: the centred value does not
    # depend on it (test_moments_have_the_exact_gradient).
    shift = jax.lax.stop_gradient(average(x))
    residual = average(x - shift)
    return Moments(shift, residual, average(jnp.square((x - shift) - residual)), count)


def moments(
    x: Array,
    axes: Shape,
    *,
    where: Array | None = None,
    axis_name: AxisName | None = None,
) -> Moments:
    """Computes mean and biased variance along ``axes`` by a corrected two-pass.

    Subtracts the mean, then the mean of what is left, so that data of standard deviation 1 is
    centred as well at mean 1e4 as at mean 0. Runs in float32 or wider.

    Args:
      x: values of any floating-point dtype, any shape.
      axes: the axes to reduce.
      where: booleans that broadcast to ``x``; only values where they are true count.
      axis_name: mapped axes (``vmap``, ``shard_map``) over which to combine the statistics,
        weighted by count, as if the batches had been concatenated.

    Returns:
      The moments, each of the shape of ``x`` with ``axes`` of size 1.

    Example:
      >>> import jax.numpy as jnp
      >>> moments(jnp.array([[1.0, 10.0], [3.0, 10.0]]), (0,)).mean.tolist()
      [[2.0, 10.0]]

    Reference:
      T. F. Chan, G. H. Golub, R. J. LeVeque, "Algorithms for Computing the Sample Variance:
      Analysis and Recommendations", The American Statistician, 1983 (equation 1.7 and 2.1).
    """
    x = jnp.asarray(x, widest(x.dtype))
    if where is None:
        count: int | Array = 1
        for axis in axes:
            count *= x.shape[axis]
        result = _two_pass(x, lambda v: jnp.mean(v, axes, keepdims=True), count)
    else:
        where = jnp.broadcast_to(where, x.shape)
        x = jnp.where(where, x, 0)  # what is left out may be NaN, and must not reach the gradient
        count = jnp.sum(where, axes, keepdims=True, dtype=x.dtype)
        divisor = jnp.maximum(count, 1)
        result = _two_pass(
            x, lambda v: jnp.sum(v, axes, keepdims=True, where=where) / divisor, count
        )
    return result if axis_name is None else _combine(result, axis_name)


def _combine(local: Moments, axis_name: AxisName) -> Moments:
    """Merges the moments of all devices (Chan's equation 2.1), weighted by their counts."""
    size, index = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    dtype, shape = local.var.dtype, local.var.shape
    own_count = jnp.broadcast_to(jnp.asarray(local.size, dtype), shape)
    # One sum over devices of (size, 4, ...), zero but for the own row, gathers all statistics and
    # leaves the result known to be equal everywhere, which shard_map requires of its outputs.
    own = jnp.stack([own_count, local.shift, local.residual, local.var])
    slots = jnp.zeros((size, *own.shape), dtype).at[index].set(own)
    counts, shifts, residuals, variances = jnp.moveaxis(jax.lax.psum(slots, axis_name), 1, 0)
    total = jnp.maximum(jnp.sum(counts, 0, keepdims=True), 1)
    # The mean of the first device that has values is close enough to all others to subtract.
    first = jnp.argmax(counts > 0, 0, keepdims=True)
    shift = jax.lax.stop_gradient(jnp.take_along_axis(shifts, first, 0))  # (1, ...)
    deltas = jnp.where(counts > 0, (shifts - shift) + residuals, 0)
    residual = jnp.sum(counts * deltas, 0, keepdims=True) / total
    spread = counts * (variances + jnp.square(deltas - residual))
    count = local.size * size if isinstance(local.size, int) else jnp.sum(counts, 0)
    return Moments(shift[0], residual[0], jnp.sum(spread, 0) / total[0], count)


def group_moments(x: Array, num_groups: int) -> Moments:
    """Computes each sample's moments over space and over equal groups of neighbouring channels.

    Args:
      x: features-last values, shape ``(N, *space, C)``.
      num_groups: how many groups the channels fall into. 1 gives layer normalisation over
        ``(*space, C)``, ``C`` instance normalisation.

    Returns:
      The moments, each of shape ``(N, *1, C)``: a group's values are repeated for its channels.

    Raises:
      ValueError: if the groups do not divide the channels.

    Example:
      >>> import jax.numpy as jnp
      >>> group_moments(jnp.array([[1.0, 3.0, 10.0, 20.0]]), 2).mean.tolist()
      [[2.0, 2.0, 15.0, 15.0]]
    """
    channels, space = x.shape[-1], tuple(range(1, x.ndim - 1))
    check(
        num_groups >= 1 and channels % num_groups == 0,
        "num_groups must divide the channels",
        num_groups=num_groups,
        channels=channels,
    )
    x = jnp.asarray(x, widest(x.dtype))

    def average(values: Array) -> Array:
        # Space first, per channel, then groups on the small result: splitting the channel axis
        # of the full array would make every reduction a strided one.
        per_channel = jnp.mean(values, space, keepdims=True)  # (N, *1, C)
        grouped = per_channel.reshape(*per_channel.shape[:-1], num_groups, channels // num_groups)
        repeated = jnp.broadcast_to(jnp.mean(grouped, -1, keepdims=True), grouped.shape)
        return repeated.reshape(per_channel.shape)

    count = channels // num_groups
    for axis in space:
        count *= x.shape[axis]
    return _two_pass(x, average, count)
