"""A norm and what follows it as one step, for layers."""

from collections.abc import Callable
from functools import partial
from typing import TypeAlias, TypeVar

from flax import nnx

from flaxstab._typing import Array, PyTree
from flaxstab.functional._fused import check_residual
from flaxstab.functional._recompute import recomputed

Result = TypeVar("Result", bound=PyTree)
Layers: TypeAlias = tuple[nnx.Module, ...]


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
    return region(lambda layer, x: act(layer(x)), (layer,), x)


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
    check_residual(residual, x)
    return region(lambda layer, x, r: act(layer(x) + r), (layer,), x, residual)


def region(call: Callable[..., Result], layers: Layers, *arrays: Array) -> Result:
    """Returns ``call(*layers, *arrays)`` and keeps only the arrays for the backward pass.

    What is computed inside is computed again there, but for batch normalisation's statistics.
    Running statistics and random streams of the layers move as they would outside, and what a call
    leaves alone is not written: in evaluation the layers may be closed over by a program.

    Args:
      call: a function of the layers and the arrays to an array, or a tree of arrays.
      layers: what it uses: their parameters live anyway, and are not copied.
      *arrays: its inputs.
    """
    graph, state = nnx.split(layers)
    y, moved = recomputed(partial(called, call, graph))(state, *arrays)
    nnx.update(layers, moved)
    return y


def called(
    call: Callable[..., Result], graph: nnx.GraphDef[Layers], state: PyTree, *arrays: Array
) -> tuple[Result, PyTree]:
    """Returns ``call(*layers, *arrays)`` of split layers, and what it has moved of their state.

    Args:
      call: as of :func:`region`.
      graph: the structure of a tuple of layers.
      state: their state.
      *arrays: the other inputs.
    """
    before = _values(state)  # now: a merged layer's variables are those of the state
    layers = nnx.merge(graph, state)
    y = call(*layers, *arrays)
    after = nnx.state(layers, nnx.Not(nnx.Param))
    moved = {path for path, value in _values(after).items() if value is not before.get(path)}
    return y, nnx.filter_state(after, lambda path, _: path in moved)


def _values(state: PyTree) -> dict[tuple[object, ...], object]:
    return {path: variable.get_value() for path, variable in nnx.to_flat_state(state)}
