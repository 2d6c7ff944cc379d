"""Normalisation: centre, divide by the standard deviation, scale and shift."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from flaxstab._checks import check, check_mask
from flaxstab._dtypes import aligned, output_dtype, widest
from flaxstab._typing import Array, AxisName, Bool, DTypeLike, Float, Int, Shape
from flaxstab.functional._moments import Moments, Sets, check_groups, moments
from flaxstab.functional._recompute import remembered
from flaxstab.functional._standardize import normalize_by, standardized


class RunningStats(NamedTuple):
    """What batch and instance normalisation remember for evaluation.

    Attributes:
      mean: running mean, shape ``(C,)``.
      var: running *unbiased* variance, shape ``(C,)``.
      batches: how many batches have been seen, an integer scalar.
    """

    mean: Float[Array, " c"]
    var: Float[Array, " c"]
    batches: Int[Array, ""]

    def update(self, mean: Array, unbiased_var: Array, momentum: float | None) -> "RunningStats":
        """Moves the statistics towards a new batch's, as ``torch.nn.BatchNorm2d`` does.

        Args:
          mean: the batch's mean, shape ``(C,)``.
          unbiased_var: the batch's unbiased variance, shape ``(C,)``.
          momentum: weight of the new value; ``None`` averages over all batches so far.

        Returns:
          New statistics in the old ones' dtypes. Channels where ``mean`` or ``unbiased_var`` is
          undefined are the caller's business.
        """
        batches = self.batches + 1
        dtype = widest(self.mean.dtype, mean.dtype)
        weight = (
            1 / jnp.asarray(batches, dtype) if momentum is None else jnp.asarray(momentum, dtype)
        )

        def step(old: Array, new: Array) -> Array:
            blend = (1 - weight) * jnp.asarray(old, dtype) + weight * jnp.asarray(new, dtype)
            return jnp.asarray(blend, old.dtype)

        return RunningStats(step(self.mean, mean), step(self.var, unbiased_var), batches)


def batch_norm(
    x: Float[Array, "n *space c"],
    scale: Float[Array, " c"] | None = None,
    bias: Float[Array, " c"] | None = None,
    running: RunningStats | None = None,
    *,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    mask: Bool[Array, "..."] | None = None,
    axis_name: AxisName | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[Float[Array, "n *space c"], RunningStats | None]:
    """Normalises every channel by the batch's own statistics and updates the running ones.

    Same result as ``torch.nn.functional.batch_norm(training=True)``: the output uses the biased
    variance, the running variance the unbiased one.

    Args:
      x: features-last values, shape ``(N, *space, C)``.
      scale: shape ``(C,)``.
      bias: shape ``(C,)``.
      running: statistics to update, or ``None`` to keep none.
      momentum: weight of the new value; ``None`` averages over all batches.
      eps: added to the variance.
      mask: booleans with as many axes as ``x``, each of its size or 1; statistics come from
        values where it is true. The others are normalised by them, too, and no gradient flows
        through them (they may be NaN). A channel with fewer than two values keeps its running
        statistics.
      axis_name: mapped axes over which the statistics are those of the whole batch.
      dtype: the output's dtype; ``None`` keeps that of ``x``.

    Returns:
      The normalised values, and the updated statistics or ``None``. An empty batch comes back
      as it is; it adds 1 to the count and leaves the statistics.

    Raises:
      ValueError: if there is only one value per channel.

    Reference:
      S. Ioffe, C. Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing
      Internal Covariate Shift", 2015, arXiv:1502.03167 (algorithm 1).
    """
    if x.size == 0:
        same = None if running is None else running._replace(batches=running.batches + 1)
        return jnp.asarray(x, output_dtype(x, dtype)), same
    if mask is not None:
        check_mask(mask, x.shape)
    sets = Sets(tuple(range(x.ndim - 1)))
    # An exchange between devices must stay outside of a custom derivative: JAX forgets the axis
    # that vmap mapped when it differentiates what jit has traced (docs/upstream.md).
    source = jax.lax.stop_gradient(x) if axis_name is None else x
    found = moments(source, sets.axes, where=mask, axis_name=axis_name)
    check(
        not (isinstance(found.size, int) and found.size < 2),
        "batch normalisation needs more than 1 value per channel in training",
        fix="Use a larger batch, or use_running_average=True.",
        shape=x.shape,
    )
    known = found._replace(shift=remembered(found.shift), residual=remembered(found.residual),
                           var=remembered(found.var))  # fmt: skip
    if axis_name is None:
        y = standardized(x, scale, bias, sets, found=known, eps=eps, where=mask, dtype=dtype)
    else:
        y = normalize_by(x, known, scale, bias, eps=eps, where=mask, dtype=dtype)
    found = jax.lax.stop_gradient(found)
    return y, None if running is None else _follow(running, found, momentum)


def _follow(running: RunningStats, found: Moments, momentum: float | None) -> RunningStats:
    """Updates running statistics, except in channels with fewer than two values."""
    channels = running.mean.shape
    wide = found.var.dtype
    count = jnp.broadcast_to(jnp.asarray(found.size, wide), found.var.shape).reshape(channels)
    unbiased = found.var.reshape(channels) * (count / jnp.maximum(count - 1, 1))
    new = running.update(found.mean.reshape(channels), unbiased, momentum)
    enough = count >= 2
    return RunningStats(
        jnp.where(enough, new.mean, running.mean),
        jnp.where(enough, new.var, running.var),
        new.batches,
    )


def batch_norm_inference(
    x: Float[Array, "n *space c"],
    running: RunningStats,
    scale: Float[Array, " c"] | None = None,
    bias: Float[Array, " c"] | None = None,
    *,
    eps: float = 1e-5,
    dtype: DTypeLike | None = None,
) -> Float[Array, "n *space c"]:
    """Normalises every channel by running statistics, which stay as they are.

    Same result as ``torch.nn.functional.batch_norm(training=False)``. The statistics are never
    cast down: with bfloat16 input they enter in their own dtype.

    Args:
      x: features-last values, shape ``(N, *space, C)``.
      running: statistics of shape ``(C,)``.
      scale: shape ``(C,)``.
      bias: shape ``(C,)``.
      eps: added to the variance.
      dtype: the output's dtype; ``None`` keeps that of ``x``.

    Returns:
      The normalised values, of the shape of ``x``.
    """
    wide = widest(x.dtype, running.mean.dtype)
    mean, var = aligned(running.mean, x, wide), aligned(running.var, x, wide)
    fixed = Moments(mean, jnp.zeros((), wide), var, 1)
    return normalize_by(x, fixed, scale, bias, eps=eps, dtype=dtype)


def layer_norm(
    x: Float[Array, "*batch_and_features"],
    normalized_shape: Shape,
    scale: Float[Array, "*features"] | None = None,
    bias: Float[Array, "*features"] | None = None,
    *,
    eps: float = 1e-5,
    dtype: DTypeLike | None = None,
) -> Float[Array, "*batch_and_features"]:
    """Normalises each sample over its trailing axes.

    Same result as ``torch.nn.functional.layer_norm``.

    Args:
      x: values, shape ``(*batch, *normalized_shape)``.
      normalized_shape: the trailing axes to normalise over.
      scale: shape ``normalized_shape``.
      bias: shape ``normalized_shape``.
      eps: added to the variance.
      dtype: the output's dtype; ``None`` keeps that of ``x``.

    Returns:
      The normalised values, of the shape of ``x``.

    Raises:
      ValueError: if the input does not end in ``normalized_shape``.

    Reference:
      J. L. Ba, J. R. Kiros, G. E. Hinton, "Layer Normalization", 2016, arXiv:1607.06450.
    """
    sets = Sets(_trailing(x, normalized_shape))
    return standardized(x, scale, bias, sets, eps=eps, dtype=dtype)


def _trailing(x: Array, normalized_shape: Shape) -> Shape:
    """Returns the axes of ``normalized_shape``, in which the input's shape must end."""
    rank = len(normalized_shape)
    check(
        x.shape[x.ndim - rank :] == tuple(normalized_shape) and x.ndim >= rank,
        "the input's last axes must be normalized_shape",
        fix="Arrays are features-last here: (N, ..., C).",
        normalized_shape=normalized_shape,
        shape=x.shape,
    )
    return tuple(range(x.ndim - rank, x.ndim))


def rms_norm(
    x: Float[Array, "*batch_and_features"],
    normalized_shape: Shape,
    scale: Float[Array, "*features"] | None = None,
    *,
    eps: float | None = None,
    dtype: DTypeLike | None = None,
) -> Float[Array, "*batch_and_features"]:
    """Divides each sample by the root of the mean square over its trailing axes.

    Same result as ``torch.nn.functional.rms_norm``.

    Args:
      x: values, shape ``(*batch, *normalized_shape)``.
      normalized_shape: the trailing axes to normalise over.
      scale: shape ``normalized_shape``.
      eps: added to the mean square; ``None`` = the machine epsilon of the dtype of computation,
        float32 or wider: 1.2e-7 for float32 and, unlike what torch's documentation says but as
        torch computes, for 16-bit input; 2.2e-16 for float64.
      dtype: the output's dtype; ``None`` keeps that of ``x``.

    Returns:
      The normalised values, of the shape of ``x``.

    Raises:
      ValueError: if the input does not end in ``normalized_shape``.

    Reference:
      B. Zhang, R. Sennrich, "Root Mean Square Layer Normalization", 2019, arXiv:1910.07467.
    """
    sets = Sets(_trailing(x, normalized_shape), centered=False)
    small = float(jnp.finfo(widest(x.dtype)).eps) if eps is None else eps
    return standardized(x, scale, None, sets, eps=small, dtype=dtype)


def group_norm(
    x: Float[Array, "n *space c"],
    num_groups: int,
    scale: Float[Array, " c"] | None = None,
    bias: Float[Array, " c"] | None = None,
    *,
    eps: float = 1e-5,
    dtype: DTypeLike | None = None,
) -> Float[Array, "n *space c"]:
    """Normalises each sample over space and groups of neighbouring channels.

    Same result as ``torch.nn.functional.group_norm``.

    Args:
      x: features-last values, shape ``(N, *space, C)``.
      num_groups: how many groups the channels fall into. One group is layer normalisation over
        ``(*space, C)``; ``C`` groups are instance normalisation.
      scale: shape ``(C,)``.
      bias: shape ``(C,)``.
      eps: added to the variance.
      dtype: the output's dtype; ``None`` keeps that of ``x``.

    Returns:
      The normalised values, of the shape of ``x``.

    Raises:
      ValueError: if the groups do not divide the channels, or the input holds one value per
        group and one sample.

    Reference:
      Y. Wu, K. He, "Group Normalization", 2018, arXiv:1803.08494.
    """
    check_groups(num_groups, x.shape[-1])
    sets = Sets(tuple(range(1, x.ndim - 1)), num_groups)
    check(
        x.size == 0 or x.shape[0] * sets.size(x.shape) > 1,
        "group normalisation needs more than 1 value per group",
        fix="Use fewer groups or a larger input.",
        num_groups=num_groups,
        shape=x.shape,
    )
    return standardized(x, scale, bias, sets, eps=eps, dtype=dtype)


def instance_norm(
    x: Float[Array, "n *space c"],
    scale: Float[Array, " c"] | None = None,
    bias: Float[Array, " c"] | None = None,
    running: RunningStats | None = None,
    *,
    momentum: float = 0.1,
    eps: float = 1e-5,
    dtype: DTypeLike | None = None,
) -> tuple[Float[Array, "n *space c"], RunningStats | None]:
    """Normalises each channel of each sample over space and updates running statistics.

    Same result as ``torch.nn.functional.instance_norm(use_input_stats=True)``: the running mean
    and variance move towards the samples' averages of mean and unbiased variance.

    Args:
      x: features-last values, shape ``(N, *space, C)``.
      scale: shape ``(C,)``.
      bias: shape ``(C,)``.
      running: statistics to update, or ``None`` to keep none.
      momentum: weight of the new value.
      eps: added to the variance.
      dtype: the output's dtype; ``None`` keeps that of ``x``.

    Returns:
      The normalised values, and the updated statistics or ``None``.

    Raises:
      ValueError: if there is only one value per channel and sample.

    Reference:
      D. Ulyanov, A. Vedaldi, V. Lempitsky, "Instance Normalization: The Missing Ingredient for
      Fast Stylization", 2016, arXiv:1607.08022.
    """
    sets = Sets(tuple(range(1, x.ndim - 1)))
    size = sets.size(x.shape)
    check(
        x.size == 0 or size > 1,
        "instance normalisation needs more than 1 spatial element in training",
        fix="Use a larger input, or another norm.",
        shape=x.shape,
    )
    y = standardized(x, scale, bias, sets, eps=eps, dtype=dtype)
    if running is None or x.size == 0:
        return y, running
    found, channels = moments(jax.lax.stop_gradient(x), sets.axes), running.mean.shape
    mean = jnp.mean(found.mean, 0).reshape(channels)
    unbiased = jnp.mean(found.var, 0).reshape(channels) * (size / (size - 1))
    # torch's InstanceNorm owns a num_batches_tracked but never counts.
    return y, running.update(mean, unbiased, momentum)._replace(batches=running.batches)
