"""Gradient clipping with PyTorch's formula."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from flaxstab._checks import check
from flaxstab._dtypes import widest
from flaxstab._typing import Array
from flaxstab.optim._hypers import check_bound
from flaxstab.optim._paths import check_leaves


class ClipState(NamedTuple):
    """What clipping saw in the last step.

    Attributes:
      norm: the gradients' total norm before clipping.
      nonfinite: whether that norm was infinite or NaN.
    """

    norm: Array
    nonfinite: Array


def clip_grad_norm(
    max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
) -> optax.GradientTransformation:
    """Returns a transformation that scales all gradients so that their total norm is bounded.

    Same result as ``torch.nn.utils.clip_grad_norm_``: the factor is
    ``min(1, max_norm / (norm + 1e-6))``, and the norm, that of the tensors' norms, is computed in
    float32 or wider. A gradient of ``None`` does not count and stays ``None``.

    Args:
      max_norm: the largest norm left, at least 0; may be traced.
      norm_type: the order of the norm, any number: ``math.inf`` for the largest absolute value,
        ``-math.inf`` for the smallest; of order 0 it counts the tensors that are not all 0.
      error_if_nonfinite: whether to raise if the norm is infinite or NaN. Under ``jit`` nothing
        can be raised: read ``state.nonfinite``.

    Returns:
      An optax transformation whose state holds the last norm, for logging.

    Raises:
      ValueError: if an argument is out of range, or for a norm as said.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = clip_grad_norm(1.0)
      >>> gradients = {"kernel": jnp.array([3.0, 4.0])}
      >>> clipped, state = tx.update(gradients, tx.init(gradients))
      >>> float(state.norm), clipped["kernel"].round(3).tolist()
      (5.0, [0.6000000238418579, 0.800000011920929])

    Differs from:
      ``optax.clip_by_global_norm``, which has no 1e-6 and squares in the gradients' own dtype:
      finite float16 gradients of norm 500 become zero.

    Reference:
      R. Pascanu, T. Mikolov, Y. Bengio, "On the Difficulty of Training Recurrent Neural
      Networks", 2012, arXiv:1211.5063 (algorithm 1).
    """
    check_bound("max_norm", max_norm)
    check(
        not isinstance(norm_type, jax.core.Tracer),
        "norm_type must be a plain number, not a traced one",
        fix="With optax.inject_hyperparams name it in static_args=('norm_type',).",
        norm_type=norm_type,
    )
    check(not math.isnan(norm_type), "norm_type must be a number", norm_type=norm_type)

    def init(params: optax.Params) -> ClipState:
        dtype = widest(*(leaf.dtype for leaf in jax.tree.leaves(params)))
        return ClipState(jnp.zeros((), dtype), jnp.zeros((), jnp.bool_))

    def update(
        updates: optax.Updates, state: ClipState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ClipState]:
        del params
        check_leaves(_is_real, "gradients must be real", updates)
        norm = jnp.asarray(_total_norm(updates, norm_type), state.norm.dtype)
        nonfinite = ~jnp.isfinite(norm)
        if error_if_nonfinite and not isinstance(norm, jax.core.Tracer):
            check(not bool(nonfinite), "the gradients' total norm must be finite", norm=float(norm))
        factor = jnp.minimum(max_norm / (norm + 1e-6), 1)

        def scale(leaf: Array) -> Array:
            wide = widest(leaf.dtype)
            return jnp.asarray(jnp.asarray(leaf, wide) * jnp.asarray(factor, wide), leaf.dtype)

        return jax.tree.map(scale, updates), ClipState(norm, nonfinite)

    return optax.GradientTransformation(init, update)


def _is_real(leaf: Array) -> bool:
    return not jnp.issubdtype(leaf.dtype, jnp.complexfloating)


def _total_norm(tree: optax.Updates, order: float) -> Array:
    """Returns the norm of the norms of all leaves, in float32 or wider."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if leaf.size]
    if not leaves:
        return jnp.zeros(())
    wide = widest(*(leaf.dtype for leaf in leaves))
    norms = [_norm(jnp.abs(jnp.asarray(leaf, wide)), order) for leaf in leaves]
    return _norm(jnp.stack(norms), order)


def _norm(sizes: Array, order: float) -> Array:
    """Returns the norm of non-negative numbers, at least one of them."""
    if math.isinf(order):
        return jnp.max(sizes) if order > 0 else jnp.min(sizes)
    if order == 0:
        return jnp.sum(jnp.asarray(sizes != 0, sizes.dtype))
    if order == 2:
        return jnp.sqrt(jnp.sum(jnp.square(sizes)))
    return jnp.sum(sizes**order) ** (1 / order)


def clip_grad_value(clip_value: float) -> optax.GradientTransformation:
    """Returns a transformation that clips every element of every gradient.

    Same result as ``torch.nn.utils.clip_grad_value_``; NaN stays NaN, ``None`` stays ``None``.

    Args:
      clip_value: the largest absolute value left, at least 0; may be traced. It is rounded to each
        gradient's dtype.

    Raises:
      ValueError: if it is negative or NaN while it is known.

    Example:
      >>> import jax.numpy as jnp
      >>> tx = clip_grad_value(1.0)
      >>> tx.update({"kernel": jnp.array([-3.0, 0.5])}, tx.init({}))[0]["kernel"].tolist()
      [-1.0, 0.5]

    Differs from:
      ``optax.clip``, which widens 16-bit gradients if the bound is a float32 array.
    """
    check_bound("clip_value", clip_value)

    def update(
        updates: optax.Updates, state: optax.EmptyState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del params
        check_leaves(_is_real, "gradients must be real", updates)

        def clip(leaf: Array) -> Array:
            bound = jnp.asarray(clip_value, leaf.dtype)
            return jnp.clip(leaf, -bound, bound)

        return jax.tree.map(clip, updates), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)
