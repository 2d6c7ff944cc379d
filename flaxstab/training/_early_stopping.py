"""Early stopping as two pure functions, which run under ``jit``."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from flaxstab._checks import check, known
from flaxstab._typing import Array, ArrayLike, PyTree


class EarlyStoppingState(NamedTuple):
    """What is known of the values so far.

    Attributes:
      best: the best value; infinite before the first.
      waited: how many values in a row, up to now, were no improvement.
      stop: whether that is as many as the patience.
      kept: what was given with the best value.
    """

    best: Array
    waited: Array
    stop: Array
    kept: PyTree


class EarlyStopping(NamedTuple):
    """Two functions that belong together, as in an optax transformation.

    Attributes:
      init: from what shall be kept, if anything, to the state before the first value.
      update: from the state, the next value and what belongs to it to the next state.
    """

    init: Callable[..., EarlyStoppingState]
    update: Callable[..., EarlyStoppingState]


def early_stopping(
    patience: int | Array, min_delta: float | Array = 0.0, mode: Literal["min", "max"] = "min"
) -> EarlyStopping:
    """Returns functions that say when a value has stopped improving, and keep what was best.

    Same result as ``torch_ref.training.EarlyStopping``, under ``jit``, ``scan`` and ``vmap`` too:
    a value more than ``min_delta`` below the best (for ``mode='max'`` above it) is an improvement
    and becomes the best; anything else, NaN included, is waited for, and ``state.stop`` is true
    once that was so ``patience`` times in a row. What is kept is copied, so that the arrays that
    it came from may be donated.

    Args:
      patience: values without improvement that are borne, at least 1; the last of them stops.
      min_delta: what an improvement must exceed, at least 0.
      mode: ``'min'`` for a loss, ``'max'`` for an accuracy.

    Returns:
      The functions ``init(kept=None)`` and ``update(state, value, kept=None)``, where ``kept`` is
      a tree of arrays such as ``nnx.state(model)``, always of the same structure. Without it
      nothing is kept.

    Raises:
      ValueError: if an argument is out of range while it is known, or ``kept`` has another
        structure than before.

    Example:
      >>> import jax.numpy as jnp
      >>> stopping = early_stopping(patience=2)
      >>> state = stopping.init(jnp.zeros(1))
      >>> for epoch, loss in enumerate([3.0, 2.0, 2.5, 2.0]):
      ...     state = stopping.update(state, loss, jnp.full(1, epoch))
      >>> bool(state.stop), float(state.best), state.kept.tolist()
      (True, 2.0, [1.0])

    Differs from:
      ``flax.training.early_stopping.EarlyStopping``, which runs in Python alone, keeps nothing,
      knows no ``'max'``, waits one value longer, and after a first value of NaN sees no
      improvement any more.
    """
    least, margin = known(patience, "patience"), known(min_delta, "min_delta")
    whole = jnp.issubdtype(jnp.result_type(patience), jnp.integer)
    rule = "patience must be an integer of at least 1"
    check(bool(whole) and (least is None or least >= 1), rule, patience=patience)
    rule = "min_delta must be finite and at least 0"
    check(margin is None or 0 <= margin < math.inf, rule, min_delta=min_delta)
    check(mode in ("min", "max"), "mode must be 'min' or 'max'", mode=mode)
    sign = 1 if mode == "min" else -1

    def init(kept: PyTree = None) -> EarlyStoppingState:
        worst = jnp.asarray(sign * math.inf, jnp.result_type(float))
        return EarlyStoppingState(
            worst, jnp.zeros((), jnp.int32), jnp.asarray(False), jax.tree.map(jnp.copy, kept)
        )

    def update(
        state: EarlyStoppingState, value: ArrayLike, kept: PyTree = None
    ) -> EarlyStoppingState:
        given, before = (str(jax.tree.structure(tree)) for tree in (kept, state.kept))
        rule = "update must be given a tree like the one that init was given"
        check(given == before, rule, kept=given, before=before)
        new = jnp.asarray(value, state.best.dtype)
        delta = jnp.asarray(min_delta, state.best.dtype)
        improved = sign * new < sign * state.best - delta
        waited = jnp.where(improved, 0, state.waited + 1)
        stop = waited >= jnp.asarray(patience, waited.dtype)
        best, better = jax.tree.map(
            lambda now, before: jnp.where(improved, now, before),
            (new, kept), (state.best, state.kept),
        )  # fmt: skip
        return EarlyStoppingState(best, waited, stop, better)

    return EarlyStopping(init, update)
