"""Normalisation within each sample."""

import jax
import jax.numpy as jnp

from flaxstab._checks import check
from flaxstab._dtypes import widest
from flaxstab._typing import Array, DTypeLike, Float, Shape
from flaxstab.functional._moments import Sets, check_groups, moments
from flaxstab.functional._running import RunningStats
from flaxstab.functional._standardize import standardized


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
