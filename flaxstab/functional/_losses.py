"""Losses and penalties with PyTorch's weighting and reduction rules."""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from flaxstab._checks import check
from flaxstab._dtypes import aligned, widest
from flaxstab._typing import Array, Float, Int

Reduction = Literal["mean", "sum", "none"]


def cross_entropy(
    logits: Float[Array, "*batch classes"],
    labels: Int[Array, "*batch"] | Float[Array, "*batch classes"],
    *,
    weight: Float[Array, " classes"] | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
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
      ignore_index: the integer label that contributes nothing.
      label_smoothing: weight of the uniform distribution, in [0, 1].
      reduction: ``'mean'``, ``'sum'`` or ``'none'``.

    Returns:
      A scalar, or shape ``(*batch,)`` for ``'none'``, in the dtype of the logits.

    Raises:
      ValueError: if an option or a shape does not fit, or a label is out of range while its
        value is known (a traced label out of range gives NaN).

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
    _check_options(label_smoothing, reduction, weight, classes)
    wide = widest(logits.dtype)
    log_p = jax.nn.log_softmax(jnp.asarray(logits, wide), axis=-1)
    class_weight = jnp.ones(classes, wide) if weight is None else jnp.asarray(weight, wide)
    if jnp.issubdtype(labels.dtype, jnp.floating):
        losses, total = _soft(log_p, jnp.asarray(labels, wide), class_weight, label_smoothing)
    else:
        losses, total = _hard(log_p, labels, class_weight, ignore_index, label_smoothing)
    if reduction == "none":
        result = losses
    else:
        result = jnp.sum(losses) if reduction == "sum" else jnp.sum(losses) / total
    return jnp.asarray(result, logits.dtype)


def _check_options(smoothing: float, reduction: str, weight: Array | None, classes: int) -> None:
    check(
        0.0 <= smoothing <= 1.0,
        "label_smoothing must lie in [0, 1]",
        label_smoothing=smoothing,
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
    log_p: Array, labels: Array, weight: Array, ignore_index: int, smoothing: float
) -> tuple[Array, Array]:
    """Returns the loss per sample and the divisor of the mean for integer labels."""
    check(
        labels.shape == log_p.shape[:-1],
        "integer labels must have the logits' shape without its last axis",
        labels_shape=labels.shape,
        logits_shape=log_p.shape,
    )
    classes = log_p.shape[-1]
    kept = labels != ignore_index
    in_range = (labels >= 0) & (labels < classes)
    if not isinstance(labels, jax.core.Tracer):
        known = np.asarray(labels)  # not in JAX, which would trace it under jit
        check(
            bool(np.all(((known >= 0) & (known < classes)) | (known == ignore_index))),
            "labels must lie in [0, classes) or equal ignore_index",
            classes=classes,
            ignore_index=ignore_index,
        )
    index = jnp.where(in_range, labels, 0)
    picked = jnp.take_along_axis(log_p, index[..., None], -1)[..., 0]
    own_weight = jnp.where(kept, weight[index], 0)
    losses = (1 - smoothing) * -picked * own_weight
    if smoothing > 0:  # 0 times the infinite log-probability of an impossible class is NaN
        smooth = -jnp.sum(log_p * aligned(weight, log_p, weight.dtype), -1) / classes
        losses = losses + smoothing * jnp.where(kept, smooth, 0)
    losses = jnp.where(kept & ~in_range, jnp.nan, jnp.where(kept, losses, 0))
    return losses, jnp.sum(own_weight)


def _soft(log_p: Array, target: Array, weight: Array, smoothing: float) -> tuple[Array, Array]:
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


def l1_penalty(*arrays: Float[Array, "..."]) -> Float[Array, ""]:
    """Returns the sum of absolute values of all elements, in float32 or wider.

    Args:
      *arrays: parameters of any shape.
    """
    wide = widest(*(a.dtype for a in arrays))
    terms = (jnp.sum(jnp.abs(jnp.asarray(a, wide))) for a in arrays)
    return sum(terms, jnp.zeros((), wide))


def l2_penalty(*arrays: Float[Array, "..."]) -> Float[Array, ""]:
    """Returns half the sum of squares of all elements, in float32 or wider.

    The half makes the gradient the parameter itself, so that ``decay * l2_penalty`` equals
    PyTorch's ``weight_decay=decay`` of ``SGD`` and ``Adam``.

    Args:
      *arrays: parameters of any shape.
    """
    wide = widest(*(a.dtype for a in arrays))
    terms = (jnp.sum(jnp.square(jnp.asarray(a, wide))) for a in arrays)
    return sum(terms, jnp.zeros((), wide)) / 2
