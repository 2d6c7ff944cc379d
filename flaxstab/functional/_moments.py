"""Mean and variance that an offset cannot spoil, for every normalisation layer."""

import dataclasses
import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from flaxstab._checks import check
from flaxstab._dtypes import widest
from flaxstab._typing import Array, AxisName, Shape
from flaxstab.functional._recompute import recomputed, remembered


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


@dataclasses.dataclass(frozen=True)
class Sets:
    """Which values of an array share a mean and a variance.

    Attributes:
      axes: the axes over which a set extends.
      groups: into how many groups of neighbouring channels the last axis falls as well; ``None``
        keeps channels apart, unless ``axes`` has the last axis.
      centered: whether normalisation subtracts the set's mean.
    """

    axes: Shape
    groups: int | None = None
    centered: bool = True

    def sums(self, *values: Array, where: Array | None = None) -> tuple[Array, ...]:
        """Adds up each set of several arrays of one shape.

        Returns:
          One sum per array, with ``axes`` of size 1 and each group's sum repeated for its channels.
        """
        found = tuple(jnp.sum(v, self.axes, keepdims=True, where=where) for v in values)
        if self.groups is not None:
            found = tuple(_over_groups(v, self.groups) for v in found)
        return found

    def along_features(self, ndim: int) -> bool:
        """Whether the axes include the last one, along which scale and bias vary."""
        return ndim - 1 in self.axes

    def size(self, shape: Shape) -> int:
        """Returns how many values a set has."""
        within = math.prod(shape[axis] for axis in self.axes)
        return within if self.groups is None else within * (shape[-1] // self.groups)


def _over_groups(sums: Array, groups: int) -> Array:
    # Space first, per channel, then groups on the small result: splitting the channel axis of the
    # full array would make every reduction a strided one.
    grouped = sums.reshape(*sums.shape[:-1], groups, sums.shape[-1] // groups)
    repeated = jnp.broadcast_to(jnp.sum(grouped, -1, keepdims=True), grouped.shape)
    return repeated.reshape(sums.shape)


def local_moments(x: Array, sets: Sets, where: Array | None = None) -> Moments:
    """Computes the moments of one device's sets, in float32 or wider.

    Args:
      x: values of any floating-point dtype.
      sets: which of them belong together.
      where: booleans that broadcast to ``x``; only values where they are true count.

    Returns:
      The moments; the mean square about 0 in the variance's place unless ``sets.centered``.
    """
    shift, residual, var, count = _two_passes(x, where, sets=sets)
    return Moments(shift, residual, var, sets.size(x.shape) if count is None else count)


@partial(jax.jit, static_argnames="sets", inline=True)
def _two_passes(
    x: Array, where: Array | None, *, sets: Sets
) -> tuple[Array, Array, Array, Array | None]:
    return recomputed(partial(_passes, sets))(x, where)


def _passes(sets: Sets, x: Array, where: Array | None) -> tuple[Array, Array, Array, Array | None]:
    """Computes the mean, then mean and mean square of what is left after subtracting it.

    The second pass corrects the first mean's rounding. What remains of it is so small that its
    square leaves the variance its digits, which the square of the mean itself would not.
    """
    x = jnp.asarray(x, widest(x.dtype))
    size, count = jnp.asarray(max(sets.size(x.shape), 1), x.dtype), None
    if where is not None:
        where = jnp.broadcast_to(where, x.shape)
        x = jnp.where(where, x, 0)  # what is left out may be NaN, and must not reach the gradient
        (count,) = sets.sums(jnp.asarray(where, x.dtype))
        size = jnp.maximum(count, 1)
    if not sets.centered:
        zero = jnp.zeros((), x.dtype)
        return zero, zero, sets.sums(jnp.square(x), where=where)[0] / size, count
    # Differentiating through the shift would add terms that cancel: the centred value does not
    # depend on it (test_moments_have_the_exact_gradient).
    shift = jax.lax.stop_gradient(sets.sums(x, where=where)[0] / size)
    rest = x - shift
    total, squares = sets.sums(rest, jnp.square(rest), where=where)
    residual, square = total / size, squares / size
    var = jnp.maximum(square - jnp.minimum(jnp.square(residual), jnp.finfo(x.dtype).max), 0)
    return shift, residual, var, count


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
    result = local_moments(x, Sets(tuple(axes)), where)
    return result if axis_name is None else _combine(result, axis_name)


def _combine(local: Moments, axis_name: AxisName) -> Moments:
    """Merges the moments of all devices (Chan's equation 2.1), weighted by their counts."""
    try:
        size, index = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)
    except NameError as unbound:
        raise ValueError(
            f"axis_name must be an axis that vmap or shard_map maps, got axis_name={axis_name!r} "
            "outside of it. Call the layer inside; under plain jit on a sharded batch statistics "
            "are global without axis_name."
        ) from unbound
    dtype, shape = local.var.dtype, local.var.shape
    own_count = jnp.broadcast_to(jnp.asarray(local.size, dtype), shape)
    # One sum over devices of (size, 4, ...), zero but for the own row, gathers all statistics and
    # leaves the result known to be equal everywhere, which shard_map requires of its outputs.
    own = jnp.stack([own_count, local.shift, local.residual, local.var])
    slots = jnp.zeros((size, *own.shape), dtype).at[index].set(own)
    gathered = remembered(jax.lax.psum(slots, axis_name))
    counts, shifts, residuals, variances = jnp.moveaxis(gathered, 1, 0)
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
    check_groups(num_groups, x.shape[-1])
    return local_moments(x, Sets(tuple(range(1, x.ndim - 1)), num_groups))


def check_groups(num_groups: int, channels: int) -> None:
    """Raises a ``ValueError`` unless the groups divide the channels."""
    check(
        num_groups >= 1 and channels % num_groups == 0,
        "num_groups must divide the channels",
        num_groups=num_groups,
        channels=channels,
    )
