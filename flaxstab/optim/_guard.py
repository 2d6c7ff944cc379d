"""Steps whose gradients are not finite are not taken."""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax

from flaxstab._checks import known
from flaxstab._typing import Array

_Stepped: TypeAlias = tuple[optax.Updates, optax.OptState]


def skip_nonfinite(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer that leaves out every step in whose gradients something is not finite.

    Same result as calling ``optimizer.step()`` in torch only if all gradients are finite, as
    ``torch.amp.GradScaler`` does: such a step moves neither the parameters nor anything in the
    optimizer's state, its step count and schedule included. It is counted. Wrap the whole chain:
    clipping turns one infinite gradient into NaN everywhere. Only :func:`freeze` belongs outside,
    ``freeze(skip_nonfinite(tx), mask)``: inside, gradients of frozen parameters are looked at too.

    Running statistics are no part of the optimizer. A batch that holds NaN reaches them in the
    forward pass; see ``docs/training.md``.

    Args:
      inner: the optimizer.

    Returns:
      An optax transformation whose state is optax's ``ApplyIfFiniteState``: ``total_notfinite``
      steps were left out so far, the last ``notfinite_count`` of them in a row; ``last_finite``;
      and ``inner_state``.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> tx = skip_nonfinite(optax.sgd(0.1))
      >>> params = {"kernel": jnp.ones(2)}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"kernel": jnp.array([1.0, jnp.nan])}, state, params)
      >>> updates["kernel"].tolist(), int(state.total_notfinite)
      ([0.0, 0.0], 1)

    Differs from:
      ``optax.apply_if_finite``, which after ``max_consecutive_errors`` takes the step all the
      same, and refuses an optimizer whose updates have another dtype than the gradients, such as
      AdamW on bfloat16 gradients of float32 parameters.
    """
    inner = optax.with_extra_args_support(inner)

    def init(params: optax.Params) -> optax.ApplyIfFiniteState:
        zero = jnp.zeros((), jnp.int32)
        return optax.ApplyIfFiniteState(zero, jnp.asarray(True), zero, inner.init(params))

    def update(
        updates: optax.Updates,
        state: optax.ApplyIfFiniteState,
        params: optax.Params | None = None,
        **extra: object,
    ) -> tuple[optax.Updates, optax.ApplyIfFiniteState]:
        def take() -> _Stepped:
            return inner.update(updates, state.inner_state, params, **extra)

        def skip() -> _Stepped:
            like, _ = jax.eval_shape(take)
            zeros = jax.tree.map(lambda u: jnp.zeros(u.shape, u.dtype), like)
            return zeros, state.inner_state

        finite = _all_finite(updates)
        stepped, inner_state = _either(finite, take, skip)
        skipped = jnp.asarray(~finite, jnp.int32)
        in_a_row = (state.notfinite_count + 1) * skipped
        total = state.total_notfinite + skipped
        return stepped, optax.ApplyIfFiniteState(in_a_row, finite, total, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _all_finite(updates: optax.Updates) -> Array:
    leaves = [u for u in jax.tree.leaves(updates) if jnp.issubdtype(u.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.asarray(True), *(jnp.all(jnp.isfinite(u)) for u in leaves)]))


def _either(finite: Array, take: Callable[[], _Stepped], skip: Callable[[], _Stepped]) -> _Stepped:
    """Calls one of two functions; what is known need not be compiled anew in each step."""
    value = known(finite)
    if value is None:
        return jax.lax.cond(finite, take, skip)
    return take() if value else skip()
