"""Losses with PyTorch's weighting and reduction rules."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from flaxstab._checks import check, known
from flaxstab._dtypes import aligned, widest
from flaxstab._typing import Array, Float, Int

Reduction = Literal["mean", "sum", "none"]


def cross_entropy(
    logits: Float[Array, "*batch classes"],
    labels: Int[Array, "*batch"] | Float[Array, "*batch classes"],
    *,
    weight: Float[Array, " classes"] | None = None,
    ignore_index: int = -100,
    label_smoothing: float | Array = 0.0,
    reduction: Reduction = "mean",
) -> Float[Array, "*batch"]:
    """Computes the cross entropy between logits and class labels.

    Same result as ``torch.nn.functional.cross_entropy``, with classes on the last axis. With
    smoothing ``e`` the loss of one sample is ``(1 - e) * nll + e / C * sum(-log p)``. ``'mean'``
    divides by the sum of the labels' weights; ignored labels count neither there nor in the sum,
    and if all are ignored the mean is NaN. Computed in float32 or wider.

    Args:
      logits: unnormalised log-probabilities, shape ``(*batch, C)``.
      labels: integer classes in [0, C) or ``ignore_index``, shape ``(*batch,)``; or class
        probabilities, floating point, shape ``(*batch, C)``.
      weight: one factor per class, shape ``(C,)``.
      ignore_index: the integer label that contributes nothing; below 0 for class probabilities,
        which have none.
      label_smoothing: weight of the uniform distribution, in [0, 1]; may be traced.
      reduction: ``'mean'``, ``'sum'`` or ``'none'``.

    Returns:
      A scalar, or shape ``(*batch,)`` for ``'none'``, in the dtype of the logits.

    Raises:
      ValueError: if an option or a shape does not fit, or a label is out of range while its
        value is known. Under ``jit`` nothing can be raised: there such a label makes the loss
        and its gradient NaN.

    Example:
      >>> import jax.numpy as jnp
      >>> print(cross_entropy(jnp.zeros((2, 4)), jnp.array([1, 3])))
      1.3862944

    Differs from:
      ``optax.softmax_cross_entropy_with_integer_labels``, which reads label -1 as the last
      class, knows no weights and does not reduce.

    Reference:
      C. Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", 2015,
      arXiv:1512.00567 (section 7).
    """
    classes = logits.shape[-1]
    _check_options(label_smoothing, ignore_index, reduction, weight, classes)
    wide = widest(logits.dtype)
    log_p = jax.nn.log_softmax(jnp.asarray(logits, wide), axis=-1)
    class_weight = jnp.ones(classes, wide) if weight is None else jnp.asarray(weight, wide)
    plain = known(label_smoothing, "label_smoothing")
    smoothing = jnp.asarray(label_smoothing, wide) if plain is None else plain
    if jnp.issubdtype(labels.dtype, jnp.floating):
        ignored = known(ignore_index, "ignore_index")
        check(
            ignored is None or ignored < 0,
            "ignore_index must be below 0 with class probabilities, which it cannot find",
            ignore_index=ignore_index,
        )
        losses, total = _soft(log_p, jnp.asarray(labels, wide), class_weight, smoothing)
    else:
        losses, total = _hard(log_p, labels, class_weight, ignore_index, smoothing)
    if reduction == "none":
        result = losses
    else:
        result = jnp.sum(losses) if reduction == "sum" else jnp.sum(losses) / total
    return jnp.asarray(result, logits.dtype)


def _check_options(
    smoothing: float | Array,
    ignore_index: int,
    reduction: str,
    weight: Array | None,
    classes: int,
) -> None:
    part, ignored = known(smoothing, "label_smoothing"), known(ignore_index, "ignore_index")
    check(
        part is None or 0.0 <= part <= 1.0,
        "label_smoothing must lie in [0, 1]",
        label_smoothing=smoothing,
    )
    check(
        ignored is None or ignored.is_integer(),
        "ignore_index must be an integer",
        ignore_index=ignore_index,
    )
    check(
        reduction in ("mean", "sum", "none"),
        "reduction must be 'mean', 'sum' or 'none'",
        reduction=reduction,
    )
    check(
        weight is None or weight.shape == (classes,),
        "weight must hold one factor per class",
        weight_shape=None if weight is None else weight.shape,
        classes=classes,
    )


def _hard(
    log_p: Array, labels: Array, weight: Array, ignore_index: int, smoothing: float | Array
) -> tuple[Array, Array]:
    """Returns the loss per sample and the divisor of the mean for integer labels."""
    check(
        jnp.issubdtype(labels.dtype, jnp.integer),
        "labels must be integers or class probabilities",
        dtype=str(labels.dtype),
    )
    check(
        labels.shape == log_p.shape[:-1],
        "integer labels must have the logits' shape without its last axis",
        labels_shape=labels.shape,
        logits_shape=log_p.shape,
    )
    classes = log_p.shape[-1]
    # Known labels are compared in NumPy: JAX would trace the result under jit.
    plain = labels if isinstance(labels, jax.core.Tracer) else np.asarray(labels)
    kept, in_range = ~_equal(plain, ignore_index), _below(plain, classes)
    fits = in_range | ~kept
    check(
        isinstance(fits, jax.Array) or bool(np.all(fits)),
        "labels must lie in [0, classes) or equal ignore_index",
        classes=classes,
        ignore_index=ignore_index,
    )
    index = jnp.asarray(jnp.where(in_range, plain, 0), jnp.int32)
    # An ignored label looks at a class that may be impossible, and 0 times infinity is NaN.
    picked = jnp.where(kept, jnp.take_along_axis(log_p, index[..., None], -1)[..., 0], 0)
    own_weight = jnp.where(kept, jnp.where(in_range, weight[index], jnp.nan), 0)
    losses = (1 - smoothing) * -picked * own_weight
    if isinstance(smoothing, jax.Array) or smoothing > 0:  # not 0 times an impossible class, either
        smooth = -jnp.sum(log_p * aligned(weight, log_p, weight.dtype), -1) / classes
        losses = losses + jnp.where(kept & (smoothing > 0), smoothing * smooth, 0)
    return losses, jnp.sum(own_weight)


def _soft(
    log_p: Array, target: Array, weight: Array, smoothing: float | Array
) -> tuple[Array, Array]:
    """Returns the loss per sample and the divisor of the mean for class probabilities."""
    check(
        target.shape == log_p.shape,
        "class probabilities must have the logits' shape",
        labels_shape=target.shape,
        logits_shape=log_p.shape,
    )
    target = target * (1 - smoothing) + smoothing / log_p.shape[-1]
    losses = -jnp.sum(log_p * target * aligned(weight, log_p, weight.dtype), -1)
    return losses, jnp.asarray(losses.size, log_p.dtype)


def _equal(labels: Array | np.ndarray, index: int | Array) -> Array | np.ndarray:
    """Whether labels equal an integer, which their dtype need not hold: 156 is not -100."""
    plain = known(index)
    if plain is None:
        wide = jnp.promote_types(labels.dtype, jnp.result_type(index))
        return jnp.asarray(labels, wide) == jnp.asarray(index, wide)
    limits = jnp.iinfo(labels.dtype)
    if limits.min <= plain <= limits.max:
        return labels == labels.dtype.type(int(plain))
    return np.zeros(labels.shape, np.bool_)


def _below(labels: Array | np.ndarray, classes: int) -> Array | np.ndarray:
    """Whether labels lie in [0, classes)."""
    limit = min(classes - 1, int(jnp.iinfo(labels.dtype).max))
    return (labels >= 0) & (labels <= labels.dtype.type(limit))
