"""A norm and what follows it as one step, for layers."""

from collections.abc import Callable

import jax
from flax import nnx

from flaxstab import functional
from flaxstab._typing import Array


def norm_act(layer: nnx.Module, act: Callable[[Array], Array], x: Array) -> Array:
    """Computes ``act(layer(x))`` and keeps only ``x`` for the backward pass.

    :func:`flaxstab.functional.norm_act` for a layer, whose running statistics it updates.

    Args:
      layer: a norm of this package, in either mode.
      act: the activation, elementwise.
      x: what the layer takes.

    Returns:
      An array of the shape of ``x``.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from flaxstab import norms
      >>> layer = norms.BatchNorm(1)
      >>> norm_act(layer, jax.nn.relu, jnp.array([[1.0], [3.0]])).round().tolist()
      [[0.0], [1.0]]
      >>> int(layer.count[...])
      1
    """
    y, statistics = functional.norm_act(_pure(layer), act, x)
    nnx.update(layer, statistics)
    return y


def norm_add_act(
    layer: nnx.Module, act: Callable[[Array], Array], x: Array, residual: Array
) -> Array:
    """Computes ``act(layer(x) + residual)`` and keeps only ``x`` and ``residual``.

    Args:
      layer: as of :func:`norm_act`.
      act: the activation, elementwise.
      x: what the layer takes.
      residual: added before the activation, shape of ``x``.

    Returns:
      An array of the shape of ``x``.

    Raises:
      ValueError: if ``residual`` has another shape than ``x``.
    """
    y, statistics = functional.norm_add_act(_pure(layer), act, x, residual)
    nnx.update(layer, statistics)
    return y


def _pure(layer: nnx.Module) -> Callable[[Array], tuple[Array, object]]:
    """Returns a layer as a function to its output and its statistics after it."""
    graph, state = nnx.split(layer)

    def run(x: Array) -> tuple[Array, object]:
        # With variables of its own: those of the layer must not change in here.
        copy = nnx.merge(graph, jax.tree.map(lambda array: array, state))
        return copy(x), nnx.state(copy, nnx.BatchStat)

    return run
