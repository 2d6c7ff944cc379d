"""Normalisation over the batch."""

import math

import jax
import jax.numpy as jnp

from flaxstab._checks import check, check_mask, check_positive
from flaxstab._dtypes import aligned, output_dtype, widest
from flaxstab._typing import Array, AxisName, Bool, DTypeLike, Float, Shape
from flaxstab.functional._moments import Moments, Sets, moments
from flaxstab.functional._recompute import remembered
from flaxstab.functional._running import RunningStats, follow, follow_each
from flaxstab.functional._standardize import normalize_by, standardized


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
    _check_more_than_one(found.size, x.shape)
    known = found._replace(shift=remembered(found.shift), residual=remembered(found.residual),
                           var=remembered(found.var))  # fmt: skip
    if axis_name is None:
        y = standardized(x, scale, bias, sets, found=known, eps=eps, where=mask, dtype=dtype)
    else:
        y = normalize_by(x, known, scale, bias, eps=eps, where=mask, dtype=dtype)
    found = jax.lax.stop_gradient(found)
    return y, None if running is None else follow(running, found, momentum)


def ghost_batch_norm(
    x: Float[Array, "n *space c"],
    virtual_batch_size: int,
    scale: Float[Array, " c"] | None = None,
    bias: Float[Array, " c"] | None = None,
    running: RunningStats | None = None,
    *,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
    dtype: DTypeLike | None = None,
) -> tuple[Float[Array, "n *space c"], RunningStats | None]:
    """Normalises a batch as several smaller ones, one after the other.

    :func:`batch_norm` of each of ``torch.chunk(x, ceil(N / virtual_batch_size))``: all chunks have
    the same size but the last, which may be smaller.

    Args:
      x: features-last values, shape ``(N, *space, C)``.
      virtual_batch_size: the largest chunk, in samples.
      scale: shape ``(C,)``.
      bias: shape ``(C,)``.
      running: statistics to update once per chunk, in order, or ``None`` to keep none.
      momentum: weight of the new value; ``None`` averages over all chunks.
      eps: added to the variance.
      dtype: the output's dtype; ``None`` keeps that of ``x``.

    Returns:
      The normalised values, and the updated statistics or ``None``.

    Raises:
      ValueError: if a chunk has only one value per channel.

    Reference:
      E. Hoffer, I. Hubara, D. Soudry, "Train Longer, Generalize Better", 2017,
      arXiv:1705.08741 (algorithm 1).
    """
    check_positive(virtual_batch_size=virtual_batch_size)
    samples = x.shape[0]
    size = math.ceil(samples / max(math.ceil(samples / virtual_batch_size), 1))
    equal = samples - samples % max(size, 1)
    if x.size == 0:
        chunks = math.ceil(samples / size) if samples else 1
        counted = None if running is None else running._replace(batches=running.batches + chunks)
        return jnp.asarray(x, output_dtype(x, dtype)), counted
    if equal > size:
        y, running = _equal_chunks(x[:equal], size, scale, bias, running, momentum, eps, dtype)
    else:
        y, running = batch_norm(
            x[:equal], scale, bias, running, momentum=momentum, eps=eps, dtype=dtype
        )
    if equal == samples:
        return y, running
    last, running = batch_norm(
        x[equal:], scale, bias, running, momentum=momentum, eps=eps, dtype=dtype
    )
    return jnp.concatenate([y, last]), running


def _equal_chunks(
    x: Array,
    size: int,
    scale: Array | None,
    bias: Array | None,
    running: RunningStats | None,
    momentum: float | None,
    eps: float,
    dtype: DTypeLike | None,
) -> tuple[Array, RunningStats | None]:
    """Normalises chunks of one size all at once, along one more axis."""
    chunks = x.reshape(-1, size, *x.shape[1:])  # (N, *space, C) -> (N/size, size, *space, C)
    sets = Sets(tuple(range(1, chunks.ndim - 1)))
    _check_more_than_one(sets.size(chunks.shape), chunks.shape[1:])
    y = standardized(chunks, scale, bias, sets, eps=eps, dtype=dtype).reshape(x.shape)
    if running is None:
        return y, None
    return y, follow_each(running, moments(jax.lax.stop_gradient(chunks), sets.axes), momentum)


def _check_more_than_one(size: int | Array, shape: Shape) -> None:
    """Raises a ``ValueError`` for a batch of one value per channel."""
    check(
        not (isinstance(size, int) and size < 2),
        "batch normalisation needs more than 1 value per channel in training",
        fix="Use a larger batch, or use_running_average=True.",
        shape=shape,
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
